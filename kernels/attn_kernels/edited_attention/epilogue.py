"""Edits on top of attention that somebody else computed: its output and log-sum-exp, and the few keys that are touched.

Where an edit touches few keys, plain attention over all keys is the vendor's business. The log-sum-exp gives the plain
weight ``p[j]`` of a touched key back, and its edited logit the weight ``w[j]`` on the same scale. With ``c[j]`` what a
Regroup multiplies key j by and ``T = 1 + sum of (w[j] - p[j])`` the new total,

    o' = alpha * o + sum over touched j of (c[j] w[j] / T - alpha p[j]) v[j],    alpha = c[untouched] / T

Where mass is taken away this subtracts, and loses digits when what is taken is nearly everything: a row tile whose rounding
error would grow by more than ``GROWTH`` is flagged, and ``edited_flash``, which never subtracts, computes it again. So is a
tile of a head that touches more keys than ``MOST_KEYS``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import load_tile
from attn_kernels.edited_attention.launch import (
    batch_stride,
    ceil_div,
    last_contiguous,
    launch,
    padded_size,
    strides_of,
)
from attn_kernels.edited_attention.lowering import LoweredEdits
from attn_kernels.edited_attention.tiles import (
    LOG2_E,
    SMALLEST_TARGET_IN_KERNEL,
    has_bit,
    mapped_logits,
    matmul,
    paired_visibility,
    scores,
    with_affine,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# The output's own rounding error may grow by so much at most; beyond it the tile is computed again.
GROWTH = 1.5
# A remainder below this share of the mass is not told exactly by a float32 log-sum-exp.
SMALLEST_REMAINDER = 1 / 64
# A head's touched keys lie in one tile of at most so many.
MOST_KEYS = 64
# Rows of a tile and warps.
CONFIG = (64, 4)


@triton.jit
def _epilogue(
    query,
    key,
    value,
    output,
    log_sum_exp,
    flags,
    heads,
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
    num_heads,
    heads_per_kv,
    num_queries,
    first_row,
    stop_row,
    num_keys,
    query_offset,
    scaling,
    key_codes,
    codes_b,
    codes_h,
    row_codes,
    row_codes_stride,
    lists,
    list_b,
    list_h,
    list_length,
    counts,
    counts_b,
    counts_h,
    map_coefficients,
    pair_heads,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    growth,
    smallest_remainder,
    CAUSAL: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads lie side by side in memory, so programs of one row tile follow each other.
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(0)).to(tl.int64)
    else:
        head = tl.program_id(0).to(tl.int64)
    kv_head = head // heads_per_kv
    row_tile = first_row // BLOCK_N + tl.program_id(1)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (rows >= first_row) & (rows < stop_row)
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    flags_base = flags + (batch * num_heads + head) * tl.cdiv(num_queries, FLAG_ROWS)
    # Loads that wait for none other come first.
    query_tile = tl.load(
        query + batch * q_b + head * q_h + rows[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=row_inside[:, None] & (in_d[None, :] < D),
        other=0.0,
    )
    output_at = output + batch * o_b + head * o_h + rows[:, None].to(tl.int64) * o_n + in_dv[None, :]
    output_mask = row_inside[:, None] & (in_dv[None, :] < DV)
    plain = tl.load(output_at, mask=output_mask, other=0.0)
    # Rows outside weigh nothing: exp2(-inf).
    lse = tl.load(log_sum_exp + (batch * num_heads + head) * num_queries + rows, mask=row_inside, other=float("inf"))
    row_code = tl.zeros([BLOCK_N, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0).to(tl.int32)[:, None]

    # The touched keys, one list after the other.
    counts_base = counts + batch * counts_b + head * counts_h
    list_base = lists + batch * list_b + head * list_h
    first_count = tl.load(counts_base)
    if HAS_REGROUP:
        second_count = tl.load(counts_base + 1)
        listed = first_count + second_count + tl.load(counts_base + 2)
        kind = (in_m >= first_count).to(tl.int32) + (in_m >= first_count + second_count).to(tl.int32)
        before_kind = tl.where(kind == 0, 0, tl.where(kind == 1, first_count, first_count + second_count))
        inside = in_m < listed
        keys = tl.load(list_base + kind * list_length + in_m - before_kind, mask=inside, other=num_keys)
    else:
        # There is but the first list, which is read as far as it may reach while its length is on the way.
        listed = first_count
        keys = tl.load(list_base + in_m, mask=in_m < list_length, other=num_keys)
        inside = in_m < listed
        keys = tl.where(inside, keys, num_keys)
    code = tl.load(key_codes + batch * codes_b + head * codes_h + keys, mask=inside, other=0).to(tl.int32)[None, :]
    key_tile = load_tile(key + batch * k_b + kv_head * k_h, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
    value_tile = load_tile(
        value + batch * v_b + kv_head * v_h, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False
    )
    inside = inside[None, :]
    keep = 1.0
    if HAS_REGROUP:
        keep = tl.load(regroup + head)
        at_least = tl.load(regroup + num_heads + head)
        at_most = tl.load(regroup + 2 * num_heads + head)
    lse = lse[:, None] * LOG2_E
    plain = plain.to(tl.float32)

    logits = scores(query_tile, key_tile, scaling * LOG2_E, PRECISION)
    before = inside & (rows[:, None] >= 0)
    if CAUSAL:
        before = before & (keys[None, :] <= rows[:, None] + query_offset)
    mapped = mapped_logits(logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS)
    after = paired_visibility(
        before, inside, code, row_code, head, pair_heads, num_heads, NUM_PAIRS, PAIR_KEYS, PAIR_ROWS
    )
    old = tl.where(before, logits - lse, float("-inf"))
    new = tl.where(after, mapped - lse, float("-inf"))
    # A map may lift a key far above all others: everything is measured from the highest.
    highest = tl.maximum(0.0, tl.max(new, 1))[:, None]
    plain_weights = tl.exp2(old - highest)
    weights = tl.exp2(new - highest)
    one = tl.exp2(-highest)
    if NUM_MAPS + NUM_PAIRS > 0:
        # A key whose logit stays as it is changes nothing, not the difference of two roundings.
        total = one + tl.sum(tl.where(new == old, 0.0, weights - plain_weights), 1)[:, None]
    else:
        total = one
    safe = tl.where(total > 0, total, 1.0)
    rest_factor = tl.full([BLOCK_N, 1], 1.0, tl.float32)
    spent = weights
    if HAS_REGROUP:
        is_source = has_bit(code, SOURCE)
        source_mass = tl.sum(tl.where(is_source, weights, 0.0), 1)[:, None] / safe
        acts = row_inside[:, None]
        if GATE_OF != NO_BIT_IN_KERNEL:
            of_mass = tl.sum(tl.where(has_bit(code, GATE_OF), weights, 0.0), 1)[:, None] / safe
            acts = acts & (of_mass >= at_least)
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                share_mass = tl.sum(tl.where(has_bit(code, GATE_SHARE), weights, 0.0), 1)[:, None] / safe
                acts = acts & (share_mass <= at_most * of_mass)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & has_bit(row_code, REGROUP_ROW)
        if TARGET != NO_BIT_IN_KERNEL:
            is_target = has_bit(code, TARGET) & (is_source == 0)
            target_mass = tl.sum(tl.where(is_target, weights, 0.0), 1)[:, None] / safe
            acts = acts & (target_mass > SMALLEST_TARGET_IN_KERNEL)
            freed = tl.where(acts, (1 - keep) * source_mass, 0.0)
            target_factor = 1 + freed / tl.where(acts, target_mass, 1.0)
            spent = weights * tl.where(is_target, target_factor, 1.0)
        else:
            freed = tl.where(acts, (1 - keep) * source_mass, 0.0)
            # A source without mass frees nothing, and then nothing changes.
            rest_factor = tl.where(freed != 0, 1 + freed / tl.maximum(1 - source_mass, 1e-30), 1.0)
            spent = weights * rest_factor
        spent = tl.where(is_source, weights * tl.where(acts, keep, 1.0), spent)
    alpha = rest_factor * one / safe
    if NUM_MAPS + NUM_PAIRS > 0:
        change = tl.where(
            (new == old) & (spent == weights) & (alpha == 1), 0.0, spent / safe - plain_weights * (alpha / one)
        )
    else:
        change = spent - plain_weights * rest_factor
    size_before = tl.sqrt(tl.sum(plain * plain, 1))
    edited = matmul(change.to(value_tile.dtype), value_tile, plain * alpha, PRECISION)
    size_after = tl.sqrt(tl.sum(edited * edited, 1))
    # Where nothing is left of the mass, the remainder is noise.
    growing = tl.where(total > 0, alpha, float("inf"))
    growing = tl.max(growing, 1)
    sound = (growing * size_before <= growth * size_after) & (growing * smallest_remainder <= 1)
    unsound = tl.sum((row_inside & (sound == 0)).to(tl.int32)) > 0
    overflows = (listed > BLOCK_M) & (tl.sum(row_inside.to(tl.int32)) > 0)
    if FLAG_ROWS == BLOCK_N:
        tl.store(flags_base + row_tile, (unsound | overflows).to(tl.int32))
    elif unsound | overflows:
        tl.store(flags_base + row_tile * BLOCK_N // FLAG_ROWS, 1)
    if HAS_AFFINE:
        edited = with_affine(
            edited,
            row_code,
            head,
            batch,
            gain,
            gain_b,
            offset,
            offset_b,
            in_dv,
            HAS_OFFSET,
            AFFINE_ROW,
            DV,
        )
    tl.store(output_at, edited.to(output.dtype.element_ty), mask=output_mask)


def epilogue_(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    output: Tensor,
    log_sum_exp: Tensor,
    rows_per_flag: int,
    heads: Tensor | None = None,
    stop_row: int | None = None,
) -> Tensor:
    """Edits ``output`` ``(B, H, N, Dv)`` in place; returns the flagged row tiles ``(B, H, tiles)`` int32.

    ``output`` and ``log_sum_exp`` ``(B, H, N)`` (float32, natural, contiguous) are of plain attention on these inputs: causal
    or full, no mask, bias, window, softcap or sink logits. A flagged tile of ``rows_per_flag`` rows must be computed by other
    means. ``heads`` (h,) int32 restricts the work to some heads, ``stop_row`` to the rows before it.
    """
    query, key, value = (last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    listed, codes, rows, regroup = lowered.listed, lowered.key_codes, lowered.row_codes, lowered.regroup
    gain, offset = lowered.gain, lowered.offset
    block_n, warps = CONFIG
    # By head nothing is known on the host, and the widest tile is taken.
    width = MOST_KEYS if codes.shape[1] > 1 else min(MOST_KEYS, padded_size(lowered.summary.at_most))
    used_heads = num_heads if heads is None else len(heads)
    first, last = lowered.touched_rows(num_queries)
    last = last if stop_row is None else min(last, stop_row)
    # Those of all tiles are written.
    make = torch.empty if rows_per_flag == block_n and last - first == num_queries else torch.zeros
    flags = make(batch, num_heads, ceil_div(num_queries, rows_per_flag), dtype=torch.int32, device=query.device)
    if used_heads == 0 or first >= last:
        return flags
    launch(
        _epilogue,
        (used_heads, ceil_div(last, block_n) - first // block_n, batch),
        (
            query,
            key,
            value,
            output,
            log_sum_exp,
            flags,
            heads,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            first,
            last,
            key.shape[2],
            inputs.query_offset,
            inputs.scaling,
            codes,
            *strides_of(codes),
            rows,
            batch_stride(rows),
            listed.indices,
            *strides_of(listed.indices),
            codes.shape[-1],
            listed.counts,
            *strides_of(listed.counts),
            lowered.map_coefficients,
            lowered.pair_heads,
            None if regroup is None else regroup.coefficients,
            gain,
            batch_stride(gain),
            offset,
            batch_stride(offset),
            GROWTH,
            SMALLEST_REMAINDER,
        ),
        {
            "CAUSAL": inputs.causal,
            "HAS_ROW_CODES": rows is not None,
            **lowered.map_constants,
            **lowered.pair_constants,
            **lowered.regroup_constants,
            **lowered.affine_constants,
            "HAS_HEADS": heads is not None,
            "FLAG_ROWS": rows_per_flag,
            "D": head_dim,
            "DV": value_dim,
            "BLOCK_D": padded_size(head_dim),
            "BLOCK_DV": padded_size(value_dim),
            "BLOCK_N": block_n,
            "BLOCK_M": width,
            "PRECISION": "ieee",
        },
        warps,
    )
    return flags
