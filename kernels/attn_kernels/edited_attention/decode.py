"""Edited decode: exact attention of one or a few queries over many keys under any lowered edits, in one or two launches.

Source of the algorithm: Flash-Decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding). The keys are split over
programs; each keeps its part of the softmax in a workspace. Where the parts are few numbers, the last program of a key and
value head to finish merges them; otherwise a second launch does, with a program for a row or a few. The query heads that
share a key and value head are rows of one matrix product.

A Regroup needs the outputs of three classes of keys apart: the rest, the source and the target. Each class gets rows of its
own in the same matrix product, whose 16 rows a few query heads do not fill anyway, with a softmax of its own. The merge puts
the classes together by their log-sum-exps, so nothing is subtracted and no ratio of masses can overflow: a source that holds
nearly all of a row's mass costs no digits.

A byte of code is loaded one tile ahead: the compiler copies only whole words ahead by itself, and decode waits for memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import LOWEST_MAXIMUM, load_tile
from attn_kernels.edited_attention.head_ranking import RankedGain
from attn_kernels.edited_attention.launch import (
    batch_stride,
    can_overlap,
    constant_names,
    kinds,
    last_contiguous,
    multiprocessors,
    power_of_two,
)
from attn_kernels.edited_attention.lowering import NO_BIT, LoweredEdits, NotLowered
from attn_kernels.edited_attention.tiles import (
    LN_2,
    LOG2_E,
    SMALLEST_TARGET_IN_KERNEL,
    capped,
    has_bit,
    mapped_logits,
    matmul,
    paired_visibility,
    scores,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# Rows of a call at most: queries times the query heads that share a key and value head.
MOST_ROWS = 1024
# Rows of one program at most, classes counted; beyond it, more programs share a head.
ROWS_OF_PROGRAM = 64
# Keys of a tile, warps and pipeline stages, by the larger padded head size, for 16-bit and for 32-bit inputs.
CONFIGS: dict[int, tuple[int, int, int]] = {64: (128, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)}
CONFIGS_FLOAT32: dict[int, tuple[int, int, int]] = {64: (64, 4, 2), 128: (32, 4, 2), 256: (32, 4, 1)}
# Splits are as many as keep every multiprocessor busy with so many programs, none with fewer tiles than the second number,
# and no more than the third, or above so many tiles the fourth.
PROGRAMS_PER_MULTIPROCESSOR = 2
FEWEST_TILES_OF_SPLIT = 1
MOST_SPLITS = 32
MANY_TILES, MOST_SPLITS_OF_MANY_TILES = 256, 64
# A second launch merges the parts of a Regroup, parts of more numbers than this, and all parts where it can start while the
# first one runs and wait on the device, which pays for splits of at most so many tiles.
MOST_MERGED_IN_PLACE = 2**16
MOST_TILES_TO_OVERLAP = 4
# Keys of so many tiles are not split where the host launches each step.
MOST_TILES_OF_ONE_LAUNCH = 16
# Numbers that a merge holds in registers at once, accumulators included, splits among them, and steps it loads ahead.
MERGED_AT_ONCE = 20480
SPLITS_AT_ONCE = 32
MERGE_STAGES = 1
# Rows of a program of the second launch, classes counted, and its warps.
ROWS_OF_MERGE = 4
WARPS_OF_MERGE = 4
# Counters for captured calls, each of which gets its own, and for the eager calls of one stream, which share theirs.
COUNTERS_FOR_GRAPHS = 2**20
COUNTERS_OF_STREAM = 2**14
# Place of the gain among the arguments of edits, counted from the end.
GAIN = -4
# Maximum, total, and the totals of the gate's two groups.
STATISTICS = tl.constexpr(4)


@triton.jit
def _load_codes(key_codes, code_at, keys, num_codes, HAS_CODES: tl.constexpr):
    """Codes of ``keys`` (C,) as bytes: (1, C), or (R, C) where ``code_at`` (R, 1) differs by head."""
    if HAS_CODES:
        code = tl.load(key_codes + (code_at + keys[None, :]), mask=keys[None, :] < num_codes, other=0)
    else:
        code = tl.zeros([1, keys.shape[0]], tl.uint8)
    return code


@triton.jit
def _load_valid(key_valid, keys, num_keys, HAS_VALID: tl.constexpr):
    """Validity of ``keys`` (C,) as bytes (1, C)."""
    if HAS_VALID:
        valid = tl.load(key_valid + keys[None, :], mask=keys[None, :] < num_keys, other=0)
    else:
        valid = tl.zeros([1, keys.shape[0]], tl.uint8)
    return valid


@triton.jit
def _load_given(given, given_at, stride_m, keys, num_keys, HAS_MASK: tl.constexpr):
    """Mask (bytes) or bias of ``keys`` (C,) for rows at ``given_at`` (R, 1): (R, C)."""
    if HAS_MASK:
        place = given + (given_at + keys[None, :].to(tl.int64) * stride_m)
        shown = tl.load(place, mask=(keys[None, :] < num_keys) & (given_at >= 0), other=0)
    else:
        shown = tl.zeros([1, keys.shape[0]], tl.uint8)
    return shown


@triton.jit
def _of_class(packed, which: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One class out of the packed rows of all classes."""
    accumulator, total, highest, of_total, share_total = packed
    if CLASSES > 1:
        by_class = tl.reshape(accumulator, [CLASSES, ROWS, BLOCK_DV])
        accumulator = tl.sum(tl.where(tl.arange(0, CLASSES)[:, None, None] == which, by_class, 0.0), 0)
        # All statistics at once: a sum over classes crosses warps.
        joined = tl.join(tl.join(total, highest), tl.join(of_total, share_total))
        by_class = tl.reshape(joined, [CLASSES, ROWS, STATISTICS])
        chosen = tl.sum(tl.where(tl.arange(0, CLASSES)[:, None, None] == which, by_class, 0.0), 0)
        even, odd = tl.split(tl.reshape(chosen, [ROWS, 2, 2]))
        total, highest = tl.split(even)
        of_total, share_total = tl.split(odd)
    return accumulator, total, highest, of_total, share_total


@triton.jit
def _added(total, shrink, weights, BY_COLUMN: tl.constexpr):
    """``total`` of the tiles so far plus the ``weights`` (R, C) of one more: (R, C), or summed over the columns, (R,)."""
    if BY_COLUMN:
        total = total * shrink[:, None] + weights
    else:
        total = total * shrink + tl.sum(weights, 1)
    return total


