"""Gradients of edited attention at the memory of flash attention: no weights are kept, they are computed again.

Source of the form: FlashAttention-2 (Dao 2023, arXiv 2307.08691), whose backward is one pass by key tiles for the keys and
values and one by row tiles for the queries. In row i, with t the edited logits and L their log-sum-exp (sink logits
counted), ``P_j = exp(t_j - L)`` are the weights before Regroup. S is the source, T the target, m their masses, z their
parts of the output, keep the factor. Where Regroup acts:

    output = keep z_S + f z_T + z_rest,    f = 1 + (1 - keep) m_S / m_T
    W_j    = keep P_j in S, f P_j in T, P_j elsewhere: the final weights
    dV_j   = sum over i of W_ij dO_i

With ``g_j = dO . V_j``, ``a_S = dO . z_S``, ``mean_T = dO . z_T / m_T`` and ``r = (1 - keep) m_S / m_T``, the gradient of P_j
is ``keep g_j + (1 - keep) mean_T`` in S, ``f g_j - r mean_T`` in T (through g, m_S and m_T) and ``g_j`` elsewhere. Its mean
under P is again ``delta = dO . output``, as in plain attention, because moving mass keeps the output homogeneous in P.
So through the softmax

    dt_j = W_j g_j + P_j u,    u = (1 - keep) mean_T - delta in S, -r mean_T - delta in T, -delta elsewhere
    dkeep = a_S - m_S mean_T,  dsink = -exp(sink - L) delta

and a factor and an addend a row and class are all that a pass over the keys has to know. ``_row_terms`` makes them first,
from the keys of source, target and gate alone; with no target named, all others are the target, and it reads every key.
mean_T is a mean and r large only where P_j is as small, so that a source that holds nearly all mass costs no digits.

A LogitMap ``t = A s + B |s| + C`` sends back ``ds = (A + B sign s) dt`` and gives ``dA = sum dt s``, ``dB = sum dt |s|``,
``dC = sum dt``; a softcap ``ds = (1 - (s / cap)^2) ds_capped``. Sums over rows and keys are written by each program and
added by PyTorch: no atomics, so that two runs give the same bits. A gate compares masses with thresholds: its step has no
gradient, and it is evaluated again here, so that a mass within rounding of a threshold may fall on its other side. Gain and
offset are PyTorch's, after the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from attn_kernels.edited_attention.edited_flash import edited_flash, load_tile
from attn_kernels.edited_attention.launch import (
    batch_stride,
    ceil_div,
    last_contiguous,
    launch,
    multiprocessors,
    padded_size,
    power_of_two,
    strides_of,
)
from attn_kernels.edited_attention.lowering import NO_BIT, LoweredEdits
from attn_kernels.edited_attention.tiles import (
    LN_2,
    LOG2_E,
    SMALLEST_TARGET_IN_KERNEL,
    capped,
    has_bit,
    mapped_logits,
    matmul,
    scores,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# Numbers a row in ``terms``: log-sum-exp in units of log2, addend of the rest; with a Regroup also factor and addend of the
# source, those of the target, and the gradient of keep.
PLAIN_TERMS, REGROUP_TERMS = 2, 7


@triton.jit
def _visible(valid, keys, query_index, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which rows see which keys; all three broadcast, in either orientation."""
    visible = valid
    if CAUSAL:
        visible = visible & (keys <= query_index)
    if HAS_WINDOW:
        visible = visible & (keys > query_index - window)
    return visible


@triton.jit
def _load_terms(terms, rows, stride, inside, HAS_REGROUP: tl.constexpr):
    """The terms of rows: log-sum-exp, addend of the rest, factor and addend of the source, and of the target."""
    log_sum_exp = tl.load(terms + rows, mask=inside, other=float("inf"))
    rest_addend = tl.load(terms + stride + rows, mask=inside, other=0.0)
    if HAS_REGROUP:
        source_factor = tl.load(terms + 2 * stride + rows, mask=inside, other=0.0)
        source_addend = tl.load(terms + 3 * stride + rows, mask=inside, other=0.0)
        target_factor = tl.load(terms + 4 * stride + rows, mask=inside, other=0.0)
        target_addend = tl.load(terms + 5 * stride + rows, mask=inside, other=0.0)
    else:
        source_factor = rest_addend
        source_addend = rest_addend
        target_factor = rest_addend
        target_addend = rest_addend
    return log_sum_exp, rest_addend, source_factor, source_addend, target_factor, target_addend


