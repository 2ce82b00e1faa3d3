"""What the Triton kernels share: edits of one tile of logits.

Logits are in units of log2 inside the kernels, ``s * log2(e)``, because the hardware's exponential is base 2. A LogitMap is
homogeneous in that unit, with its bias scaled.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from attn_kernels.primitives import SMALLEST_TARGET

# The interpreter multiplies the bits of bfloat16 operands as integers; there they are widened first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_BIT = tl.constexpr(15)
SMALLEST_TARGET_IN_KERNEL = tl.constexpr(SMALLEST_TARGET)


@triton.jit
def matmul(left, right, added, PRECISION: tl.constexpr):
    """``added + left @ right`` in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, added, input_precision=PRECISION)


@triton.jit
def scores(query, key, to_log2, PRECISION: tl.constexpr):
    """Logits of (R, D) queries and (D, C) keys in units of log2."""
    if INTERPRETED:
        query = query.to(tl.float32)
        key = key.to(tl.float32)
    return tl.dot(query, key, input_precision=PRECISION) * to_log2


@triton.jit
def has_bit(code, bit: tl.constexpr):
    return ((code >> bit) & 1) != 0


@triton.jit
def tanh(x):
    """Hyperbolic tangent. Near 0 its series, since there the exponential's form keeps few digits."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * 17 / 315)))
    return tl.where(tl.abs(x) < 0.2, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def capped(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """``softcap * tanh(s / softcap)`` in units of log2."""
    if HAS_SOFTCAP:
        cap = softcap * LOG2_E
        logits = cap * tanh(logits / cap)
    return logits


@triton.jit
def mapped_logits(
    logits,
    key_code,
    row_code,
    head,
    coefficients,
    num_heads,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
):
    """All LogitMaps on ``logits`` (R, C). ``key_code`` (1, C), ``row_code`` (R, 1) and ``head`` (scalar or (R, 1)) int32."""
    for term in tl.static_range(NUM_MAPS):
        scale = tl.load(coefficients + (term * 3) * num_heads + head)
        absolute = tl.load(coefficients + (term * 3 + 1) * num_heads + head)
        bias = tl.load(coefficients + (term * 3 + 2) * num_heads + head) * LOG2_E
        acts = has_bit(key_code, (MAP_KEYS >> (4 * term)) & 15) & (logits > float("-inf"))
        if ((MAP_ROWS >> (4 * term)) & 15) != NO_BIT:
            acts = acts & has_bit(row_code, (MAP_ROWS >> (4 * term)) & 15)
        logits = tl.where(acts, scale * logits + absolute * tl.abs(logits) + bias, logits)
    return logits


@triton.jit
def map_of_rows(row_code, head, coefficients, num_heads, TERM: tl.constexpr, MAP_ROWS: tl.constexpr):
    """Coefficients (R, 1) of one LogitMap in each row, for logits in units of log2; the identity for no term."""
    scale = 0.0 * row_code + 1.0
    absolute = 0.0 * row_code
    bias = 0.0 * row_code
    if TERM != NO_BIT:
        acts = row_code == row_code
        if ((MAP_ROWS >> (4 * TERM)) & 15) != NO_BIT:
            acts = has_bit(row_code, (MAP_ROWS >> (4 * TERM)) & 15)
        scale = tl.where(acts, tl.load(coefficients + (TERM * 3) * num_heads + head), scale)
        absolute = tl.where(acts, tl.load(coefficients + (TERM * 3 + 1) * num_heads + head), absolute)
        bias = tl.where(acts, tl.load(coefficients + (TERM * 3 + 2) * num_heads + head) * LOG2_E, bias)
    return scale, absolute, bias


@triton.jit
def with_affine(
    outputs,
    row_code,
    head,
    batch,
    gain,
    gain_b,
    offset,
    offset_b,
    in_dv,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    DV: tl.constexpr,
):
    """Gain and offset of one head on ``outputs`` (R, Dv), in the rows of the edit. A gain of 0 replaces what was there."""
    factor = tl.load(gain + batch * gain_b + head)
    edited = tl.where(factor == 0, 0.0, outputs * factor)
    if HAS_OFFSET:
        edited += tl.load(offset + batch * offset_b + head * DV + in_dv[None, :], mask=in_dv[None, :] < DV, other=0.0)
    if AFFINE_ROW != NO_BIT:
        edited = tl.where(has_bit(row_code, AFFINE_ROW), edited, outputs)
    return edited


@triton.jit
def paired_visibility(
    visible,
    valid,
    key_code,
    row_code,
    head,
    pair_heads,
    num_heads,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
):
    """``visible`` (R, C) after the allow and deny pairs; ``valid`` (1, C) are the keys that are real."""
    for pair in tl.static_range(NUM_PAIRS):
        sign = tl.load(pair_heads + pair * num_heads + head)
        met = has_bit(key_code, (PAIR_KEYS >> (4 * pair)) & 15) & has_bit(row_code, (PAIR_ROWS >> (4 * pair)) & 15)
        visible = (visible | (met & valid & (sign > 0))) & ((met & (sign < 0)) == 0)
    return visible


@triton.jit
def listed_before(ascending, listed, stop, ENOUGH: tl.constexpr):
    """How many of the ``listed`` ascending indices lie before ``stop``; a list of at most ``ENOUGH`` is not searched."""
    found = listed
    if listed > ENOUGH:
        found = 0
        for first in tl.range(0, listed, 1024):
            at = first + tl.arange(0, 1024)
            index = tl.load(ascending + at, mask=at < listed, other=2147483647)
            found += tl.sum((index < stop).to(tl.int32), 0)
    return found
