"""Edited flash: exact attention of many queries under any lowered edits, in one pass over the keys.

Source of the algorithm: FlashAttention-2 (Dao 2023, arXiv 2307.08691), with three additions.

Keys that no edit touches go through the plain loop. Tiles are told apart before by a flag, as causal kernels treat the
diagonal, so that an untouched tile costs what it costs in plain attention. The touched keys come afterwards from index
lists: first those whose logits or visibility an edit changes, then a Regroup's source, then its target. Each class has
an accumulator of its own, so that nothing is ever subtracted: a source that holds nearly all of a row's mass costs no
digits. The end of the program resolves the gate, moves the freed mass, and applies gain and offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.launch import (
    batch_stride,
    can_overlap,
    ceil_div,
    last_contiguous,
    launch,
    padded_size,
    strides_of,
)
from attn_kernels.edited_attention.lowering import NO_BIT, TILE, LoweredEdits
from attn_kernels.edited_attention.tiles import (
    LN_2,
    LOG2_E,
    SMALLEST_TARGET_IN_KERNEL,
    capped,
    has_bit,
    listed_before,
    mapped_logits,
    matmul,
    paired_visibility,
    scores,
    with_affine,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# The running maximum starts here, not at minus infinity, so that a row that sees nothing meets no inf - inf.
LOWEST_MAXIMUM = tl.constexpr(-1.0e30)


@triton.jit
def accumulate(logits, scale, value, accumulator, total, highest, PRECISION: tl.constexpr):
    """One step of the online softmax: the new accumulator, total, running maximum, and what this step did.

    ``logits * scale`` is in units of log2; the product costs nothing inside the exponential's multiply and add.
    """
    new_highest = tl.maximum(highest, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = matmul(weights.to(value.dtype), value, accumulator, PRECISION)
    return accumulator, total, new_highest, shrink, weights


@triton.jit
def load_tile(base, at, in_d, SIZE: tl.constexpr, BLOCK: tl.constexpr, inside, TRANSPOSED: tl.constexpr):
    """Rows at the element offsets ``at`` (C,) of a matrix whose rows are contiguous: (C, D), or (D, C) transposed."""
    if TRANSPOSED:
        place = base + at[None, :] + in_d[:, None]
        inside = inside[None, :]
        if SIZE != BLOCK:
            inside = inside & (in_d[:, None] < SIZE)
    else:
        place = base + at[:, None] + in_d[None, :]
        inside = inside[:, None]
        if SIZE != BLOCK:
            inside = inside & (in_d[None, :] < SIZE)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def load_whole_tile(base, at, in_d, SIZE: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """As ``load_tile`` where every row is inside, so that no mask is needed."""
    if TRANSPOSED:
        place = base + at[None, :] + in_d[:, None]
        if SIZE != BLOCK:
            return tl.load(place, mask=in_d[:, None] < SIZE, other=0.0)
    else:
        place = base + at[:, None] + in_d[None, :]
        if SIZE != BLOCK:
            return tl.load(place, mask=in_d[None, :] < SIZE, other=0.0)
    return tl.load(place)


@triton.jit
def _allowed(
    batch,
    head,
    rows,
    keys,
    query_index,
    num_queries,
    num_keys,
    window,
    key_valid,
    valid_stride,
    mask,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    query_value,
    key_value,
    query_value_stride,
    key_value_stride,
    order_heads,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
):
    """Which of ``keys`` (C,) each of ``rows`` (R,) may see, before allow and deny pairs: (R, C); real keys: (1, C)."""
    inside = keys < num_keys
    valid = inside
    if HAS_VALID:
        valid = tl.load(key_valid + batch * valid_stride + keys, mask=inside, other=0) != 0
    bias = tl.zeros([rows.shape[0], keys.shape[0]], tl.float32)
    if HAS_MASK:
        given = tl.load(
            mask
            + batch * mask_stride_b
            + head * mask_stride_h
            + rows[:, None].to(tl.int64) * mask_stride_n
            + keys[None, :].to(tl.int64) * mask_stride_m,
            mask=(rows[:, None] < num_queries) & inside[None, :],
            other=0,
        )
        if MASK_IS_BIAS:
            shown = given.to(tl.float32) > LOWEST
            bias = tl.where(shown, given.to(tl.float32) * LOG2_E, 0.0)
            visible = shown & inside[None, :]
        else:
            visible = (given != 0) & inside[None, :]
    else:
        visible = valid[None, :] & (rows[:, None] >= 0)
        if CAUSAL:
            visible = visible & (keys[None, :] <= query_index[:, None])
        if HAS_WINDOW:
            visible = visible & (keys[None, :] > query_index[:, None] - window)
    if HAS_VALUES:
        of_query = tl.load(query_value + batch * query_value_stride + rows, mask=rows < num_queries, other=0)
        of_key = tl.load(key_value + batch * key_value_stride + keys, mask=inside, other=0)
        by_value = (of_key[None, :] <= of_query[:, None]) & valid[None, :]
        if HAS_ORDER_HEADS:
            if tl.load(order_heads + head) != 0:
                visible = by_value
        else:
            visible = by_value
    return visible, valid[None, :], bias


@triton.jit
def _listed_logits(
    query_tile,
    keys,
    in_d,
    rows,
    row_code,
    query_index,
    batch,
    head,
    key_base,
    k_m,
    codes_base,
    to_log2,
    softcap,
    num_heads,
    num_queries,
    num_keys,
    window,
    key_valid,
    valid_stride,
    mask,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    query_value,
    key_value,
    query_value_stride,
    key_value_stride,
    order_heads,
    map_coefficients,
    pair_heads,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
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
    """Edited logits (R, C) of touched keys ``keys`` (C,), minus infinity where invisible, with the keys' codes."""
    inside = keys < num_keys
    code = tl.load(codes_base + keys, mask=inside, other=0).to(tl.int32)
    key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
    logits = capped(scores(query_tile, key_tile, to_log2, PRECISION), softcap, HAS_SOFTCAP)
    visible, valid, bias = _allowed(
        batch,
        head,
        rows,
        keys,
        query_index,
        num_queries,
        num_keys,
        window,
        key_valid,
        valid_stride,
        mask,
        mask_stride_b,
        mask_stride_h,
        mask_stride_n,
        mask_stride_m,
        query_value,
        key_value,
        query_value_stride,
        key_value_stride,
        order_heads,
        CAUSAL,
        HAS_WINDOW,
        HAS_VALID,
        HAS_MASK,
        MASK_IS_BIAS,
        LOWEST,
        HAS_VALUES,
        HAS_ORDER_HEADS,
    )
    if MASK_IS_BIAS:
        logits += bias
    logits = mapped_logits(
        logits, code[None, :], row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS
    )
    visible = paired_visibility(
        visible, valid, code[None, :], row_code, head, pair_heads, num_heads, NUM_PAIRS, PAIR_KEYS, PAIR_ROWS
    )
    return tl.where(visible, logits, float("-inf")), code, inside