@triton.jit
def _through_maps(
    gradient,
    logits,
    key_code,
    row_code,
    head,
    coefficients,
    num_heads,
    sums,
    in_sums,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):
    """The gradient before all LogitMaps, and ``sums`` (R, terms) with what each row adds to the coefficients' gradients."""
    for term in tl.static_range(NUM_MAPS - 1, -1, -1):
        before = mapped_logits(logits, key_code, row_code, head, coefficients, num_heads, term, MAP_KEYS, MAP_ROWS)
        # A key that an earlier map removed has no weight and no finite logit.
        acts = has_bit(key_code, (MAP_KEYS >> (4 * term)) & 15) & (before > float("-inf"))
        if ((MAP_ROWS >> (4 * term)) & 15) != NO_BIT_IN_KERNEL:
            acts = acts & has_bit(row_code, (MAP_ROWS >> (4 * term)) & 15)
        if WITH_SUMS:
            acting = tl.where(acts, gradient, 0.0)
            size = tl.where(acts, before, 0.0) * LN_2
            sums += tl.sum(acting * size, 1)[:, None] * (in_sums == term * 3).to(tl.float32)[None, :]
            sums += tl.sum(acting * tl.abs(size), 1)[:, None] * (in_sums == term * 3 + 1).to(tl.float32)[None, :]
            sums += tl.sum(acting, 1)[:, None] * (in_sums == term * 3 + 2).to(tl.float32)[None, :]
        scale = tl.load(coefficients + (term * 3) * num_heads + head)
        absolute = tl.load(coefficients + (term * 3 + 1) * num_heads + head)
        slope = scale + tl.where(before > 0, absolute, tl.where(before < 0, -absolute, 0.0))
        gradient = tl.where(acts, gradient * slope, gradient)
    return gradient, sums


@triton.jit
def _tile_gradients(
    logits,
    value_gradient,
    visible,
    key_code,
    row_code,
    head,
    log_sum_exp,
    rest_addend,
    source_factor,
    source_addend,
    target_factor,
    target_addend,
    coefficients,
    num_heads,
    softcap,
    sums,
    in_sums,
    IS_PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):
    """Final weights and the gradient of the scaled logits in one tile, in either orientation; and the sums.

    ``logits`` in units of log2, before the softcap. ``value_gradient`` are the dot products of output gradients and values.
    A plain tile has no touched key, and every row sees every key.
    """
    logits = capped(logits, softcap, HAS_SOFTCAP)
    edited = logits
    if not IS_PLAIN:
        edited = mapped_logits(logits, key_code, row_code, head, coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS)
        edited = tl.where(visible, edited, float("-inf"))
    weights = tl.exp2(edited - log_sum_exp)
    if not HAS_REGROUP or (IS_PLAIN and TARGET != NO_BIT_IN_KERNEL):
        gradient = weights * (value_gradient + rest_addend)
    else:
        if IS_PLAIN:
            factor = target_factor
            addend = target_addend
        elif TARGET == NO_BIT_IN_KERNEL:
            in_source = has_bit(key_code, SOURCE)
            factor = tl.where(in_source, source_factor, target_factor)
            addend = tl.where(in_source, source_addend, target_addend)
        else:
            in_source = has_bit(key_code, SOURCE)
            in_target = has_bit(key_code, TARGET)
            factor = tl.where(in_source, source_factor, tl.where(in_target, target_factor, 1.0))
            addend = tl.where(in_source, source_addend, tl.where(in_target, target_addend, rest_addend))
        moved = weights * factor
        gradient = moved * value_gradient + weights * addend
        weights = moved
    if not IS_PLAIN:
        gradient, sums = _through_maps(
            gradient,
            logits,
            key_code,
            row_code,
            head,
            coefficients,
            num_heads,
            sums,
            in_sums,
            NUM_MAPS,
            MAP_KEYS,
            MAP_ROWS,
            WITH_SUMS,
        )
    if HAS_SOFTCAP:
        part = logits / (softcap * LOG2_E)
        gradient = gradient * (1 - part * part)
    return weights, gradient, sums


