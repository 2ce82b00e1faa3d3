"""Edits on top of attention that somebody else computed: its output and log-sum-exp, and the few keys that are touched.

Where an edit touches few keys, plain attention over all keys is the vendor's business. With ``p[j]`` the plain weights and
``w[j]`` the edited ones before they are normalised again, both known from the log-sum-exp,

    o' = (o + sum over touched j of (w[j] - p[j]) v[j]) / (1 + sum of (w[j] - p[j]))

and a Regroup recombines partial outputs in the same way. Where mass is taken away this subtracts, and loses digits when
what is taken is nearly everything: a row tile whose rounding error would grow by more than ``GROWTH`` is flagged instead,
and ``edited_flash``, which never subtracts, computes the flagged tiles again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import _batch_stride, _last_contiguous, _padded, _strides, load_tile
from attn_kernels.edited_attention.lowering import NO_BIT, LoweredEdits
from attn_kernels.edited_attention.tiles import (
    LN_2,
    LOG2_E,
    has_bit,
    listed_before,
    mapped_logits,
    matmul,
    paired_visibility,
    scores,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# The output's own rounding error may grow by so much at most; beyond it the tile is computed again.
GROWTH = 1.5
# A remainder below this share of the mass is not told exactly by a float32 log-sum-exp.
SMALLEST_REMAINDER = 1 / 64
# Rows and keys of a tile, warps.
CONFIG = (64, 64, 4)


@triton.jit
def _listed_logits(
    query_tile,
    keys,
    in_d,
    rows,
    row_code,
    query_index,
    head,
    key_base,
    k_m,
    codes_base,
    to_log2,
    num_heads,
    num_keys,
    map_coefficients,
    pair_heads,
    CAUSAL: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Plain logits and visibility (R, C), the edited ones, the keys' codes (1, C), and which keys exist (C,)."""
    inside = keys < num_keys
    code = tl.load(codes_base + keys, mask=inside, other=0).to(tl.int32)[None, :]
    key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
    logits = scores(query_tile, key_tile, to_log2, PRECISION)
    before = inside[None, :] & (rows[:, None] >= 0)
    if CAUSAL:
        before = before & (keys[None, :] <= query_index[:, None])
    mapped = mapped_logits(logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS)
    after = paired_visibility(
        before, inside[None, :], code, row_code, head, pair_heads, num_heads, NUM_PAIRS, PAIR_KEYS, PAIR_ROWS
    )
    return logits, before, mapped, after, code, inside


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
    ROW_FILTER: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    IS_REGROUP: tl.constexpr,
    NUM_LISTS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
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
    row_tile = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(0)).to(tl.int64)
    else:
        head = tl.program_id(0).to(tl.int64)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < num_queries
    row_code = tl.zeros([BLOCK_N, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0).to(tl.int32)[:, None]
        if ROW_FILTER != 0:
            if tl.sum(((row_code & ROW_FILTER) != 0).to(tl.int32)) == 0:
                return
    kv_head = head // heads_per_kv
    query_index = rows + query_offset
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    output_at = output + batch * o_b + head * o_h + rows[:, None].to(tl.int64) * o_n + in_dv[None, :]
    output_mask = row_inside[:, None] & (in_dv[None, :] < DV)
    lse_at = log_sum_exp + (batch * num_heads + head) * num_queries + rows
    # Rows outside weigh nothing: exp2(-inf).
    lse = tl.load(lse_at, mask=row_inside, other=float("inf")) * LOG2_E
    query_tile = tl.load(
        query + batch * q_b + head * q_h + rows[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=row_inside[:, None] & (in_d[None, :] < D),
        other=0.0,
    )
    key_base = key + batch * k_b + kv_head * k_h
    value_base = value + batch * v_b + kv_head * v_h
    codes_base = key_codes + batch * codes_b + head * codes_h
    to_log2 = scaling * LOG2_E
    stop = num_keys
    if CAUSAL:
        stop = tl.minimum(num_keys, row_tile * BLOCK_N + BLOCK_N + query_offset)

    # What the vendor's output is multiplied by, and with it its rounding error.
    factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if IS_REGROUP:
        source_total = tl.zeros([BLOCK_N], tl.float32)
        target_total = tl.zeros([BLOCK_N], tl.float32)
        of_total = tl.zeros([BLOCK_N], tl.float32)
        share_total = tl.zeros([BLOCK_N], tl.float32)
        accumulator = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for kind in tl.static_range(NUM_LISTS):
            list_base = lists + batch * list_b + head * list_h + kind * list_length
            listed = tl.load(counts + batch * counts_b + head * counts_h + kind)
            if NUM_PAIRS == 0:
                listed = listed_before(list_base, listed, stop, BLOCK_M)
            # Keys that are neither source nor target matter to the gate alone.
            if kind > 0 or GATE_OF != NO_BIT_IN_KERNEL:
                for place in tl.range(0, listed, BLOCK_M):
                    at = place + in_m
                    keys = tl.load(list_base + at, mask=at < listed, other=num_keys)
                    _, _, mapped, after, code, inside = _listed_logits(
                        query_tile,
                        keys,
                        in_d,
                        rows,
                        row_code,
                        query_index,
                        head,
                        key_base,
                        k_m,
                        codes_base,
                        to_log2,
                        num_heads,
                        num_keys,
                        map_coefficients,
                        pair_heads,
                        CAUSAL,
                        NUM_MAPS,
                        MAP_KEYS,
                        MAP_ROWS,
                        NUM_PAIRS,
                        PAIR_KEYS,
                        PAIR_ROWS,
                        D,
                        BLOCK_D,
                        PRECISION,
                    )
                    weights = tl.where(after, tl.exp2(mapped - lse[:, None]), 0.0)
                    if GATE_OF != NO_BIT_IN_KERNEL:
                        of_total += tl.sum(tl.where(has_bit(code, GATE_OF), weights, 0.0), 1)
                    if GATE_SHARE != NO_BIT_IN_KERNEL:
                        share_total += tl.sum(tl.where(has_bit(code, GATE_SHARE), weights, 0.0), 1)
                    if kind == 1:
                        source_total += tl.sum(weights, 1)
                    if kind == 2:
                        target_total += tl.sum(weights, 1)
                        value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
                        accumulator = matmul(weights.to(value_tile.dtype), value_tile, accumulator, PRECISION)
        keep = tl.load(regroup + head)
        acts = row_inside
        if GATE_OF != NO_BIT_IN_KERNEL:
            acts = acts & (of_total >= tl.load(regroup + num_heads + head))
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                acts = acts & (share_total <= tl.load(regroup + 2 * num_heads + head) * of_total)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & (tl.sum(has_bit(row_code, REGROUP_ROW).to(tl.int32), 1) != 0)
        if HAS_TARGET:
            acts = acts & (target_total > 0)
        freed = tl.where(acts, (1 - keep) * source_total, 0.0)
        # A source without mass frees nothing, and then nothing changes.
        acts = freed != 0
        plain = tl.load(output_at, mask=output_mask, other=0.0).to(tl.float32)
        size_before = tl.sqrt(tl.sum(plain * plain, 1))
        if HAS_TARGET:
            accumulator = plain + accumulator * (freed / tl.where(acts, target_total, 1.0))[:, None]
        else:
            factor = tl.where(acts, 1 + freed / tl.maximum(1 - source_total, 1e-30), 1.0)
            accumulator = plain * factor[:, None]
        change = tl.where(acts, keep - factor, 0.0)
        list_base = lists + batch * list_b + head * list_h + list_length
        listed = tl.load(counts + batch * counts_b + head * counts_h + 1)
        if NUM_PAIRS == 0:
            listed = listed_before(list_base, listed, stop, BLOCK_M)
        for place in tl.range(0, listed, BLOCK_M):
            at = place + in_m
            keys = tl.load(list_base + at, mask=at < listed, other=num_keys)
            _, _, mapped, after, _, inside = _listed_logits(
                query_tile,
                keys,
                in_d,
                rows,
                row_code,
                query_index,
                head,
                key_base,
                k_m,
                codes_base,
                to_log2,
                num_heads,
                num_keys,
                map_coefficients,
                pair_heads,
                CAUSAL,
                NUM_MAPS,
                MAP_KEYS,
                MAP_ROWS,
                NUM_PAIRS,
                PAIR_KEYS,
                PAIR_ROWS,
                D,
                BLOCK_D,
                PRECISION,
            )
            weights = tl.where(after, tl.exp2(mapped - lse[:, None]), 0.0) * change[:, None]
            value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
            accumulator = matmul(weights.to(value_tile.dtype), value_tile, accumulator, PRECISION)
        edited = accumulator
    else:
        accumulator = tl.load(output_at, mask=output_mask, other=0.0).to(tl.float32)
        size_before = tl.sqrt(tl.sum(accumulator * accumulator, 1))
        total = tl.full([BLOCK_N], 1.0, tl.float32)
        highest = tl.zeros([BLOCK_N], tl.float32)
        for kind in tl.static_range(NUM_LISTS):
            list_base = lists + batch * list_b + head * list_h + kind * list_length
            listed = tl.load(counts + batch * counts_b + head * counts_h + kind)
            if NUM_PAIRS == 0:
                listed = listed_before(list_base, listed, stop, BLOCK_M)
            for place in tl.range(0, listed, BLOCK_M):
                at = place + in_m
                keys = tl.load(list_base + at, mask=at < listed, other=num_keys)
                logits, before, mapped, after, _, inside = _listed_logits(
                    query_tile,
                    keys,
                    in_d,
                    rows,
                    row_code,
                    query_index,
                    head,
                    key_base,
                    k_m,
                    codes_base,
                    to_log2,
                    num_heads,
                    num_keys,
                    map_coefficients,
                    pair_heads,
                    CAUSAL,
                    NUM_MAPS,
                    MAP_KEYS,
                    MAP_ROWS,
                    NUM_PAIRS,
                    PAIR_KEYS,
                    PAIR_ROWS,
                    D,
                    BLOCK_D,
                    PRECISION,
                )
                old = tl.where(before, logits - lse[:, None], float("-inf"))
                new = tl.where(after, mapped - lse[:, None], float("-inf"))
                new_highest = tl.maximum(highest, tl.max(new, 1))
                shrink = tl.exp2(highest - new_highest)
                # A key whose logit stays as it is counts nothing, not the difference of two roundings.
                change = tl.where(
                    new == old, 0.0, tl.exp2(new - new_highest[:, None]) - tl.exp2(old - new_highest[:, None])
                )
                value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
                total = total * shrink + tl.sum(change, 1)
                accumulator = accumulator * shrink[:, None]
                accumulator = matmul(change.to(value_tile.dtype), value_tile, accumulator, PRECISION)
                highest = new_highest
        safe = tl.where(total > 0, total, 1.0)
        # Nothing left of the mass: the remainder is noise, and the tile must be computed again.
        factor = tl.where(total > 0, tl.exp2(-highest) / safe, float("inf"))
        edited = accumulator / safe[:, None]
        tl.store(lse_at, (lse + tl.log2(safe) + highest) * LN_2, mask=row_inside)

    size_after = tl.sqrt(tl.sum(edited * edited, 1))
    sound = (factor * size_before <= growth * size_after) & (factor * smallest_remainder <= 1)
    if tl.sum((row_inside & (sound == 0)).to(tl.int32)) > 0:
        flag_tiles = tl.cdiv(num_queries, FLAG_ROWS)
        tl.store(flags + (batch * num_heads + head) * flag_tiles + row_tile * BLOCK_N // FLAG_ROWS, 1)
    if HAS_AFFINE:
        scale = tl.load(gain + batch * gain_b + head)
        affine = tl.where(scale == 0, 0.0, edited * scale)
        if HAS_OFFSET:
            affine += tl.load(
                offset + batch * offset_b + head * DV + in_dv[None, :], mask=in_dv[None, :] < DV, other=0.0
            )
        if AFFINE_ROW != NO_BIT_IN_KERNEL:
            affine = tl.where(has_bit(row_code, AFFINE_ROW), affine, edited)
        edited = affine
    tl.store(output_at, edited.to(output.dtype.element_ty), mask=output_mask)


def epilogue_(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    output: Tensor,
    log_sum_exp: Tensor,
    rows_per_flag: int,
    heads: Tensor | None = None,
) -> Tensor:
    """Edits ``output`` ``(B, H, N, Dv)`` in place; returns the flagged row tiles ``(B, H, tiles)`` int32.

    ``output`` and ``log_sum_exp`` ``(B, H, N)`` (float32, natural, contiguous; overwritten) are of plain attention on these
    inputs: causal or full, no mask, bias, window, softcap or sink logits. A flagged tile of ``rows_per_flag`` rows has lost
    digits and must be computed by other means. ``heads`` (h,) int32 restricts the work to some heads.
    """
    query, key, value = (_last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, num_queries, _ = query.shape
    flags = torch.zeros(
        batch, num_heads, triton.cdiv(num_queries, rows_per_flag), dtype=torch.int32, device=query.device
    )
    if lowered.edits_logits:
        is_last = lowered.regroup is None
        _launch(inputs, query, key, value, lowered, output, log_sum_exp, flags, rows_per_flag, heads, False, is_last)
    if lowered.regroup is not None:
        _launch(inputs, query, key, value, lowered, output, log_sum_exp, flags, rows_per_flag, heads, True, True)
    return flags


def _launch(
    inputs: AttentionInputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lowered: LoweredEdits,
    output: Tensor,
    log_sum_exp: Tensor,
    flags: Tensor,
    rows_per_flag: int,
    heads: Tensor | None,
    is_regroup: bool,
    is_last: bool,
) -> None:
    batch, num_heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    listed, codes, rows, regroup = lowered.listed, lowered.key_codes, lowered.row_codes, lowered.regroup
    has_affine = lowered.gain is not None and is_last
    has_target = regroup is not None and regroup.target != NO_BIT
    block_n, block_m, warps = CONFIG
    _epilogue[(num_heads if heads is None else len(heads), triton.cdiv(num_queries, block_n), batch)](
        query,
        key,
        value,
        output,
        log_sum_exp,
        flags,
        None if heads is None else heads,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        num_heads,
        num_heads // key.shape[1],
        num_queries,
        key.shape[2],
        inputs.query_offset,
        inputs.scaling,
        codes,
        *_strides(codes),
        None if rows is None else rows,
        0 if rows is None else _batch_stride(rows),
        listed.indices,
        *_strides(listed.indices),
        codes.shape[-1],
        listed.counts,
        *_strides(listed.counts),
        lowered.map_coefficients,
        lowered.pair_heads,
        None if regroup is None else regroup.coefficients,
        lowered.gain if has_affine else None,
        _batch_stride(lowered.gain) if has_affine and lowered.gain is not None else 0,
        lowered.offset if has_affine and lowered.offset is not None else None,
        _batch_stride(lowered.offset) if has_affine and lowered.offset is not None else 0,
        GROWTH,
        SMALLEST_REMAINDER,
        CAUSAL=inputs.causal,
        HAS_ROW_CODES=rows is not None,
        ROW_FILTER=_row_filter(lowered, is_regroup, has_affine),
        NUM_MAPS=lowered.num_maps,
        MAP_KEYS=lowered.map_keys,
        MAP_ROWS=lowered.map_rows,
        NUM_PAIRS=lowered.num_pairs,
        PAIR_KEYS=lowered.pair_keys,
        PAIR_ROWS=lowered.pair_rows,
        IS_REGROUP=is_regroup,
        NUM_LISTS=1 if regroup is None else 3 if has_target else 2,
        HAS_TARGET=has_target,
        GATE_OF=NO_BIT if regroup is None else regroup.gate_of,
        GATE_SHARE=NO_BIT if regroup is None else regroup.gate_share,
        REGROUP_ROW=NO_BIT if regroup is None else regroup.row,
        HAS_AFFINE=has_affine,
        HAS_OFFSET=has_affine and lowered.offset is not None,
        AFFINE_ROW=lowered.affine_row,
        HAS_HEADS=heads is not None,
        FLAG_ROWS=rows_per_flag,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=_padded(head_dim),
        BLOCK_DV=_padded(value_dim),
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        PRECISION="ieee",
        num_warps=warps,
    )


def _row_filter(lowered: LoweredEdits, is_regroup: bool, has_affine: bool) -> int:
    """Bits of which a row needs one to be touched by this launch; 0 if some edit touches every row."""
    bits = [lowered.affine_row] if has_affine else []
    if is_regroup and lowered.regroup is not None:
        bits.append(lowered.regroup.row)
    else:
        bits += [lowered.map_rows >> (4 * term) & 15 for term in range(lowered.num_maps)]
        bits += [lowered.pair_rows >> (4 * pair) & 15 for pair in range(lowered.num_pairs)]
    return 0 if NO_BIT in bits else sum(1 << bit for bit in set(bits))