@triton.jit
def _edited_flash(
    query,
    key,
    value,
    output,
    log_sum_exp,
    heads,
    row_tiles,
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
    stop_row,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    key_valid,
    valid_stride,
    mask,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    sinks,
    sinks_stride_b,
    sinks_stride_h,
    sinks_stride_n,
    query_value,
    key_value,
    query_value_stride,
    key_value_stride,
    order_heads,
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
    tile_flags,
    flags_b,
    flags_h,
    num_flags,
    skips,
    skips_b,
    untouched_bias,
    bias_b,
    map_coefficients,
    pair_heads,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    class_codes,
    class_bias,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    NUM_LISTS: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    CLASS_BITS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FLAG_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    if OVERLAPS:
        # Programs are there already when the flags are.
        tl.extra.cuda.gdc_wait()
    # The longest programs, those of the last rows, start first.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    else:
        head = tl.program_id(1).to(tl.int64)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < stop_row
    row_code = tl.zeros([BLOCK_N, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0).to(tl.int32)[:, None]
    if ONLY_FLAGGED and tl.load(row_tiles + (batch * num_heads + head) * tl.cdiv(num_queries, BLOCK_N) + row_tile) == 0:
        return
    kv_head = head // heads_per_kv
    query_index = rows + query_offset
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    query_tile = tl.load(
        query + batch * q_b + head * q_h + rows[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=row_inside[:, None] & (in_d[None, :] < D),
        other=0.0,
    )
    key_base = key + batch * k_b + kv_head * k_h
    value_base = value + batch * v_b + kv_head * v_h
    if HAS_CODES:
        codes_base = key_codes + batch * codes_b + head * codes_h
        flags_base = tile_flags + batch * flags_b + head * flags_h
    to_log2 = scaling * LOG2_E
    accumulator = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.full([BLOCK_N], LOWEST_MAXIMUM, tl.float32)

    # Keys that a row of this tile may see by index: all of them where a mask or an order value decides.
    stop = num_keys
    start = 0
    inner_stop = 0
    if CAUSAL and not HAS_MASK and not HAS_VALUES:
        stop = tl.minimum(num_keys, row_tile * BLOCK_N + BLOCK_N + query_offset)
        inner_stop = tl.minimum(row_tile * BLOCK_N + query_offset + 1, num_keys) // BLOCK_M * BLOCK_M
        if HAS_WINDOW:
            start = tl.maximum(0, row_tile * BLOCK_N + query_offset - window + 1) // BLOCK_M * BLOCK_M
    elif not HAS_MASK and not HAS_VALUES and not HAS_WINDOW:
        inner_stop = num_keys // BLOCK_M * BLOCK_M
    inner_stop = tl.maximum(inner_stop, start)

    # Without a softcap the scaling is left to the exponential.
    scale_now = to_log2 if HAS_SOFTCAP else 1.0
    scale_later = 1.0 if HAS_SOFTCAP else to_log2
    in_key_tile = in_m * k_m
    in_value_tile = in_m * v_m
    # Tiles that an edit touches in full, if they lie together, are left out: the lists have their keys.
    num_tiles = inner_stop // BLOCK_M
    left_out = num_tiles
    width = 0
    if HAS_SKIP:
        left_out = tl.load(skips + batch * skips_b)
        width = tl.maximum(0, tl.minimum(tl.load(skips + batch * skips_b + 1), num_tiles) - left_out)
    for place in tl.range(start // BLOCK_M, num_tiles - width, num_stages=STAGES):
        first = place * BLOCK_M
        if HAS_SKIP:
            first += tl.where(place >= left_out, width * BLOCK_M, 0)
        key_tile = load_whole_tile(key_base + first * k_m.to(tl.int64), in_key_tile, in_d, D, BLOCK_D, True)
        logits = capped(scores(query_tile, key_tile, scale_now, PRECISION), softcap, HAS_SOFTCAP)
        if HAS_CODES:
            if HAS_BIAS:
                logits += tl.load(untouched_bias + batch * bias_b + first + in_m)[None, :]
            else:
                flag = 0
                for part in tl.static_range(BLOCK_M // FLAG_TILE):
                    at = first // FLAG_TILE + part
                    flag += tl.load(flags_base + at, mask=at < num_flags, other=0).to(tl.int32)
                if flag != 0:
                    keys = first + in_m
                    code = tl.load(codes_base + keys, mask=keys < list_length, other=0)
                    logits = tl.where((code == 0)[None, :], logits, float("-inf"))
        if HAS_VALID:
            valid = tl.load(key_valid + batch * valid_stride + first + in_m) != 0
            logits += tl.where(valid, 0.0, float("-inf"))[None, :]
        if HAS_WINDOW:
            logits = tl.where((first + in_m)[None, :] > query_index[:, None] - window, logits, float("-inf"))
        value_tile = load_whole_tile(value_base + first * v_m.to(tl.int64), in_value_tile, in_dv, DV, BLOCK_DV, False)
        accumulator, total, highest, _, _ = accumulate(
            logits, scale_later, value_tile, accumulator, total, highest, PRECISION
        )

    for first in tl.range(inner_stop, stop, BLOCK_M, num_stages=1):
        keys = first + in_m
        inside = keys < num_keys
        key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
        logits = capped(scores(query_tile, key_tile, to_log2, PRECISION), softcap, HAS_SOFTCAP)
        visible, valid, bias = _allowed(
            batch,
            head,
            rows,
            keys,
            query_index,
            num_queries,
            num_keys,
            window,
            key_valid,
            valid_stride,
            mask,
            mask_stride_b,
            mask_stride_h,
            mask_stride_n,
            mask_stride_m,
            query_value,
            key_value,
            query_value_stride,
            key_value_stride,
            order_heads,
            CAUSAL,
            HAS_WINDOW,
            HAS_VALID,
            HAS_MASK,
            MASK_IS_BIAS,
            LOWEST,
            HAS_VALUES,
            HAS_ORDER_HEADS,
        )
        if MASK_IS_BIAS:
            logits += bias
        if HAS_CODES:
            code = tl.load(codes_base + keys, mask=keys < list_length, other=0)
            visible = visible & (code == 0)[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
        accumulator, total, highest, _, _ = accumulate(logits, 1.0, value_tile, accumulator, total, highest, PRECISION)

    if HAS_CODES:
        source_total = tl.zeros([BLOCK_N], tl.float32)
        target_total = tl.zeros([BLOCK_N], tl.float32)
        of_total = tl.zeros([BLOCK_N], tl.float32)
        share_total = tl.zeros([BLOCK_N], tl.float32)
        if HAS_TARGET:
            target_accumulator = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        # The keys that an edit of the logits touches, the source, the target, in this order.
        for kind in tl.static_range(NUM_LISTS):
            listed = tl.load(counts + batch * counts_b + head * counts_h + kind)
            list_base = lists + batch * list_b + head * list_h + kind * list_length
            if NUM_PAIRS == 0:
                # The future is left out; an allow pair may show it.
                listed = listed_before(list_base, listed, stop, BLOCK_M)
            for place in tl.range(0, listed, BLOCK_M):
                at = place + in_m
                keys = tl.load(list_base + at, mask=at < listed, other=num_keys)
                logits, code, inside = _listed_logits(
                    query_tile,
                    keys,
                    in_d,
                    rows,
                    row_code,
                    query_index,
                    batch,
                    head,
                    key_base,
                    k_m,
                    codes_base,
                    to_log2,
                    softcap,
                    num_heads,
                    num_queries,
                    num_keys,
                    window,
                    key_valid,
                    valid_stride,
                    mask,
                    mask_stride_b,
                    mask_stride_h,
                    mask_stride_n,
                    mask_stride_m,
                    query_value,
                    key_value,
                    query_value_stride,
                    key_value_stride,
                    order_heads,
                    map_coefficients,
                    pair_heads,
                    CAUSAL,
                    HAS_WINDOW,
                    HAS_VALID,
                    HAS_MASK,
                    MASK_IS_BIAS,
                    LOWEST,
                    HAS_SOFTCAP,
                    HAS_VALUES,
                    HAS_ORDER_HEADS,
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
                for number in tl.static_range(NUM_CLASSES):
                    of_rows = tl.load(
                        class_bias + ((batch * num_heads + head) * NUM_CLASSES + number) * num_queries + rows,
                        mask=row_inside,
                        other=0.0,
                    )
                    in_class = (code & CLASS_BITS) == tl.load(class_codes + number)
                    logits += tl.where(in_class[None, :], of_rows[:, None], 0.0)
                if kind == 1:
                    # Only the source's mass for now; its values come when it is known what it keeps.
                    new_highest = tl.maximum(highest, tl.max(logits, 1))
                    weights = tl.exp2(logits - new_highest[:, None])
                    shrink = tl.exp2(highest - new_highest)
                    source_total = source_total * shrink + tl.sum(weights, 1)
                    accumulator = accumulator * shrink[:, None]
                    total = total * shrink
                    highest = new_highest
                else:
                    value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
                    if kind == 0:
                        accumulator, total, highest, shrink, weights = accumulate(
                            logits, 1.0, value_tile, accumulator, total, highest, PRECISION
                        )
                    else:
                        target_accumulator, target_total, highest, shrink, weights = accumulate(
                            logits, 1.0, value_tile, target_accumulator, target_total, highest, PRECISION
                        )
                        accumulator = accumulator * shrink[:, None]
                        total = total * shrink
                        source_total = source_total * shrink
                if GATE_OF != NO_BIT_IN_KERNEL:
                    in_gate = has_bit(code, GATE_OF)[None, :]
                    of_total = of_total * shrink + tl.sum(tl.where(in_gate, weights, 0.0), 1)
                if GATE_SHARE != NO_BIT_IN_KERNEL:
                    in_gate = has_bit(code, GATE_SHARE)[None, :]
                    share_total = share_total * shrink + tl.sum(tl.where(in_gate, weights, 0.0), 1)

    everything = total
    if HAS_REGROUP:
        everything = total + source_total + target_total
    if HAS_SINKS:
        sink = LOG2_E * tl.load(
            sinks + batch * sinks_stride_b + head * sinks_stride_h + rows * sinks_stride_n,
            mask=row_inside,
            other=float("-inf"),
        ).to(tl.float32)
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        everything = everything * shrink + tl.exp2(sink - new_highest)
        accumulator = accumulator * shrink[:, None]
        total = total * shrink
        if HAS_REGROUP:
            source_total = source_total * shrink
            target_total = target_total * shrink
            of_total = of_total * shrink
            share_total = share_total * shrink
            if HAS_TARGET:
                target_accumulator = target_accumulator * shrink[:, None]
        highest = new_highest
    # A row that sees no key gives zeros.
    whole = tl.where(everything > 0, everything, 1.0)
    if HAS_REGROUP:
        keep = tl.load(regroup + head)
        if HAS_TARGET:
            acts = target_total > SMALLEST_TARGET_IN_KERNEL * whole
        else:
            acts = total > SMALLEST_TARGET_IN_KERNEL * whole
        if GATE_OF != NO_BIT_IN_KERNEL:
            acts = acts & (of_total >= tl.load(regroup + num_heads + head) * whole)
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                acts = acts & (share_total <= tl.load(regroup + 2 * num_heads + head) * of_total)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & (tl.sum(has_bit(row_code, REGROUP_ROW).to(tl.int32), 1) != 0)
        freed = tl.where(acts, (1 - keep) * source_total, 0.0) / whole
        if HAS_TARGET:
            # The target's mean output times its new mass; its old mass may be tiny beside what it receives.
            share = target_total / whole + freed
            safe = tl.where(target_total > 0, target_total, 1.0)
            accumulator = accumulator / whole[:, None] + target_accumulator * (share / safe)[:, None]
        else:
            share = total / whole + freed
            safe = tl.where(total > 0, total, 1.0)
            accumulator = accumulator * (share / safe)[:, None]
        kept = tl.where(acts, keep, 1.0) / whole
        listed = tl.load(counts + batch * counts_b + head * counts_h + 1)
        list_base = lists + batch * list_b + head * list_h + list_length
        if NUM_PAIRS == 0:
            listed = listed_before(list_base, listed, stop, BLOCK_M)
        for place in tl.range(0, listed, BLOCK_M):
            at = place + in_m
            keys = tl.load(list_base + at, mask=at < listed, other=num_keys)
            logits, code, inside = _listed_logits(
                query_tile,
                keys,
                in_d,
                rows,
                row_code,
                query_index,
                batch,
                head,
                key_base,
                k_m,
                codes_base,
                to_log2,
                softcap,
                num_heads,
                num_queries,
                num_keys,
                window,
                key_valid,
                valid_stride,
                mask,
                mask_stride_b,
                mask_stride_h,
                mask_stride_n,
                mask_stride_m,
                query_value,
                key_value,
                query_value_stride,
                key_value_stride,
                order_heads,
                map_coefficients,
                pair_heads,
                CAUSAL,
                HAS_WINDOW,
                HAS_VALID,
                HAS_MASK,
                MASK_IS_BIAS,
                LOWEST,
                HAS_SOFTCAP,
                HAS_VALUES,
                HAS_ORDER_HEADS,
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
            value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
            weights = tl.exp2(logits - highest[:, None]) * kept[:, None]
            accumulator = matmul(weights.to(value_tile.dtype), value_tile, accumulator, PRECISION)
    else:
        accumulator = accumulator / whole[:, None]
    if HAS_AFFINE:
        accumulator = with_affine(
            accumulator,
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
    tl.store(
        output + batch * o_b + head * o_h + rows[:, None].to(tl.int64) * o_n + in_dv[None, :],
        accumulator.to(output.dtype.element_ty),
        mask=row_inside[:, None] & (in_dv[None, :] < DV),
    )
    if WRITE_LSE:
        tl.store(
            log_sum_exp + (batch * num_heads + head) * num_queries + rows,
            tl.where(everything > 0, (highest + tl.log2(whole)) * LN_2, float("-inf")),
            mask=row_inside,
        )


# Rows and keys of a tile, warps and pipeline stages, by padded head size. Chosen on an H200 for
# head size 128 at 2K and 8K tokens: two programs of 4 warps on a multiprocessor rather than one of 8.
CONFIGS: dict[int, tuple[int, int, int, int]] = {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2)}


@dataclass(frozen=True)
class KeyClasses:
    """What each row adds to the logits of keys by their codes: after all edits of the logits, before the softmax.

    Attributes:
        codes: ``(C,)`` int32, none of them 0: those of the keys' code bits ``bits`` that make a class.
        bias: ``(B, H, C, N)`` float32, in units of log2; may be minus infinity.
    """

    bits: int
    codes: Tensor
    bias: Tensor


def edited_flash(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    heads: Tensor | None = None,
    output: Tensor | None = None,
    row_tiles: Tensor | None = None,
    with_log_sum_exp: bool = False,
    stop_row: int | None = None,
    config: tuple[int, int, int, int] | None = None,
    classes: KeyClasses | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output ``(B, H, N, Dv)`` in the value's dtype and, on request, the log-sum-exp ``(B, H, N)`` float32, natural.

    ``heads`` (h,) int32 restricts the work to some heads; the others' output is left as ``output`` has it. ``row_tiles``
    ``(B, H, tiles)`` int32 restricts it to the row tiles that are not 0 (``config_of`` says how many rows one has) and may
    still be written by the launch before,
    ``stop_row`` to the rows before it. ``classes``: what each row adds to the logits of touched keys; not with a Regroup.
    Inputs need a contiguous last dimension. All primitives but Sparsity; dropout is not applied.
    """
    query, key, value = (last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys, value_dim = key.shape[2], value.shape[3]
    if output is None:
        output = value.new_empty(batch, num_queries, num_heads, value_dim).transpose(1, 2)
    log_sum_exp = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32) if with_log_sum_exp else None
    block_d, block_dv = padded_size(head_dim), padded_size(value_dim)
    block_n, block_m, warps, stages = config or config_of(query.dtype, max(block_d, block_dv))
    given = inputs.mask if inputs.mask is not None else inputs.bias
    if given is not None:
        given = given.expand(batch, num_heads, -1, -1)
    listed = lowered.listed if lowered.key_codes.shape[-1] and lowered.edits_weights else None
    tiles = None
    if listed is not None and lowered.key_codes.shape[1] == 1 and given is None and inputs.window is None:
        tiles = lowered.untouched(num_keys, block_m)
    codes, rows, regroup = lowered.key_codes, lowered.row_codes, lowered.regroup
    sinks = None if inputs.sink_logits is None else inputs.sink_logits.expand(batch, num_heads, num_queries)
    values = lowered.order_values
    valid = inputs.key_valid if inputs.padded else None
    stop_row = num_queries if stop_row is None else stop_row
    grid = (ceil_div(stop_row, block_n), num_heads if heads is None else len(heads), batch)
    overlaps = row_tiles is not None and can_overlap(query.device)
    launch(
        _edited_flash,
        grid,
        (
            query,
            key,
            value,
            output,
            None if log_sum_exp is None else log_sum_exp,
            None if heads is None else heads,
            None if row_tiles is None else row_tiles,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            stop_row,
            num_keys,
            inputs.query_offset,
            inputs.scaling,
            inputs.softcap or 0.0,
            inputs.window or 0,
            None if valid is None else valid,
            batch_stride(valid),
            None if given is None else given,
            *((0, 0, 0, 0) if given is None else given.stride()),
            None if sinks is None else sinks,
            *((0, 0, 0) if sinks is None else sinks.stride()),
            None if values is None else values[0],
            None if values is None else values[1],
            0 if values is None else batch_stride(values[0]),
            0 if values is None else batch_stride(values[1]),
            None if lowered.order_heads is None else lowered.order_heads,
            codes,
            *strides_of(codes),
            None if rows is None else rows,
            batch_stride(rows),
            None if listed is None else listed.indices,
            *((0, 0) if listed is None else strides_of(listed.indices)),
            codes.shape[-1],
            None if listed is None else listed.counts,
            *((0, 0) if listed is None else strides_of(listed.counts)),
            None if listed is None else listed.tile_flags,
            *((0, 0) if listed is None else strides_of(listed.tile_flags)),
            0 if listed is None else listed.tile_flags.shape[-1],
            None if tiles is None else tiles.skips,
            0 if tiles is None else batch_stride(tiles.skips),
            None if tiles is None else tiles.bias,
            0 if tiles is None else batch_stride(tiles.bias),
            lowered.map_coefficients,
            lowered.pair_heads,
            None if regroup is None else regroup.coefficients,
            None if lowered.gain is None else lowered.gain,
            batch_stride(lowered.gain),
            None if lowered.offset is None else lowered.offset,
            batch_stride(lowered.offset),
            None if classes is None else classes.codes,
            None if classes is None else classes.bias,
        ),
        {
            "CAUSAL": inputs.causal,
            "HAS_WINDOW": inputs.window is not None,
            "HAS_VALID": valid is not None,
            "HAS_MASK": given is not None,
            "MASK_IS_BIAS": inputs.mask is None and inputs.bias is not None,
            "LOWEST": 0.0 if inputs.bias is None else torch.finfo(inputs.bias.dtype).min / 2,
            "HAS_SOFTCAP": inputs.softcap is not None,
            "HAS_SINKS": sinks is not None,
            "HAS_VALUES": values is not None,
            "HAS_ORDER_HEADS": lowered.order_heads is not None,
            "HAS_ROW_CODES": rows is not None,
            "HAS_CODES": listed is not None,
            "HAS_SKIP": tiles is not None and tiles.leaves_out,
            "HAS_BIAS": tiles is not None,
            **lowered.map_constants,
            **lowered.pair_constants,
            "NUM_LISTS": 1 if regroup is None else 2 if regroup.target == NO_BIT else 3,
            "HAS_REGROUP": regroup is not None,
            "HAS_TARGET": regroup is not None and regroup.target != NO_BIT,
            "GATE_OF": NO_BIT if regroup is None else regroup.gate_of,
            "GATE_SHARE": NO_BIT if regroup is None else regroup.gate_share,
            "REGROUP_ROW": NO_BIT if regroup is None else regroup.row,
            **lowered.affine_constants,
            "NUM_CLASSES": 0 if classes is None else len(classes.codes),
            "CLASS_BITS": 0 if classes is None else classes.bits,
            "HAS_HEADS": heads is not None,
            "ONLY_FLAGGED": row_tiles is not None,
            "OVERLAPS": overlaps,
            "WRITE_LSE": with_log_sum_exp,
            "D": head_dim,
            "DV": value_dim,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "FLAG_TILE": TILE,
            "PRECISION": "ieee",
            "STAGES": stages,
        },
        warps,
        starts_early=overlaps,
    )
    return output, log_sum_exp


def config_of(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, stages. float32 needs twice the shared memory."""
    if dtype == torch.float32:
        return (64, 64, 4, 1) if block_d <= 128 else (16, 64, 4, 1)
    return CONFIGS[max(64, block_d)]