@triton.jit
def _row_terms(
    query,
    key,
    value,
    output,
    output_gradient,
    log_sum_exp,
    terms,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    o_b,
    o_h,
    o_n,
    g_b,
    g_h,
    g_n,
    num_heads,
    heads_per_kv,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    key_valid,
    valid_stride,
    key_codes,
    codes_b,
    codes_h,
    num_codes,
    tile_order,
    order_b,
    order_h,
    plain_before,
    before_b,
    before_h,
    row_codes,
    row_codes_stride,
    map_coefficients,
    regroup,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < num_queries
    in_dv = tl.arange(0, BLOCK_DV)
    at_rows = rows.to(tl.int64)
    gradient_tile = load_tile(
        output_gradient + batch * g_b + head * g_h, at_rows * g_n, in_dv, DV, BLOCK_DV, row_inside, False
    )
    output_tile = load_tile(output + batch * o_b + head * o_h, at_rows * o_n, in_dv, DV, BLOCK_DV, row_inside, False)
    delta = tl.sum(gradient_tile.to(tl.float32) * output_tile.to(tl.float32), 1)
    place = (batch * num_heads + head) * num_queries + rows
    stride = tl.num_programs(2).to(tl.int64) * num_heads * num_queries
    total = tl.load(log_sum_exp + place, mask=row_inside, other=0.0)
    # A row that sees no key gets no weights.
    total = tl.where(total > float("-inf"), total * LOG2_E, float("inf"))
    tl.store(terms + place, total, mask=row_inside)
    tl.store(terms + stride + place, -delta, mask=row_inside)
    if HAS_REGROUP:
        in_d = tl.arange(0, BLOCK_D)
        in_m = tl.arange(0, BLOCK_M)
        kv_head = head // heads_per_kv
        key_base = key + batch * k_b + kv_head * k_h
        value_base = value + batch * v_b + kv_head * v_h
        query_index = (rows + query_offset)[:, None]
        query_tile = load_tile(query + batch * q_b + head * q_h, at_rows * q_n, in_d, D, BLOCK_D, row_inside, False)
        row_code = tl.zeros([BLOCK_N, 1], tl.int32)
        if HAS_ROW_CODES:
            row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0)[:, None].to(
                tl.int32
            )
        first_tile = 0
        stop_tile = tl.cdiv(num_keys, BLOCK_M)
        if CAUSAL:
            stop_tile = tl.minimum(stop_tile, tl.cdiv(row_tile * BLOCK_N + BLOCK_N + query_offset, BLOCK_M))
        if HAS_WINDOW:
            first_tile = tl.maximum(0, row_tile * BLOCK_N + query_offset - window + 1) // BLOCK_M
            first_tile = tl.minimum(first_tile, stop_tile)
        num_tiles = stop_tile - first_tile
        if TARGET != NO_BIT_IN_KERNEL:
            # The keys of both groups, and of the gate, have a byte.
            order_base = tile_order + batch * order_b + head * order_h
            before_base = plain_before + batch * before_b + head * before_h
            first_before = tl.load(before_base + first_tile)
            num_tiles -= tl.load(before_base + stop_tile) - first_before
            touched_from = tl.load(before_base + tl.cdiv(num_keys, BLOCK_M)) + first_tile - first_before
        source_mass = tl.zeros([BLOCK_N], tl.float32)
        source_part = tl.zeros([BLOCK_N], tl.float32)
        target_mass = tl.zeros([BLOCK_N], tl.float32)
        target_part = tl.zeros([BLOCK_N], tl.float32)
        of_mass = tl.zeros([BLOCK_N], tl.float32)
        share_mass = tl.zeros([BLOCK_N], tl.float32)
        for step in tl.range(0, num_tiles, num_stages=STAGES):
            tile = first_tile + step
            if TARGET != NO_BIT_IN_KERNEL:
                tile = tl.load(order_base + touched_from + step)
            keys = tile * BLOCK_M + in_m
            inside = keys < num_keys
            first = (tile * BLOCK_M).to(tl.int64)
            key_tile = load_tile(key_base + first * k_m, in_m * k_m, in_d, D, BLOCK_D, inside, True)
            value_tile = load_tile(value_base + first * v_m, in_m * v_m, in_dv, DV, BLOCK_DV, inside, True)
            code = tl.zeros([1, BLOCK_M], tl.int32)
            if HAS_CODES:
                code = tl.load(key_codes + batch * codes_b + head * codes_h + keys, mask=keys < num_codes, other=0)[
                    None, :
                ].to(tl.int32)
            valid = inside
            if HAS_VALID:
                valid = tl.load(key_valid + batch * valid_stride + keys, mask=inside, other=0) != 0
            visible = _visible(valid[None, :], keys[None, :], query_index, window, CAUSAL, HAS_WINDOW)
            logits = capped(scores(query_tile, key_tile, scaling * LOG2_E, PRECISION), softcap, HAS_SOFTCAP)
            logits = mapped_logits(
                logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS
            )
            weights = tl.exp2(tl.where(visible, logits, float("-inf")) - total[:, None])
            parts = weights * scores(gradient_tile, value_tile, 1.0, PRECISION)
            in_source = has_bit(code, SOURCE)
            in_target = in_source == 0
            if TARGET != NO_BIT_IN_KERNEL:
                in_target = in_target & has_bit(code, TARGET)
            source_mass += tl.sum(tl.where(in_source, weights, 0.0), 1)
            source_part += tl.sum(tl.where(in_source, parts, 0.0), 1)
            target_mass += tl.sum(tl.where(in_target, weights, 0.0), 1)
            target_part += tl.sum(tl.where(in_target, parts, 0.0), 1)
            if GATE_OF != NO_BIT_IN_KERNEL:
                of_mass += tl.sum(tl.where(has_bit(code, GATE_OF), weights, 0.0), 1)
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                share_mass += tl.sum(tl.where(has_bit(code, GATE_SHARE), weights, 0.0), 1)
        keep = tl.load(regroup + head)
        acts = target_mass > SMALLEST_TARGET_IN_KERNEL
        if GATE_OF != NO_BIT_IN_KERNEL:
            acts = acts & (of_mass >= tl.load(regroup + num_heads + head))
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                acts = acts & (share_mass <= tl.load(regroup + 2 * num_heads + head) * of_mass)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & (tl.sum(has_bit(row_code, REGROUP_ROW).to(tl.int32), 1) != 0)
        safe = tl.where(target_mass > 0, target_mass, 1.0)
        mean = target_part / safe
        ratio = tl.where(acts, (1 - keep) * source_mass, 0.0) / safe
        tl.store(terms + 2 * stride + place, tl.where(acts, keep, 1.0), mask=row_inside)
        tl.store(terms + 3 * stride + place, tl.where(acts, (1 - keep) * mean, 0.0) - delta, mask=row_inside)
        tl.store(terms + 4 * stride + place, 1 + ratio, mask=row_inside)
        tl.store(terms + 5 * stride + place, -ratio * mean - delta, mask=row_inside)
        tl.store(terms + 6 * stride + place, tl.where(acts, source_part - source_mass * mean, 0.0), mask=row_inside)