@triton.jit
def _parts(workspace, group, num_groups, num_splits, PACKED: tl.constexpr, DV: tl.constexpr):
    """Where the accumulators (splits, PACKED, DV) and the statistics (splits, STATISTICS, PACKED) of ``group`` begin."""
    parts = workspace + group * num_splits * (PACKED * DV)
    statistics = workspace + num_groups * num_splits * (PACKED * DV) + group * num_splits * (STATISTICS * PACKED)
    return parts, statistics


@triton.jit
def _merged(
    parts,
    statistics,
    num_splits,
    in_packed,
    kept,
    HAS_GATE: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    PACKED: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The packed rows ``in_packed`` (R,) over all splits, those ``kept`` (R,); the others are as if they saw no key."""
    in_dv = tl.arange(0, BLOCK_DV)
    in_splits = tl.arange(0, AT_ONCE)
    highest = tl.full([in_packed.shape[0]], LOWEST_MAXIMUM, tl.float32)
    accumulator = tl.zeros([in_packed.shape[0], BLOCK_DV], tl.float32)
    total = tl.zeros([in_packed.shape[0]], tl.float32)
    of_total = tl.zeros([in_packed.shape[0]], tl.float32)
    share_total = tl.zeros([in_packed.shape[0]], tl.float32)
    for first in tl.range(0, num_splits, AT_ONCE, num_stages=STAGES):
        split = first + in_splits
        there = (split[:, None] < num_splits) & kept[None, :]
        # Other programs may have written these in the same launch: the first-level cache may hold an older state.
        part = tl.load(
            parts + (split[:, None, None] * PACKED + in_packed[None, :, None]) * DV + in_dv[None, None, :],
            mask=there[:, :, None] & (in_dv[None, None, :] < DV),
            other=0.0,
            cache_modifier=".cg",
        )
        at = statistics + split[:, None] * (STATISTICS * PACKED) + in_packed[None, :]
        its_highest = tl.load(at, mask=there, other=LOWEST_MAXIMUM, cache_modifier=".cg")
        its_total = tl.load(at + PACKED, mask=there, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, tl.max(its_highest, 0))
        shrink = tl.exp2(highest - new_highest)
        scale = tl.exp2(its_highest - new_highest[None, :])
        highest = new_highest
        total = total * shrink + tl.sum(its_total * scale, 0)
        accumulator = accumulator * shrink[:, None] + tl.sum(part * scale[:, :, None], 0)
        if HAS_GATE:
            its_of = tl.load(at + 2 * PACKED, mask=there, other=0.0, cache_modifier=".cg")
            of_total = of_total * shrink + tl.sum(its_of * scale, 0)
        if HAS_SHARE:
            its_share = tl.load(at + 3 * PACKED, mask=there, other=0.0, cache_modifier=".cg")
            share_total = share_total * shrink + tl.sum(its_share * scale, 0)
    return accumulator, total, highest, of_total, share_total


@triton.jit
def _finish(
    packed,
    row,
    num_rows,
    num_queries,
    group_head,
    batch,
    output,
    o_b,
    o_h,
    o_n,
    log_sum_exp,
    num_heads,
    sinks,
    sinks_stride_b,
    sinks_stride_h,
    sinks_stride_n,
    row_codes,
    row_codes_stride,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    HAS_SINKS: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    CLASSES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Puts the classes together, adds the sink logit, Regroup and HeadAffine, and writes ``row`` (R,) of a kv head.

    ``packed`` are all classes: an accumulator (CLASSES * R, BLOCK_DV), and of each of its rows the total, the maximum and
    the gate's two totals.
    """
    ROWS: tl.constexpr = row.shape[0]
    accumulator, total, highest, of_total, share_total = _of_class(packed, 0, CLASSES, ROWS, BLOCK_DV)
    if HAS_REGROUP:
        source_accumulator, source_total, source_highest, source_of, source_share = _of_class(
            packed, 1, CLASSES, ROWS, BLOCK_DV
        )
    if HAS_TARGET:
        target_accumulator, target_total, target_highest, target_of, target_share = _of_class(
            packed, 2, CLASSES, ROWS, BLOCK_DV
        )
    in_dv = tl.arange(0, BLOCK_DV)
    row_inside = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    head = group_head + row // num_queries
    query = row % num_queries
    top = highest
    if HAS_REGROUP:
        top = tl.maximum(top, source_highest)
    if HAS_TARGET:
        top = tl.maximum(top, target_highest)
    if HAS_SINKS:
        sink = LOG2_E * tl.load(sinks + batch * sinks_stride_b + head * sinks_stride_h + query * sinks_stride_n).to(
            tl.float32
        )
        top = tl.maximum(top, sink)
    shrink = tl.exp2(highest - top)
    everything = total * shrink
    if HAS_REGROUP:
        source_shrink = tl.exp2(source_highest - top)
        everything += source_total * source_shrink
    if HAS_TARGET:
        target_shrink = tl.exp2(target_highest - top)
        everything += target_total * target_shrink
    if HAS_SINKS:
        everything += tl.exp2(sink - top)
    # A row that sees no key gives zeros.
    whole = tl.where(everything > 0, everything, 1.0)
    mean = accumulator / tl.where(total > 0, total, 1.0)[:, None]
    mass = total * shrink / whole
    row_code = tl.zeros(row.shape, tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + query).to(tl.int32)
    if HAS_REGROUP:
        source_mass = source_total * source_shrink / whole
        if HAS_TARGET:
            target_mass = target_total * target_shrink / whole
            acts = target_mass > SMALLEST_TARGET_IN_KERNEL
        else:
            acts = mass > SMALLEST_TARGET_IN_KERNEL
        if GATE_OF != NO_BIT_IN_KERNEL:
            of_mass = of_total * shrink + source_of * source_shrink
            if HAS_TARGET:
                of_mass += target_of * target_shrink
            of_mass = of_mass / whole
            acts = acts & (of_mass >= tl.load(regroup + num_heads + head))
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                share_mass = share_total * shrink + source_share * source_shrink
                if HAS_TARGET:
                    share_mass += target_share * target_shrink
                acts = acts & (share_mass / whole <= tl.load(regroup + 2 * num_heads + head) * of_mass)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & has_bit(row_code, REGROUP_ROW)
        keep = tl.where(acts, tl.load(regroup + head), 1.0)
        freed = tl.where(acts, (1 - keep) * source_mass, 0.0)
        source_mean = source_accumulator / tl.where(source_total > 0, source_total, 1.0)[:, None]
        if HAS_TARGET:
            target_mean = target_accumulator / tl.where(target_total > 0, target_total, 1.0)[:, None]
            mean = mean * mass[:, None] + target_mean * (target_mass + freed)[:, None]
        else:
            mean = mean * (mass + freed)[:, None]
        mean += source_mean * (keep * source_mass)[:, None]
    else:
        mean = mean * mass[:, None]
    if HAS_AFFINE:
        factor = tl.load(gain + batch * gain_b + head)[:, None]
        affine = tl.where(factor == 0, 0.0, mean * factor)
        if HAS_OFFSET:
            affine += tl.load(
                offset + batch * offset_b + head[:, None] * DV + in_dv[None, :], mask=in_dv[None, :] < DV, other=0.0
            )
        if AFFINE_ROW != NO_BIT_IN_KERNEL:
            affine = tl.where(has_bit(row_code, AFFINE_ROW)[:, None], affine, mean)
        mean = affine
    tl.store(
        output + batch * o_b + head[:, None] * o_h + query[:, None] * o_n + in_dv[None, :],
        mean.to(output.dtype.element_ty),
        mask=row_inside[:, None] & (in_dv[None, :] < DV),
    )
    if WRITE_LSE:
        tl.store(
            log_sum_exp + (batch * num_heads + head) * num_queries + query,
            tl.where(everything > 0, (top + tl.log2(whole)) * LN_2, float("-inf")),
            mask=row_inside,
        )


# Numbers that change from one token to the next must not compile a kernel anew.
@triton.jit(do_not_specialize=["num_keys", "query_offset", "num_codes", "window", "table_length", "valid_stride"])
def _edited_decode(
    query,
    key,
    value,
    output,
    log_sum_exp,
    workspace,
    counters,
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
    softcap,
    window,
    page_table,
    table_length,
    lengths,
    page_size,
    key_valid,
    valid_stride,
    given,
    given_stride_b,
    given_stride_h,
    given_stride_n,
    given_stride_m,
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
    num_codes,
    row_codes,
    row_codes_stride,
    map_coefficients,
    pair_heads,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PAGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
    HAS_CODES: tl.constexpr,
    CODES_BY_HEAD: tl.constexpr,
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
    WRITE_LSE: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    MERGE_APART: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    HAS_TARGET: tl.constexpr = HAS_REGROUP and TARGET != NO_BIT_IN_KERNEL
    HAS_GATE: tl.constexpr = HAS_REGROUP and GATE_OF != NO_BIT_IN_KERNEL
    HAS_SHARE: tl.constexpr = HAS_GATE and GATE_SHARE != NO_BIT_IN_KERNEL
    PACKED: tl.constexpr = CLASSES * ROWS
    # A sum over a tile's columns crosses warps, and is left for the end, where the warps lie along the columns.
    BY_COLUMN: tl.constexpr = PACKED < 64
    if MERGE_APART and OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    kv_head = tl.program_id(1) // ROW_BLOCKS
    row_block = tl.program_id(1) % ROW_BLOCKS
    batch = tl.program_id(2).to(tl.int64)
    num_rows = heads_per_kv * num_queries
    in_packed = tl.arange(0, PACKED)
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    # Rows beyond the last repeat it, and are not stored.
    row = tl.minimum(row_block * ROWS + in_packed % ROWS, num_rows - 1)[:, None]
    row_class = (in_packed // ROWS)[:, None]
    group_head = kv_head * heads_per_kv
    head = group_head + row // num_queries
    query_row = row % num_queries
    query_tile = tl.load(
        query + batch * q_b + head.to(tl.int64) * q_h + query_row.to(tl.int64) * q_n + in_d[None, :],
        mask=in_d[None, :] < D,
        other=0.0,
    )
    if HAS_PAGES:
        num_keys = tl.load(lengths + batch)
        query_offset = num_keys - num_queries
        key_base = key + kv_head.to(tl.int64) * k_h
        value_base = value + kv_head.to(tl.int64) * v_h
    else:
        key_base = key + batch * k_b + kv_head.to(tl.int64) * k_h
        value_base = value + batch * v_b + kv_head.to(tl.int64) * v_h
    query_index = query_offset + query_row
    to_log2 = scaling * LOG2_E
    row_code = tl.zeros([PACKED, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + query_row).to(tl.int32)
    if HAS_VALUES:
        of_query = tl.load(query_value + batch * query_value_stride + query_row)
        if HAS_ORDER_HEADS:
            by_value_here = tl.load(order_heads + head) != 0
    if CODES_BY_HEAD:
        code_at = batch * codes_b + head.to(tl.int64) * codes_h
    else:
        code_at = (batch * codes_b + tl.zeros([1, 1], tl.int64)).to(tl.int64)
    valid_base = key_valid
    if HAS_VALID:
        valid_base = key_valid + batch * valid_stride
    given_at = tl.zeros([PACKED, 1], tl.int64)
    if HAS_MASK:
        given_at = batch * given_stride_b + head.to(tl.int64) * given_stride_h + query_row.to(tl.int64) * given_stride_n

    # Keys that some row may see by index: all of them where a mask, an order value or a pair decides.
    start = 0
    stop = num_keys
    if not HAS_MASK and not HAS_VALUES and NUM_PAIRS == 0:
        if CAUSAL:
            stop = tl.minimum(num_keys, query_offset + num_queries)
        if HAS_WINDOW:
            start = tl.maximum(0, query_offset - window + 1)
    num_tiles = (tl.maximum(stop - start, 0) + BLOCK_M - 1) // BLOCK_M
    first_tile = split * num_tiles // num_splits
    stop_tile = (split + 1) * num_tiles // num_splits

    accumulator = tl.zeros([PACKED, BLOCK_DV], tl.float32)
    highest = tl.full([PACKED], LOWEST_MAXIMUM, tl.float32)
    total = tl.zeros([PACKED, BLOCK_M] if BY_COLUMN else [PACKED], tl.float32)
    of_total = tl.zeros([PACKED, BLOCK_M] if BY_COLUMN else [PACKED], tl.float32)
    share_total = tl.zeros([PACKED, BLOCK_M] if BY_COLUMN else [PACKED], tl.float32)
    keys = start + first_tile * BLOCK_M + in_m
    next_code = _load_codes(key_codes, code_at, keys, num_codes, HAS_CODES)
    next_valid = _load_valid(valid_base, keys, num_keys, HAS_VALID)
    next_given = _load_given(given, given_at, given_stride_m, keys, num_keys, HAS_MASK)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        keys = start + tile * BLOCK_M + in_m
        inside = keys < stop
        code = next_code.to(tl.int32)
        valid_byte = next_valid
        of_mask = next_given
        next_code = _load_codes(key_codes, code_at, keys + BLOCK_M, num_codes, HAS_CODES)
        next_valid = _load_valid(valid_base, keys + BLOCK_M, num_keys, HAS_VALID)
        next_given = _load_given(given, given_at, given_stride_m, keys + BLOCK_M, num_keys, HAS_MASK)
        if HAS_PAGES:
            page = tl.load(page_table + batch * table_length + keys // page_size, mask=inside, other=0).to(tl.int64)
            key_at = page * k_b + (keys % page_size).to(tl.int64) * k_m
            value_at = page * v_b + (keys % page_size).to(tl.int64) * v_m
        else:
            key_at = keys.to(tl.int64) * k_m
            value_at = keys.to(tl.int64) * v_m
        key_tile = load_tile(key_base, key_at, in_d, D, BLOCK_D, inside, True)
        logits = capped(scores(query_tile, key_tile, to_log2, PRECISION), softcap, HAS_SOFTCAP)

        valid = inside[None, :]
        if HAS_VALID:
            valid = valid & (valid_byte != 0)
        if HAS_MASK:
            if MASK_IS_BIAS:
                bias = of_mask.to(tl.float32)
                visible = (bias > LOWEST) & inside[None, :]
                logits += tl.where(visible, bias * LOG2_E, 0.0)
            else:
                visible = (of_mask != 0) & inside[None, :]
        else:
            visible = valid & (query_row >= 0)
            if CAUSAL:
                visible = visible & (keys[None, :] <= query_index)
            if HAS_WINDOW:
                visible = visible & (keys[None, :] > query_index - window)
        if HAS_VALUES:
            of_key = tl.load(key_value + batch * key_value_stride + keys, mask=inside, other=0)[None, :]
            by_value = (of_key <= of_query) & valid
            if HAS_ORDER_HEADS:
                visible = (by_value & by_value_here) | (visible & (by_value_here == 0))
            else:
                visible = by_value
        logits = mapped_logits(logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS)
        visible = paired_visibility(
            visible, valid, code, row_code, head, pair_heads, num_heads, NUM_PAIRS, PAIR_KEYS, PAIR_ROWS
        )
        if HAS_REGROUP:
            key_class = tl.where(has_bit(code, SOURCE), 1, 0)
            if HAS_TARGET:
                key_class = tl.where(has_bit(code, TARGET) & (key_class == 0), 2, key_class)
            visible = visible & (key_class == row_class)
        logits = tl.where(visible, logits, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        highest = new_highest
        total = _added(total, shrink, weights, BY_COLUMN)
        if HAS_GATE:
            of_total = _added(of_total, shrink, tl.where(has_bit(code, GATE_OF), weights, 0.0), BY_COLUMN)
        if HAS_SHARE:
            share_total = _added(share_total, shrink, tl.where(has_bit(code, GATE_SHARE), weights, 0.0), BY_COLUMN)
        value_tile = load_tile(value_base, value_at, in_dv, DV, BLOCK_DV, inside, False)
        accumulator = matmul(weights.to(value_tile.dtype), value_tile, accumulator * shrink[:, None], PRECISION)
    if BY_COLUMN:
        total = tl.sum(total, 1)
        of_total = tl.sum(of_total, 1)
        share_total = tl.sum(share_total, 1)

    group = batch * tl.num_programs(1) + tl.program_id(1)
    finishes = True
    if not ONE_SPLIT:
        num_groups = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
        parts, statistics = _parts(workspace, group, num_groups, num_splits, PACKED, DV)
        kept = (in_packed < (3 if HAS_TARGET else CLASSES) * ROWS) & (row_block * ROWS + in_packed % ROWS < num_rows)
        tl.store(
            parts + (split * PACKED + in_packed[:, None]) * DV + in_dv[None, :],
            accumulator,
            mask=kept[:, None] & (in_dv[None, :] < DV),
        )
        at = statistics + split * (STATISTICS * PACKED) + in_packed
        tl.store(at, highest, mask=kept)
        tl.store(at + PACKED, total, mask=kept)
        if HAS_GATE:
            tl.store(at + 2 * PACKED, of_total, mask=kept)
        if HAS_SHARE:
            tl.store(at + 3 * PACKED, share_total, mask=kept)
        if not MERGE_APART:
            # All threads have written before one of them announces it.
            tl.debug_barrier()
            finishes = tl.atomic_add(counters + group, 1, sem="acq_rel") == num_splits - 1
    if not MERGE_APART:
        if finishes:
            if ONE_SPLIT:
                finished_row = row_block * ROWS + tl.arange(0, ROWS)
                packed = (accumulator, total, highest, of_total, share_total)
            else:
                in_merged = tl.arange(0, MERGED_ROWS)
                finished_row = row_block * ROWS + in_merged
                packed = _merged(
                    parts,
                    statistics,
                    num_splits,
                    in_merged,
                    finished_row < num_rows,
                    HAS_GATE,
                    HAS_SHARE,
                    PACKED,
                    DV,
                    BLOCK_DV,
                    AT_ONCE,
                    MERGE_STAGES,
                )
            _finish(
                packed,
                finished_row,
                num_rows,
                num_queries,
                group_head,
                batch,
                output,
                o_b,
                o_h,
                o_n,
                log_sum_exp,
                num_heads,
                sinks,
                sinks_stride_b,
                sinks_stride_h,
                sinks_stride_n,
                row_codes,
                row_codes_stride,
                regroup,
                gain,
                gain_b,
                offset,
                offset_b,
                HAS_SINKS,
                HAS_ROW_CODES,
                HAS_REGROUP,
                HAS_TARGET,
                GATE_OF,
                GATE_SHARE,
                REGROUP_ROW,
                HAS_AFFINE,
                HAS_OFFSET,
                AFFINE_ROW,
                WRITE_LSE,
                CLASSES,
                DV,
                BLOCK_DV,
            )
            if not ONE_SPLIT:
                # The next launch finds the counter as this one did.
                tl.store(counters + group, 0)


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    output,
    log_sum_exp,
    workspace,
    num_splits,
    o_b,
    o_h,
    o_n,
    num_heads,
    heads_per_kv,
    num_queries,
    sinks,
    sinks_stride_b,
    sinks_stride_h,
    sinks_stride_n,
    row_codes,
    row_codes_stride,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    HAS_SINKS: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_APART: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    AT_ONCE_APART: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):
    """Merges and finishes ROWS_APART rows of a kv head, whose classes ``_edited_decode`` left in the workspace.

    The grid is (rows of a kv head / ROWS_APART, kv heads, batch).
    """
    HAS_TARGET: tl.constexpr = HAS_REGROUP and TARGET != NO_BIT_IN_KERNEL
    HAS_GATE: tl.constexpr = HAS_REGROUP and GATE_OF != NO_BIT_IN_KERNEL
    HAS_SHARE: tl.constexpr = HAS_GATE and GATE_SHARE != NO_BIT_IN_KERNEL
    PACKED: tl.constexpr = CLASSES * ROWS
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    num_rows = heads_per_kv * num_queries
    # ROWS is a multiple of ROWS_APART: all rows of this program were of one program there.
    first_row = tl.program_id(0) * ROWS_APART
    in_merged = tl.arange(0, CLASSES * ROWS_APART)
    row_class = in_merged // ROWS_APART
    row = first_row + in_merged % ROWS_APART
    num_groups = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * ROW_BLOCKS
    group = (batch * tl.num_programs(1) + kv_head) * ROW_BLOCKS + first_row // ROWS
    parts, statistics = _parts(workspace, group, num_groups, num_splits, PACKED, DV)
    if OVERLAPS:
        # All programs of the launch before have ended, and their writes are there.
        tl.extra.cuda.gdc_wait()
    packed = _merged(
        parts,
        statistics,
        num_splits,
        row_class * ROWS + row % ROWS,
        (row < num_rows) & (row_class < (3 if HAS_TARGET else CLASSES)),
        HAS_GATE,
        HAS_SHARE,
        PACKED,
        DV,
        BLOCK_DV,
        AT_ONCE_APART,
        MERGE_STAGES,
    )
    _finish(
        packed,
        first_row + tl.arange(0, ROWS_APART),
        num_rows,
        num_queries,
        kv_head * heads_per_kv,
        batch,
        output,
        o_b,
        o_h,
        o_n,
        log_sum_exp,
        num_heads,
        sinks,
        sinks_stride_b,
        sinks_stride_h,
        sinks_stride_n,
        row_codes,
        row_codes_stride,
        regroup,
        gain,
        gain_b,
        offset,
        offset_b,
        HAS_SINKS,
        HAS_ROW_CODES,
        HAS_REGROUP,
        HAS_TARGET,
        GATE_OF,
        GATE_SHARE,
        REGROUP_ROW,
        HAS_AFFINE,
        HAS_OFFSET,
        AFFINE_ROW,
        WRITE_LSE,
        CLASSES,
        DV,
        BLOCK_DV,
    )


def edited_decode(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    *,
    return_log_sum_exp: bool = False,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    splits: int | None = None,
    config: tuple[int, int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Output ``(B, H, N, Dv)`` in the value's dtype; on request also the log-sum-exp ``(B, H, N)`` float32, natural.

    For few queries: N times the query heads of a kv head must not exceed ``MOST_ROWS``, else raises ``NotLowered``. All primitives
    but Sparsity; dropout is not applied. The log-sum-exp is that of the edited logits, the sink logit included.

    With ``page_table`` ``(B, pages)`` int32 and ``lengths`` ``(B,)`` int32, the inputs' key and value are pages
    ``(all pages, page size, K, D)``; the queries are a sample's last keys, and neither a mask nor padding is read.
    ``splits`` and ``config`` (keys of a tile, warps, stages) replace the built-in choice. Never waits for the device,
    unless ``inputs.first_query`` is missing.
    """
    query = inputs.query
    if query.is_cuda and query.get_device() != torch.cuda.current_device():
        # Triton launches on the current device; layers may lie on several.
        with torch.cuda.device(query.device):
            return edited_decode(
                inputs,
                lowered,
                return_log_sum_exp=return_log_sum_exp,
                page_table=page_table,
                lengths=lengths,
                splits=splits,
                config=config,
            )
    if page_table is not None:
        if lengths is None:
            raise ValueError("a page table needs the lengths of the samples")
        if inputs.mask is not None or inputs.bias is not None:
            raise NotLowered("a mask on a paged cache")
        num_keys, query_offset = page_table.shape[1] * inputs.key.shape[1], 0
    else:
        num_keys, query_offset = inputs.num_keys, inputs.query_offset
    call = DecodeCall(inputs, lowered, return_log_sum_exp, paged=page_table is not None, splits=splits, config=config)
    return call.run(
        query,
        inputs.key,
        inputs.value,
        num_keys,
        query_offset,
        mask=inputs.mask,
        bias=inputs.bias,
        key_valid=inputs.key_valid if inputs.padded else None,
        page_table=page_table,
        lengths=lengths,
    )


class DecodeCall:
    """What decode calls have in common whose edits, shapes and options are the same, but not their tensors and numbers of keys.

    Made of one of them, and of the arguments of ``edited_decode``; raises what that does. ``run`` asks of a call only what may
    differ, since in decode the device waits for its host.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        lowered: LoweredEdits,
        return_log_sum_exp: bool = False,
        paged: bool = False,
        splits: int | None = None,
        config: tuple[int, int, int] | None = None,
    ) -> None:
        query = inputs.query
        self.batch, self.num_heads, self.num_queries, head_dim = query.shape
        self.kv_heads, self.value_dim = inputs.key.shape[2 if paged else 1], inputs.value.shape[3]
        self.group = self.num_heads // self.kv_heads
        self.num_rows = self.group * self.num_queries
        if self.num_rows > MOST_ROWS:
            raise NotLowered(f"{self.num_rows} rows of one key and value head; decode takes at most {MOST_ROWS}")
        self.device, self.dtype = query.device, query.dtype
        self.causal, self.window, self.sinks = inputs.causal, inputs.window, inputs.sink_logits
        self.softcap, self.scaling = inputs.softcap, float(inputs.scaling)
        self.return_log_sum_exp, self.paged, self.splits = return_log_sum_exp, paged, splits
        self.edits = _edits(lowered)
        self.gain: RankedGain | None = None
        if lowered.ranking is not None and lowered.gain is not None:
            self.gain = RankedGain(lowered.ranking, lowered.gain, head_dim)
        self.layout = _layout(query.dtype, self.num_rows, self.edits.classes, head_dim, self.value_dim, config)
        self.programs = self.batch * self.kv_heads * self.layout.row_blocks
        self.multiprocessors, self.can_overlap = multiprocessors(query.device), can_overlap(query.device)
        self.sinks_strides = (0, 0, 0) if self.sinks is None else _broadcast_strides(self.sinks)
        self.output_strides = (
            self.num_queries * self.num_heads * self.value_dim,
            self.value_dim,
            self.num_heads * self.value_dim,
        )
        # Of ``again``, by the number of tiles.
        self.steps: dict[int, _Step] = {}
        self.merge_grid = (-(-self.num_rows // self.layout.rows_apart), self.kv_heads, self.batch)
        self.alike = (
            query.device,
            self.layout,
            inputs.value.dtype,
            self.num_heads,
            self.group,
            self.num_queries,
            self.causal,
            self.window is None,
            self.softcap is None,
            None if self.sinks is None else (self.sinks.dtype, self.sinks_strides),
            return_log_sum_exp,
        )

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_keys: int,
        query_offset: int,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_valid: Tensor | None = None,
        page_table: Tensor | None = None,
        lengths: Tensor | None = None,
        cut: tuple[int, bool] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As ``edited_decode``, on the current device. ``key_valid`` ``(B, M)`` bool, where not all keys are real. ``cut``: as
        ``_splits`` gives."""
        query, key, value = last_contiguous(query), last_contiguous(key), last_contiguous(value)
        edits, layout, paged = self.edits, self.layout, self.paged
        num_heads, num_queries, group = self.num_heads, self.num_queries, self.group
        key_strides, value_strides = key.stride(), value.stride()
        page_size, table_length = 0, 0
        if page_table is not None:
            page_size = key.shape[1]
            key_strides, value_strides = (
                (strides[0], strides[2], strides[1], strides[3]) for strides in (key_strides, value_strides)
            )
            page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
            table_length = page_table.stride(0)
        # A view, so that a byte of the mask is loaded as a byte.
        given = mask.view(torch.uint8) if mask is not None else bias
        # A mask says itself what is visible; only an Order asks for the real keys then.
        needs_valid = key_valid is not None and not paged and (given is None or edits.orders)
        given_strides = (0, 0, 0, 0) if given is None else _broadcast_strides(given)
        valid = last_contiguous(key_valid).view(torch.uint8) if needs_valid and key_valid is not None else None
        splits, overlaps = cut or self._splits(num_keys, query_offset, masked=given is not None)
        merge_apart = self._merges_apart(splits)

        output = value.new_empty(self.batch, num_queries, num_heads, self.value_dim)
        log_sum_exp = (
            torch.empty(self.batch, num_heads, num_queries, dtype=torch.float32, device=self.device)
            if self.return_log_sum_exp
            else None
        )
        workspace, counters = None, None
        if splits > 1:
            workspace = torch.empty(self.programs * splits * layout.of_split, dtype=torch.float32, device=self.device)
            if not merge_apart:
                counters = _counters(self.device, self.programs)
        strides = (*query.stride()[:3], *key_strides[:3], *value_strides[:3], *self.output_strides)
        of_edits, of_merge = edits.arguments, edits.merge_arguments
        if self.gain is not None:
            gain = self.gain(query)
            of_edits = (*of_edits[:GAIN], gain, *of_edits[GAIN + 1 :])
            of_merge = (*of_merge[:GAIN], gain, *of_merge[GAIN + 1 :])
        arguments = (
            query,
            key,
            value,
            output,
            log_sum_exp,
            workspace,
            counters,
            *strides,
            num_heads,
            group,
            num_queries,
            num_keys,
            query_offset,
            *self._before_edits(),
            page_table,
            table_length,
            lengths,
            page_size,
            valid,
            batch_stride(valid),
            given,
            *given_strides,
            self.sinks,
            *self.sinks_strides,
            *of_edits,
        )
        grid = (splits, self.kv_heads * layout.row_blocks, self.batch)
        merge_arguments: tuple[Tensor | int | None, ...] = ()
        if merge_apart:
            merge_arguments = (
                output,
                log_sum_exp,
                workspace,
                splits,
                *self.output_strides,
                num_heads,
                group,
                num_queries,
                self.sinks,
                *self.sinks_strides,
                *of_merge,
            )
        # Triton looks at every argument of every launch, which takes longer than all of the above. A call that is like an
        # earlier one in all that Triton compiles for goes to the compiled kernel.
        alike = None
        if not paged and _all_aligned(query, key, value, valid, self.sinks, strides):
            of_mask = None if given is None else (mask is None, *kinds((given, *given_strides)))
            alike = self._alike(valid, of_mask, splits, overlaps)
            compiled = edits.compiled.get(alike)
            if compiled is not None:
                kernel, constants, merge, merge_constants = compiled
                kernel[grid](*arguments, *constants)
                if merge_apart:
                    merge[self.merge_grid](*merge_arguments, *merge_constants)
                return _result(output, log_sum_exp)
        by_name = {
            "CAUSAL": self.causal,
            "HAS_WINDOW": self.window is not None,
            "HAS_PAGES": paged,
            "HAS_VALID": valid is not None,
            "HAS_MASK": given is not None,
            "MASK_IS_BIAS": mask is None and bias is not None,
            "LOWEST": 0.0 if bias is None else torch.finfo(bias.dtype).min / 2,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_SINKS": self.sinks is not None,
            "WRITE_LSE": self.return_log_sum_exp,
            "ONE_SPLIT": splits == 1,
            "MERGE_APART": merge_apart,
            "OVERLAPS": overlaps,
            # The compiler shares the stages out between a look-up in the page table and the load that waits for it.
            "STAGES": 2 * layout.stages - 1 if paged else layout.stages,
            **edits.constants,
            **layout.constants,
        }
        constants = tuple(by_name[name] for name in _CONSTANT_NAMES)
        kernel = _edited_decode[grid](*arguments, *constants, num_warps=layout.warps)
        merge, merge_constants = None, tuple(by_name[name] for name in _MERGE_CONSTANT_NAMES)
        if merge_apart:
            options = {"launch_pdl": True} if overlaps else {}
            merge = _merge[self.merge_grid](*merge_arguments, *merge_constants, num_warps=WARPS_OF_MERGE, **options)
        # Triton's interpreter returns nothing; on AMD it looks at more.
        if alike is not None and kernel is not None and torch.version.hip is None:
            edits.compiled[alike] = kernel, constants, merge, merge_constants
        return _result(output, log_sum_exp)

    def again(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``run`` of one query that sees all keys, none of them padding: with less to do on the host, which the device waits for.

        Few keys are not split, since a second launch takes longer than they do; compiled kernels get addresses for tensors.
        """
        num_keys = key.shape[2]
        tiles = -(-num_keys // self.layout.block_m)
        step = self.steps.get(tiles)
        of_query, of_key, of_value = query.stride(), key.stride(), value.stride()
        strides = (*of_query[:3], *of_key[:3], *of_value[:3])
        if (
            step is None
            or of_query[3] * of_key[3] * of_value[3] != 1
            or not _all_aligned(query, key, value, None, None, strides)
        ):
            output = self.run(query, key, value, num_keys, num_keys - 1, cut=self._cut_of_step(tiles, num_keys))
            if step is None:
                self._keep_step(tiles, num_keys)
            assert isinstance(output, Tensor)
            return output
        output = value.new_empty(self.batch, 1, self.num_heads, self.value_dim)
        place, workspace, gain = output.data_ptr(), None, None
        rest, merge_rest = step.rest, step.merge_rest
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        if self.gain is not None:
            gain = self.gain(query, stream)
            rest = (*rest[: step.gain], gain.data_ptr(), *rest[step.gain + 1 :])
            merge_rest = (*merge_rest[: step.merge_gain], gain.data_ptr(), *merge_rest[step.merge_gain + 1 :])
        if step.workspace:
            workspace = torch.empty(step.workspace, dtype=torch.float32, device=self.device)
        at_workspace = None if workspace is None else workspace.data_ptr()
        step.kernel[step.grid](
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            place,
            None,
            at_workspace,
            None,
            *strides,
            *self.output_strides,
            self.num_heads,
            self.group,
            1,
            num_keys,
            num_keys - 1,
            *rest,
            stream=stream,
        )
        if workspace is not None:
            step.merge[self.merge_grid](place, None, at_workspace, *merge_rest, stream=stream)
        return output.transpose(1, 2)

    def _cut_of_step(self, tiles: int, num_keys: int) -> tuple[int, bool]:
        """As ``_splits``, for ``again``."""
        return (1, False) if tiles <= MOST_TILES_OF_ONE_LAUNCH else self._splits(num_keys, num_keys - 1, masked=False)

    def _keep_step(self, tiles: int, num_keys: int) -> None:
        """Puts what the call before has compiled where ``again`` finds it; the interpreter compiles nothing."""
        splits, overlaps = self._cut_of_step(tiles, num_keys)
        compiled = self.edits.compiled.get(self._alike(None, None, splits, overlaps))
        if compiled is None or self.window is not None or (splits > 1 and not self._merges_apart(splits)):
            return
        kernel, constants, merge, merge_constants = compiled
        before = (*self._before_edits(), None, 0, None, 0, None, 0, None, 0, 0, 0, 0, self.sinks, *self.sinks_strides)
        before_merge = (splits, *self.output_strides, self.num_heads, self.group, 1, self.sinks, *self.sinks_strides)
        edits = self.edits
        self.steps[tiles] = _Step(
            kernel=kernel,
            grid=(splits, self.kv_heads * self.layout.row_blocks, self.batch),
            rest=(*_addresses((*before, *edits.arguments)), *constants),
            gain=len(before) + len(edits.arguments) + GAIN,
            merge=merge,
            merge_rest=(*_addresses((*before_merge, *edits.merge_arguments)), *merge_constants),
            merge_gain=len(before_merge) + len(edits.merge_arguments) + GAIN,
            workspace=self.programs * splits * self.layout.of_split if splits > 1 else 0,
        )

    def _before_edits(self) -> tuple[float | int, ...]:
        return self.scaling, float(self.softcap or 0.0), self.window or 0

    def _alike(self, valid: object, of_mask: object, splits: int, overlaps: bool) -> tuple[object, ...]:
        """What Triton compiles for, beside the edits."""
        return (self.alike, valid is None, of_mask, splits == 1, self._merges_apart(splits), overlaps)

    def _merges_apart(self, splits: int) -> bool:
        return splits > 1 and (
            self.edits.classes > 1 or self.can_overlap or splits * self.layout.merged > MOST_MERGED_IN_PLACE
        )

    def _splits(self, num_keys: int, query_offset: int, masked: bool) -> tuple[int, bool]:
        """Into how many parts the keys are cut, and whether the merge may start early."""
        if self.splits is not None:
            return self.splits, self.can_overlap
        # As in the kernel: the keys that some row may see by index.
        start, stop = 0, num_keys
        if not masked and not self.edits.orders:
            if self.causal and not self.paged:
                stop = min(num_keys, query_offset + self.num_queries)
            if self.window is not None and self.paged:
                stop = min(num_keys, self.window + self.num_queries)
            elif self.window is not None:
                start = max(0, query_offset - self.window + 1)
        tiles = -(-max(0, stop - start) // self.layout.block_m)
        most = MOST_SPLITS if tiles <= MANY_TILES else MOST_SPLITS_OF_MANY_TILES
        splits = number_of_splits(self.programs, tiles, self.multiprocessors, most)
        return splits, self.can_overlap and tiles <= MOST_TILES_TO_OVERLAP * splits


_CONSTANT_NAMES, _MERGE_CONSTANT_NAMES = constant_names(_edited_decode), constant_names(_merge)


def _result(output: Tensor, log_sum_exp: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    transposed = output.transpose(1, 2)
    return transposed if log_sum_exp is None else (transposed, log_sum_exp)


def _all_aligned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    sinks: Tensor | None,
    strides: tuple[int, ...],
) -> bool:
    """Whether every address and stride is a multiple of 16 and every stride fits 32 bits, as it mostly is."""
    together = 0
    for stride in strides:
        together |= stride
    addresses = query.data_ptr() | key.data_ptr() | value.data_ptr()
    if valid is not None:
        addresses |= valid.data_ptr()
    if sinks is not None:
        addresses |= sinks.data_ptr()
    return (addresses | together) & 15 == 0 and together < 2**31


def _addresses(arguments: tuple[Tensor | float | int | None, ...]) -> tuple[float | int | None, ...]:
    """For a compiled kernel, while somebody keeps the tensors."""
    return tuple(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)


@dataclass(frozen=True, eq=False)
class _Step:
    """Compiled kernels with what they take after the number of keys, the gain at ``gain``, and after the workspace."""

    kernel: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]
    gain: int
    merge: Any
    merge_rest: tuple[Any, ...]
    merge_gain: int
    workspace: int  # numbers


_Compiled = tuple[Any, tuple[Any, ...], Any, tuple[Any, ...]]
"""Both kernels, each with its constants."""
_compiled: dict[tuple[object, ...], dict[tuple[object, ...], _Compiled]] = {}


@dataclass(frozen=True, eq=False)
class _Edits:
    """What the kernels take of lowered edits: their positional arguments, with the gain at place ``GAIN``, and their constants."""

    arguments: tuple[Tensor | int | None, ...]
    merge_arguments: tuple[Tensor | int | None, ...]
    constants: dict[str, int | bool]
    classes: int  # of keys: 1, or 2 or 3 with a Regroup, padded to a power of two
    orders: bool
    # Of all edits that Triton compiles alike.
    compiled: dict[tuple[object, ...], _Compiled]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are None, and made anew: compiled kernels cannot be copied."""
        return type(None), ()


def _edits(lowered: LoweredEdits) -> _Edits:
    """Made once for each ``lowered``: its constants cost more than the rest of a call on the host."""
    known: _Edits | None = lowered.__dict__.get("_decode")
    if known is not None:
        return known
    regroup, values = lowered.regroup, lowered.order_values
    codes, row_codes, gain, offset = lowered.key_codes, lowered.row_codes, lowered.gain, lowered.offset
    has_codes = codes.shape[2] > 0 and lowered.edits_weights
    of_rows = (row_codes, batch_stride(row_codes))
    of_output = (
        None if regroup is None else regroup.coefficients,
        gain,
        batch_stride(gain),
        offset,
        batch_stride(offset),
    )
    arguments: tuple[Tensor | int | None, ...] = (
        None if values is None else last_contiguous(values[0]),
        None if values is None else last_contiguous(values[1]),
        0 if values is None else batch_stride(last_contiguous(values[0])),
        0 if values is None else batch_stride(last_contiguous(values[1])),
        lowered.order_heads,
        codes if has_codes else None,
        batch_stride(codes),
        codes.stride(1),
        codes.shape[2],
        *of_rows,
        lowered.map_coefficients,
        lowered.pair_heads,
        *of_output,
    )
    constants: dict[str, int | bool] = {
        "HAS_VALUES": values is not None,
        "HAS_ORDER_HEADS": lowered.order_heads is not None,
        "HAS_CODES": has_codes,
        "CODES_BY_HEAD": codes.shape[1] > 1,
        "HAS_ROW_CODES": row_codes is not None,
        **lowered.map_constants,
        **lowered.pair_constants,
        **lowered.regroup_constants,
        **lowered.affine_constants,
    }
    classes = 1 if regroup is None else 2 if regroup.target == NO_BIT else 4
    merge_arguments = (*of_rows, *of_output)
    alike = (*kinds(arguments), *kinds(merge_arguments), *constants.values())
    compiled = _compiled.setdefault(alike, {})
    orders = lowered.num_pairs > 0 or values is not None
    known = _Edits(arguments, merge_arguments, constants, classes, orders, compiled)
    lowered.__dict__["_decode"] = known
    return known


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the rows of a call lie in its programs. Equal arguments of ``_layout`` give the same object."""

    constants: dict[str, int | str]
    row_blocks: int
    rows_apart: int  # of a program that merges apart
    block_m: int
    warps: int
    stages: int
    of_split: int  # numbers in the workspace
    merged: int  # of those, accumulators that hold a row, without classes


@functools.cache
def _layout(
    dtype: torch.dtype,
    num_rows: int,
    classes: int,
    head_dim: int,
    value_dim: int,
    config: tuple[int, int, int] | None,
) -> _Layout:
    if max(head_dim, value_dim) > max(CONFIGS) or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotLowered(f"decode of {dtype} with head_dim {max(head_dim, value_dim)}")
    rows = min(max(16 // classes, power_of_two(num_rows)), ROWS_OF_PROGRAM // classes)
    merged_rows = min(rows, power_of_two(num_rows))
    row_blocks = -(-num_rows // rows)
    block_d, block_dv = max(16, power_of_two(head_dim)), max(16, power_of_two(value_dim))
    block_m, warps, stages = config or config_of(dtype, max(block_d, block_dv))
    rows_apart = min(rows, ROWS_OF_MERGE // classes)
    constants: dict[str, int | str] = {
        "ROW_BLOCKS": row_blocks,
        "CLASSES": classes,
        "ROWS": rows,
        "MERGED_ROWS": merged_rows,
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": block_m,
        "ROWS_APART": rows_apart,
        "AT_ONCE": _splits_at_once(merged_rows * block_dv),
        "AT_ONCE_APART": _splits_at_once(classes * rows_apart * block_dv),
        "MERGE_STAGES": MERGE_STAGES,
        "PRECISION": "ieee",
    }
    of_split = classes * rows * (value_dim + STATISTICS.value)
    return _Layout(constants, row_blocks, rows_apart, block_m, warps, stages, of_split, merged=merged_rows * value_dim)


def _splits_at_once(merged: int) -> int:
    """How many splits of ``merged`` numbers a merge loads together: a power of two, with room for the accumulators."""
    at_once = MERGED_AT_ONCE // merged - 1
    return min(SPLITS_AT_ONCE, 1 << (at_once.bit_length() - 1)) if at_once > 0 else 1


def config_of(dtype: torch.dtype, block_d: int) -> tuple[int, int, int]:
    """Keys of a tile, warps, stages."""
    return (CONFIGS_FLOAT32 if dtype == torch.float32 else CONFIGS)[max(64, block_d)]


def number_of_splits(programs: int, tiles: int, multiprocessors: int, most_splits: int) -> int:
    """Into how many parts each of ``programs`` lists of ``tiles`` is cut: as equal as can be, one wave of programs."""
    most = max(1, min(most_splits, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs))
    tiles_of_split = max(FEWEST_TILES_OF_SPLIT, -(-tiles // most))
    return max(1, -(-tiles // tiles_of_split))


class _Counters:
    """Zeros on one device that every launch leaves as zeros.

    Launches of one stream follow one another and share theirs. A captured call keeps its own, since graphs may be
    replayed on any streams; those come from memory allocated before, so that the graph need not clear them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.for_graphs = torch.zeros(COUNTERS_FOR_GRAPHS, dtype=torch.int32, device=device)
        self.taken = 0

    def eager(self, stream: int, size: int) -> Tensor:
        known = self.of_stream.get(stream)
        if known is None or known.shape[0] < size:
            known = torch.zeros(max(size, COUNTERS_OF_STREAM), dtype=torch.int32, device=self.device)
            self.of_stream[stream] = known
        return known

    def captured(self, size: int) -> Tensor:
        if self.taken + size > COUNTERS_FOR_GRAPHS:
            self.taken = 0
        # Four bytes each, rounded up to what the compiler takes for an aligned pointer.
        first, self.taken = self.taken, self.taken + -(-size // 4) * 4
        return self.for_graphs[first : first + size]


_COUNTERS: dict[torch.device, _Counters] = {}


def _counters(device: torch.device, size: int) -> Tensor:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _COUNTERS.get(device)
    if known is None:
        if capturing:
            # Memory of a graph must not outlive it here.
            return torch.zeros(size, dtype=torch.int32, device=device)
        known = _COUNTERS[device] = _Counters(device)
    if capturing:
        return known.captured(size)
    return known.eager(torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0, size)


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 where the dimension has size 1 and serves all."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