@triton.jit
def _query_gradients(
    query,
    key,
    value,
    output_gradient,
    terms,
    query_gradient,
    partial_sums,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    g_b,
    g_h,
    g_n,
    dq_b,
    dq_h,
    dq_n,
    num_heads,
    heads_per_kv,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    key_valid,
    valid_stride,
    key_codes,
    codes_b,
    codes_h,
    num_codes,
    tile_order,
    order_b,
    order_h,
    plain_before,
    before_b,
    before_h,
    row_codes,
    row_codes_stride,
    map_coefficients,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // heads_per_kv
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < num_queries
    first_index = row_tile * BLOCK_N + query_offset
    query_index = (rows + query_offset)[:, None]
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    at_rows = rows.to(tl.int64)
    query_tile = load_tile(query + batch * q_b + head * q_h, at_rows * q_n, in_d, D, BLOCK_D, row_inside, False)
    gradient_tile = load_tile(
        output_gradient + batch * g_b + head * g_h, at_rows * g_n, in_dv, DV, BLOCK_DV, row_inside, False
    )
    total, rest_addend, source_factor, source_addend, target_factor, target_addend = _load_terms(
        terms + (batch * num_heads + head) * num_queries,
        rows,
        tl.num_programs(2).to(tl.int64) * num_heads * num_queries,
        row_inside,
        HAS_REGROUP,
    )
    row_code = tl.zeros([BLOCK_N, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0)[:, None].to(tl.int32)
    key_base = key + batch * k_b + kv_head * k_h
    value_base = value + batch * v_b + kv_head * v_h
    # Tiles first_tile to stop_tile; between inner_tile and outer_tile every row sees every key.
    first_tile = 0
    stop_tile = tl.cdiv(num_keys, BLOCK_M)
    outer_tile = num_keys // BLOCK_M
    if CAUSAL:
        stop_tile = tl.minimum(stop_tile, tl.cdiv(first_index + BLOCK_N, BLOCK_M))
        outer_tile = tl.minimum(outer_tile, (first_index + 1) // BLOCK_M)
    inner_tile = first_tile
    if HAS_WINDOW:
        first_tile = tl.minimum(tl.maximum(0, first_index - window + 1) // BLOCK_M, stop_tile)
        inner_tile = tl.minimum(tl.cdiv(tl.maximum(0, first_index + BLOCK_N - window), BLOCK_M), stop_tile)
    if HAS_VALID:
        outer_tile = inner_tile
    outer_tile = tl.maximum(outer_tile, inner_tile)
    plain_tiles = outer_tile - inner_tile
    if HAS_CODES:
        codes_base = key_codes + batch * codes_b + head * codes_h
        order_base = tile_order + batch * order_b + head * order_h
        before_base = plain_before + batch * before_b + head * before_h
        inner_before = tl.load(before_base + inner_tile)
        plain_tiles = tl.load(before_base + outer_tile) - inner_before
        touched_from = tl.load(before_base + tl.cdiv(num_keys, BLOCK_M)) + inner_tile - inner_before
    cut_tiles = inner_tile - first_tile + stop_tile - outer_tile
    special_tiles = stop_tile - first_tile - plain_tiles
    in_sums = tl.arange(0, NUM_SUMS)
    sums = tl.zeros([BLOCK_N, NUM_SUMS], tl.float32)
    accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for plain in tl.static_range(2):
        for step in tl.range(0, plain_tiles if plain else special_tiles, num_stages=STAGES):
            if plain:
                tile = inner_tile + step
                if HAS_CODES:
                    tile = tl.load(order_base + inner_before + step)
            else:
                tile = first_tile + step
                tile += tl.where(tile >= inner_tile, outer_tile - inner_tile, 0)
                if HAS_CODES and step >= cut_tiles:
                    tile = tl.load(order_base + touched_from + step - cut_tiles)
            keys = tile * BLOCK_M + in_m
            inside = keys < num_keys
            first = (tile * BLOCK_M).to(tl.int64)
            key_tile = load_tile(key_base + first * k_m, in_m * k_m, in_d, D, BLOCK_D, inside, True)
            value_tile = load_tile(value_base + first * v_m, in_m * v_m, in_dv, DV, BLOCK_DV, inside, True)
            logits = scores(query_tile, key_tile, scaling * LOG2_E, PRECISION)
            of_values = scores(gradient_tile, value_tile, 1.0, PRECISION)
            code = tl.zeros([1, BLOCK_M], tl.int32)
            visible = inside[None, :]
            if not plain:
                if HAS_CODES:
                    code = tl.load(codes_base + keys, mask=keys < num_codes, other=0)[None, :].to(tl.int32)
                if HAS_VALID:
                    visible = tl.load(key_valid + batch * valid_stride + keys, mask=inside, other=0)[None, :] != 0
                visible = _visible(visible, keys[None, :], query_index, window, CAUSAL, HAS_WINDOW)
            _, gradient, sums = _tile_gradients(
                logits,
                of_values,
                visible,
                code,
                row_code,
                head,
                total[:, None],
                rest_addend[:, None],
                source_factor[:, None],
                source_addend[:, None],
                target_factor[:, None],
                target_addend[:, None],
                map_coefficients,
                num_heads,
                softcap,
                sums,
                in_sums,
                plain == 1,
                HAS_SOFTCAP,
                HAS_REGROUP,
                SOURCE,
                TARGET,
                NUM_MAPS,
                MAP_KEYS,
                MAP_ROWS,
                WITH_SUMS,
            )
            accumulator = matmul(gradient.to(key_tile.dtype), tl.trans(key_tile), accumulator, PRECISION)
    tl.store(
        query_gradient + batch * dq_b + head * dq_h + at_rows[:, None] * dq_n + in_d[None, :],
        (accumulator * scaling).to(query_gradient.dtype.element_ty),
        mask=row_inside[:, None] & (in_d[None, :] < D),
    )
    if WITH_SUMS:
        place = ((batch * num_heads + head) * tl.num_programs(0) + row_tile) * NUM_SUMS
        tl.store(partial_sums + place + in_sums, tl.sum(sums, 0))


@triton.jit
def _key_gradients(
    query,
    key,
    value,
    output_gradient,
    terms,
    key_gradient,
    value_gradient,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    g_b,
    g_h,
    g_n,
    dk_b,
    dk_h,
    dk_m,
    dv_b,
    dv_h,
    dv_m,
    heads_per_part,
    num_heads,
    heads_per_kv,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    key_valid,
    valid_stride,
    key_codes,
    codes_b,
    codes_h,
    num_codes,
    row_codes,
    row_codes_stride,
    map_coefficients,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Keys along the first dimension of every tile. The first key tiles are the longest programs and start first.
    first_key = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1).to(tl.int64)
    kv_head = part // (heads_per_kv // heads_per_part)
    batch = tl.program_id(2).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_M)
    inside = keys < num_keys
    at_keys = keys.to(tl.int64)
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_n = tl.arange(0, BLOCK_N)
    key_tile = load_tile(key + batch * k_b + kv_head * k_h, at_keys * k_m, in_d, D, BLOCK_D, inside, False)
    value_tile = load_tile(value + batch * v_b + kv_head * v_h, at_keys * v_m, in_dv, DV, BLOCK_DV, inside, False)
    valid = inside
    if HAS_VALID:
        valid = tl.load(key_valid + batch * valid_stride + keys, mask=inside, other=0) != 0
    stride = tl.num_programs(2).to(tl.int64) * num_heads * num_queries
    # Row tiles first_tile to stop_tile; between inner_tile and outer_tile every row sees every key.
    first_tile = 0
    stop_tile = tl.cdiv(num_queries, BLOCK_N)
    inner_tile = 0
    if CAUSAL:
        first_tile = tl.minimum(tl.maximum(0, first_key - query_offset) // BLOCK_N, stop_tile)
        inner_tile = tl.minimum(tl.cdiv(tl.maximum(0, first_key + BLOCK_M - 1 - query_offset), BLOCK_N), stop_tile)
    outer_tile = stop_tile
    if HAS_WINDOW:
        stop_row = tl.maximum(0, first_key + BLOCK_M - 1 + window - query_offset)
        stop_tile = tl.maximum(tl.minimum(stop_tile, tl.cdiv(stop_row, BLOCK_N)), first_tile)
        outer_tile = tl.minimum(tl.maximum(0, first_key + window - query_offset) // BLOCK_N, stop_tile)
        inner_tile = tl.minimum(inner_tile, stop_tile)
    if HAS_VALID:
        outer_tile = inner_tile
    outer_tile = tl.where(first_key + BLOCK_M > num_keys, inner_tile, tl.maximum(outer_tile, inner_tile))
    unused = tl.zeros([1, 1], tl.float32)
    to_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    to_value = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for member in tl.range(0, heads_per_part):
        head = part * heads_per_part + member
        query_base = query + batch * q_b + head * q_h
        gradient_base = output_gradient + batch * g_b + head * g_h
        plain_tiles = outer_tile - inner_tile
        code = tl.zeros([BLOCK_M, 1], tl.int32)
        if HAS_CODES:
            code = tl.load(key_codes + batch * codes_b + head * codes_h + keys, mask=keys < num_codes, other=0)
            plain_tiles = tl.where(tl.max(code.to(tl.int32), 0) == 0, plain_tiles, 0)
            code = code[:, None].to(tl.int32)
        for plain in tl.static_range(2):
            for step in tl.range(0, plain_tiles if plain else stop_tile - first_tile - plain_tiles, num_stages=STAGES):
                if plain:
                    tile = inner_tile + step
                else:
                    tile = first_tile + step
                    tile += tl.where(tile >= inner_tile, plain_tiles, 0)
                rows = tile * BLOCK_N + in_n
                row_inside = rows < num_queries
                first = (tile * BLOCK_N).to(tl.int64)
                query_tile = load_tile(query_base + first * q_n, in_n * q_n, in_d, D, BLOCK_D, row_inside, True)
                gradient_tile = load_tile(
                    gradient_base + first * g_n, in_n * g_n, in_dv, DV, BLOCK_DV, row_inside, False
                )
                total, rest_addend, source_factor, source_addend, target_factor, target_addend = _load_terms(
                    terms + (batch * num_heads + head) * num_queries, rows, stride, row_inside, HAS_REGROUP
                )
                logits = scores(key_tile, query_tile, scaling * LOG2_E, PRECISION)
                of_values = scores(value_tile, tl.trans(gradient_tile), 1.0, PRECISION)
                row_code = tl.zeros([1, BLOCK_N], tl.int32)
                visible = valid[:, None]
                if not plain:
                    if HAS_ROW_CODES:
                        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0)
                        row_code = row_code[None, :].to(tl.int32)
                    query_index = (rows + query_offset)[None, :]
                    visible = _visible(visible, keys[:, None], query_index, window, CAUSAL, HAS_WINDOW)
                weights, gradient, _ = _tile_gradients(
                    logits,
                    of_values,
                    visible,
                    code,
                    row_code,
                    head,
                    total[None, :],
                    rest_addend[None, :],
                    source_factor[None, :],
                    source_addend[None, :],
                    target_factor[None, :],
                    target_addend[None, :],
                    map_coefficients,
                    num_heads,
                    softcap,
                    unused,
                    0,
                    plain == 1,
                    HAS_SOFTCAP,
                    HAS_REGROUP,
                    SOURCE,
                    TARGET,
                    NUM_MAPS,
                    MAP_KEYS,
                    MAP_ROWS,
                    False,
                )
                to_value = matmul(weights.to(gradient_tile.dtype), gradient_tile, to_value, PRECISION)
                to_key = matmul(gradient.to(query_tile.dtype), tl.trans(query_tile), to_key, PRECISION)
    tl.store(
        key_gradient + batch * dk_b + part * dk_h + at_keys[:, None] * dk_m + in_d[None, :],
        (to_key * scaling).to(key_gradient.dtype.element_ty),
        mask=inside[:, None] & (in_d[None, :] < D),
    )
    tl.store(
        value_gradient + batch * dv_b + part * dv_h + at_keys[:, None] * dv_m + in_dv[None, :],
        to_value.to(value_gradient.dtype.element_ty),
        mask=inside[:, None] & (in_dv[None, :] < DV),
    )


# Rows and keys of a tile, warps and stages: of the kernels by row tiles, and of the one by key tiles; by padded head size.
# Chosen by what they need of registers and shared memory.
Config = tuple[int, int, int, int]
CONFIGS: dict[int, tuple[Config, Config]] = {
    64: ((128, 64, 8, 3), (32, 128, 8, 2)),
    128: ((128, 64, 8, 2), (32, 128, 8, 2)),
    256: ((64, 64, 8, 2), (16, 64, 8, 2)),
}
CONFIG_OF_FLOAT32: Config = (16, 32, 4, 1)
# So many programs a multiprocessor even out that some take longer than others.
ROUNDS = 4


def backward_refusal(inputs: AttentionInputs, lowered: LoweredEdits) -> str | None:
    """Why the gradients of a call that the kernels take forward need PyTorch; None if they do not."""
    reasons = {
        "gradients under a mask": inputs.mask is not None or inputs.bias is not None,
        "gradients under a Ranking of heads": lowered.ranking is not None,
        "gradients under a Sparsity": lowered.sparsity is not None,
        "gradients under an Order": lowered.num_pairs > 0 or lowered.order_values is not None,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def differentiable_edited_attention(inputs: AttentionInputs, lowered: LoweredEdits) -> Tensor:
    """Output ``(B, H, N, Dv)`` in the value's dtype under edits that ``backward_refusal`` lets through; differentiable once.

    Gradients reach query, key, value, sink logits, and through ``lowered``, which therefore is that of this very call, the
    coefficients of LogitMap, Regroup's keep, and HeadAffine's gain and offset. Keeps the output and a number a row for the
    backward.

    Raises ValueError if ``backward_refusal`` names a reason.
    """
    refusal = backward_refusal(inputs, lowered)
    if refusal is not None:
        raise ValueError(f"the kernels have no backward for this call: {refusal}; blocked.edited_attention has one")
    batch, num_heads, num_queries, _ = inputs.query.shape
    sinks = inputs.sink_logits
    regroup = lowered.regroup
    # What the function keeps must hold no tensor that has a graph; those that have one are its arguments.
    none = inputs.query.new_empty(0)
    bare = replace(inputs, query=none, key=none, value=none, sink_logits=None, first_query=inputs.query_offset)
    plain = replace(
        lowered,
        map_coefficients=none,
        regroup=None if regroup is None else replace(regroup, coefficients=none),
        gain=None,
        offset=None,
        affine_row=NO_BIT,
        unscoped=None,
    )
    output: Tensor = _EditedAttention.apply(
        inputs.query,
        inputs.key,
        inputs.value,
        None if sinks is None else sinks.expand(batch, num_heads, num_queries),
        # The empty tensor of no maps may come from inference mode, and could not be kept.
        lowered.map_coefficients if lowered.num_maps else None,
        None if regroup is None else regroup.coefficients,
        bare,
        plain,
    )
    return with_head_affine(output, lowered)


def with_head_affine(output: Tensor, lowered: LoweredEdits) -> Tensor:
    """Gain and offset of ``lowered`` on outputs ``(B, H, N, Dv)``, in float32, differentiable, on every head.

    A head whose offset is still 0 gets a gradient, too, though ``lowered.heads`` does not name it.
    """
    if lowered.gain is None:
        return output
    edited = output.float() * lowered.gain[..., None, None]
    if lowered.offset is not None:
        edited = edited + lowered.offset[:, :, None]
    edited = edited.to(output.dtype)
    if lowered.affine_row == NO_BIT:
        return edited
    assert lowered.row_codes is not None
    acts = (lowered.row_codes >> lowered.affine_row) & 1 == 1
    return torch.where(acts[:, None, :, None], edited, output)


class _EditedAttention(torch.autograd.Function):
    """Forward by ``edited_flash``; the backward is this module's."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        maps: Tensor | None,
        regroup: Tensor | None,
        inputs: AttentionInputs,
        lowered: LoweredEdits,
    ) -> Tensor:
        ctx.inputs, ctx.lowered = inputs, lowered
        inputs, lowered = _joined(ctx, query, key, value, sinks, maps, regroup)
        output, log_sum_exp = edited_flash(inputs, lowered, with_log_sum_exp=True)
        ctx.save_for_backward(query, key, value, sinks, maps, regroup, output, log_sum_exp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *given, output, log_sum_exp = ctx.saved_tensors
        inputs, lowered = _joined(ctx, *given)
        return *_gradients(inputs, lowered, output, log_sum_exp, output_gradient, ctx), None, None


def _joined(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    maps: Tensor | None,
    regroup: Tensor | None,
) -> tuple[AttentionInputs, LoweredEdits]:
    """The call again, from what the function keeps and its arguments."""
    inputs = replace(ctx.inputs, query=query, key=key, value=value, sink_logits=sinks)
    lowered = ctx.lowered if maps is None else replace(ctx.lowered, map_coefficients=maps)
    if regroup is not None:
        lowered = replace(lowered, regroup=replace(lowered.regroup, coefficients=regroup))
    return inputs, lowered


def _gradients(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    output: Tensor,
    log_sum_exp: Tensor,
    output_gradient: Tensor,
    ctx: Any,
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, sinks, maps and regroup; None where ``ctx`` says that nobody asks."""
    query, key, value = (last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    output_gradient = last_contiguous(output_gradient)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys, value_dim, kv_heads = key.shape[2], value.shape[3], key.shape[1]
    block_d, block_dv = padded_size(head_dim), padded_size(value_dim)
    by_rows, by_keys = _configs(query.dtype, max(block_d, block_dv))
    # Without a key that has a byte no key is edited.
    is_edited = lowered.key_codes.shape[-1] > 0 and lowered.edits_weights
    regroup = lowered.regroup if is_edited else None
    num_maps = lowered.num_maps if is_edited else 0
    terms = query.new_empty(
        PLAIN_TERMS if regroup is None else REGROUP_TERMS, batch, num_heads, num_queries, dtype=torch.float32
    )
    codes, rows = lowered.key_codes, lowered.row_codes
    valid = inputs.key_valid if inputs.padded else None
    call = (
        num_heads,
        num_heads // kv_heads,
        num_queries,
        num_keys,
        inputs.query_offset,
        inputs.scaling,
        inputs.softcap or 0.0,
        inputs.window or 0,
        valid,
        batch_stride(valid),
        codes,
        *strides_of(codes),
        codes.shape[-1],
    )
    more = (rows, batch_stride(rows), lowered.map_coefficients)
    block_n, block_m, warps, stages = by_rows
    tiles: tuple[Any, ...] = (None, 0, 0, None, 0, 0)
    if is_edited:
        order, before = _tile_order(codes, num_keys, block_m)
        tiles = (order, *strides_of(order), before, *strides_of(before))
    constants = {
        "CAUSAL": inputs.causal,
        "HAS_WINDOW": inputs.window is not None,
        "HAS_VALID": valid is not None,
        "HAS_SOFTCAP": inputs.softcap is not None,
        "HAS_CODES": is_edited,
        "HAS_ROW_CODES": rows is not None,
        "HAS_REGROUP": regroup is not None,
        "SOURCE": NO_BIT if regroup is None else regroup.source,
        "TARGET": NO_BIT if regroup is None else regroup.target,
        "NUM_MAPS": num_maps,
        "MAP_KEYS": lowered.map_keys,
        "MAP_ROWS": lowered.map_rows,
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PRECISION": "ieee",
    }
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    row_tiles = ceil_div(num_queries, block_n)
    launch(
        _row_terms,
        (row_tiles, num_heads, batch),
        (
            query,
            key,
            value,
            output,
            output_gradient,
            log_sum_exp,
            terms,
            *strides,
            *output.stride()[:3],
            *output_gradient.stride()[:3],
            *call,
            *tiles,
            *more,
            None if regroup is None else regroup.coefficients,
        ),
        {
            **constants,
            "GATE_OF": NO_BIT if regroup is None else regroup.gate_of,
            "GATE_SHARE": NO_BIT if regroup is None else regroup.gate_share,
            "REGROUP_ROW": NO_BIT if regroup is None else regroup.row,
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "STAGES": stages,
        },
        warps,
    )
    needs_query, needs_key, needs_value, needs_sinks, needs_maps, needs_regroup = ctx.needs_input_grad[:6]
    query_gradient = key_gradient = value_gradient = sink_gradient = map_gradient = regroup_gradient = None
    strides = (*strides, *output_gradient.stride()[:3])
    if needs_query or needs_maps:
        num_sums = power_of_two(max(4, 3 * num_maps))
        query_gradient = torch.empty_like(query)
        partial_sums = terms.new_empty(batch, num_heads, row_tiles, num_sums)
        launch(
            _query_gradients,
            (row_tiles, num_heads, batch),
            (
                query,
                key,
                value,
                output_gradient,
                terms,
                query_gradient,
                partial_sums,
                *strides,
                *query_gradient.stride()[:3],
                *call,
                *tiles,
                *more,
            ),
            {
                **constants,
                "WITH_SUMS": needs_maps and num_maps > 0,
                "NUM_SUMS": num_sums,
                "BLOCK_N": block_n,
                "BLOCK_M": block_m,
                "STAGES": stages,
            },
            warps,
        )
        if needs_maps:
            map_gradient = torch.zeros_like(lowered.map_coefficients)
            if num_maps:
                map_gradient += partial_sums.sum((0, 2))[:, : 3 * num_maps].T.view_as(map_gradient)
    if needs_key or needs_value:
        block_n, block_m, warps, stages = by_keys
        key_tiles, group = ceil_div(num_keys, block_m), num_heads // kv_heads
        parts = _parts(group, key_tiles * kv_heads * batch, query.device)
        key_gradient, value_gradient = torch.empty_like(key), torch.empty_like(value)
        if parts > 1:
            key_gradient = terms.new_empty(batch, kv_heads * parts, num_keys, head_dim)
            value_gradient = terms.new_empty(batch, kv_heads * parts, num_keys, value_dim)
        launch(
            _key_gradients,
            (key_tiles, kv_heads * parts, batch),
            (
                query,
                key,
                value,
                output_gradient,
                terms,
                key_gradient,
                value_gradient,
                *strides,
                *key_gradient.stride()[:3],
                *value_gradient.stride()[:3],
                group // parts,
                *call,
                *more,
            ),
            {**constants, "BLOCK_N": block_n, "BLOCK_M": block_m, "STAGES": stages},
            warps,
        )
        if parts > 1:
            key_gradient = key_gradient.unflatten(1, (kv_heads, parts)).sum(2).to(key.dtype)
            value_gradient = value_gradient.unflatten(1, (kv_heads, parts)).sum(2).to(value.dtype)
    if needs_sinks:
        assert inputs.sink_logits is not None
        share = torch.exp(inputs.sink_logits.float() - log_sum_exp)
        sink_gradient = (share * terms[1]).to(inputs.sink_logits.dtype)
    if needs_regroup:
        assert lowered.regroup is not None
        regroup_gradient = torch.zeros_like(lowered.regroup.coefficients)
        if regroup is not None:
            regroup_gradient[0] = terms[6].sum((0, 2))
    return query_gradient, key_gradient, value_gradient, sink_gradient, map_gradient, regroup_gradient


def _tile_order(key_codes: Tensor, num_keys: int, size: int) -> tuple[Tensor, Tensor]:
    """Tiles of ``size`` keys ``(b, h, tiles)`` int32: the untouched ones, ascending, then the others, ascending.

    And ``(b, h, tiles + 1)`` int32: how many untouched tiles lie before each tile, and in all.
    """
    touched = functional.pad(key_codes != 0, (0, num_keys - key_codes.shape[-1] + -num_keys % size))
    touched = touched.unflatten(-1, (-1, size)).any(-1)
    order = torch.sort(touched.to(torch.uint8), dim=-1, stable=True).indices.to(torch.int32)
    before = functional.pad((~touched).cumsum(-1), (1, 0)).to(torch.int32)
    return order.contiguous(), before


def _parts(group: int, programs: int, device: torch.device) -> int:
    """Into how many programs to split the query heads of a kv head. Early keys take the longest, so a few rounds are good.

    Each writes a gradient in float32, which PyTorch adds; so few that their memory is that of a few thousand keys.
    """
    enough = (
        parts
        for parts in range(1, group + 1)
        if group % parts == 0 and programs * parts >= ROUNDS * multiprocessors(device)
    )
    return next(enough, group)


def _configs(dtype: torch.dtype, block_d: int) -> tuple[Config, Config]:
    return (CONFIG_OF_FLOAT32,) * 2 if dtype == torch.float32 else CONFIGS[max(64, block_d)]
