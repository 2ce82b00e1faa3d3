"""Sparse flash: exact attention over the keys that each tile of queries visits, in one pass with one online softmax.

Source of the algorithm: FlashAttention-2 (Dao 2023, arXiv 2307.08691), over lists of keys. A program owns a tile of queries of
one head. It visits whole tiles of keys, which need no mask, then single columns, which are gathered, then tiles that need a
mask. Static patterns have no lists: the program finds its ranges of keys from the positions of its own rows. Where each query has
chosen for itself, the lists hold what any row of the tile has, and the others' logits there are masked. Every key is
visited at most once by a row, so that the softmax is that of the visited keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import LOWEST_MAXIMUM, accumulate, load_tile, load_whole_tile
from attn_kernels.edited_attention.launch import ceil_div, last_contiguous, launch, padded_size, strides_of
from attn_kernels.edited_attention.tiles import LN_2, LOG2_E, capped, scores
from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import Pattern, PowerOfTwoBlocks, ShardedBlocks, SinkAndWindow
from attn_kernels.sparse_attention.visits import RowChoice, Visits

# How a program finds its keys.
LISTS, SINK_AND_WINDOW, POWER_OF_TWO_BLOCKS, SHARDED_BLOCKS = 0, 1, 2, 3
LISTS_IN_KERNEL, SINK_AND_WINDOW_IN_KERNEL = tl.constexpr(LISTS), tl.constexpr(SINK_AND_WINDOW)
POWER_IN_KERNEL, SHARDS_IN_KERNEL = tl.constexpr(POWER_OF_TWO_BLOCKS), tl.constexpr(SHARDED_BLOCKS)

# Rows and keys of a tile, warps and pipeline stages, by padded head size, for static patterns. Lists bring their own tiles.
CONFIGS: dict[int, tuple[int, int, int, int]] = {64: (128, 64, 4, 4), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)}
FEW_QUERIES = (16, 64, 4, 2)
SMALL_BLOCKS = (64, 64, 4, 3)
PART_STAGES = 2
# Of a list each tile's place has to be read first, which takes two stages of the pipeline.
STAGES_OF_LISTS, FEWER_STAGES_OF_LISTS = 5, 4
LARGEST_SHARED_MEMORY = 227 * 1024


@triton.jit
def _logits(
    query_tile,
    key_tile,
    softcap,
    scaling,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In units of log2 after a softcap, else the bare products."""
    if HAS_SOFTCAP:
        return capped(scores(query_tile, key_tile, scaling * LOG2_E, PRECISION), softcap, True)
    return scores(query_tile, key_tile, 1.0, PRECISION)


@triton.jit
def _seen(
    rows,
    keys,
    first_key,
    window,
    first_parameter,
    second_parameter,
    third_parameter,
    distance,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PATTERN: tl.constexpr,
):
    """Which of ``keys`` (C,) each of ``rows`` (R,), both by place, may see: (R, C). ``distance``: of blocks at powers of two, or
    the phase of sharded blocks."""
    seen = (keys >= first_key)[None, :] & (rows[:, None] >= first_key)
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    if HAS_WINDOW:
        seen = seen & (rows[:, None] - keys[None, :] < window)
    if PATTERN == SINK_AND_WINDOW_IN_KERNEL:
        seen = seen & (
            ((keys - first_key) < first_parameter)[None, :]
            | (rows[:, None] - keys[None, :] < second_parameter)
            | (rows >= third_parameter)[:, None]
        )
    if PATTERN == POWER_IN_KERNEL:
        key_block = (keys - first_key) // first_parameter
        apart = ((rows - first_key) // first_parameter)[:, None] - key_block[None, :]
        is_sink = (key_block < third_parameter)[None, :]
        if distance == -1:
            seen = seen & is_sink
        elif distance == 0:
            seen = seen & (apart < second_parameter) & (is_sink == 0)
        else:
            seen = seen & (apart == distance) & (apart >= second_parameter) & (is_sink == 0)
    if PATTERN == SHARDS_IN_KERNEL:
        key_block = (keys - first_key) // first_parameter
        apart = ((rows - first_key) // first_parameter)[:, None] - key_block[None, :]
        seen = seen & ((apart < second_parameter) | ((key_block + distance) % third_parameter == 0)[None, :])
    return seen


@triton.jit
def _range(
    start,
    stop,
    whole_start,
    whole_stop,
    query_tile,
    key_base,
    value_base,
    k_m,
    v_m,
    rows,
    in_d,
    in_dv,
    num_keys,
    first_key,
    window,
    softcap,
    scaling,
    first_parameter,
    second_parameter,
    third_parameter,
    distance,
    accumulator,
    total,
    highest,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PATTERN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The keys from ``start`` to ``stop``; every row sees all from ``whole_start`` to ``whole_stop``, which lie inside."""
    scale = 1.0 if HAS_SOFTCAP else scaling * LOG2_E
    in_m = tl.arange(0, BLOCK_M)
    whole_start = tl.minimum(tl.maximum(whole_start, start), stop)
    whole_stop = tl.minimum(tl.maximum(whole_stop, whole_start), stop)
    # Whole tiles alone go through the loop without masks.
    whole_stop = whole_start + (whole_stop - whole_start) // BLOCK_M * BLOCK_M
    for first in tl.range(whole_start, whole_stop, BLOCK_M, num_stages=STAGES):
        key_tile = load_whole_tile(key_base + first * k_m.to(tl.int64), in_m * k_m, in_d, D, BLOCK_D, True)
        value_tile = load_whole_tile(value_base + first * v_m.to(tl.int64), in_m * v_m, in_dv, DV, BLOCK_DV, False)
        logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
        accumulator, total, highest, _, _ = accumulate(
            logits, scale, value_tile, accumulator, total, highest, PRECISION
        )
    tiles_before = tl.cdiv(whole_start - start, BLOCK_M)
    tiles_after = tl.cdiv(stop - whole_stop, BLOCK_M)
    for tile in tl.range(0, tiles_before + tiles_after, num_stages=1):
        is_before = tile < tiles_before
        first = tl.where(is_before, start + tile * BLOCK_M, whole_stop + (tile - tiles_before) * BLOCK_M)
        keys = first + in_m
        inside = keys < tl.where(is_before, whole_start, stop)
        key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
        value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
        seen = inside[None, :] & _seen(
            rows,
            keys,
            first_key,
            window,
            first_parameter,
            second_parameter,
            third_parameter,
            distance,
            CAUSAL,
            HAS_WINDOW,
            PATTERN,
        )
        logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
        logits = tl.where(seen, logits, float("-inf"))
        accumulator, total, highest, _, _ = accumulate(
            logits, scale, value_tile, accumulator, total, highest, PRECISION
        )
    return accumulator, total, highest


@triton.jit
def _sparse_flash(
    query,
    key,
    value,
    output,
    log_sum_exp,
    first_keys,
    sinks,
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
    s_b,
    s_h,
    s_n,
    num_heads,
    heads_per_kv,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    first_parameter,
    second_parameter,
    third_parameter,
    whole_begin,
    whole_stop,
    whole_pool,
    whole_b,
    whole_h,
    whole_heads,
    part_begin,
    part_stop,
    part_pool,
    part_b,
    part_h,
    part_heads,
    column_begin,
    column_stop,
    column_pool,
    column_b,
    column_h,
    column_heads,
    column_tiles,
    row_choice,
    choice_b,
    choice_h,
    choice_block,
    choice_heads,
    tiles_of_block,
    phases,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    PATTERN: tl.constexpr,
    HAS_WHOLE: tl.constexpr,
    HAS_PART: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PART_STAGES: tl.constexpr,
):
    # The longest programs, those of the last rows, start first.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    else:
        head = tl.program_id(1).to(tl.int64)
    kv_head = head // heads_per_kv
    first_key = 0
    first_row = row_tile * BLOCK_N
    if HAS_PADDING:
        first_key = tl.load(first_keys + batch).to(tl.int32)
        if PATTERN == LISTS_IN_KERNEL:
            # Tiles are counted from the first real query and key.
            first_row += tl.maximum(first_key - query_offset, 0)
    query_rows = first_row + tl.arange(0, BLOCK_N)
    row_inside = query_rows < num_queries
    # By place among the keys.
    rows = query_rows + query_offset
    lowest_row = first_row + query_offset
    highest_row = tl.minimum(first_row + BLOCK_N, num_queries) - 1 + query_offset
    if HAS_PADDING:
        lowest_row = tl.maximum(lowest_row, first_key)
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    query_tile = tl.load(
        query + batch * q_b + head * q_h + query_rows[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=row_inside[:, None] & (in_d[None, :] < D),
        other=0.0,
    )
    key_base = key + batch * k_b + kv_head * k_h
    value_base = value + batch * v_b + kv_head * v_h
    accumulator = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.full([BLOCK_N], LOWEST_MAXIMUM, tl.float32)
    # One past the last key that any row sees, and the first that all rows see inside of the model's own window.
    end = num_keys
    if CAUSAL:
        end = tl.minimum(end, highest_row + 1)
    window_start = first_key
    whole_window_start = first_key
    if HAS_WINDOW:
        window_start = tl.maximum(first_key, lowest_row - window + 1)
        whole_window_start = tl.maximum(first_key, highest_row - window + 1)
    whole_end = lowest_row + 1 if CAUSAL else num_keys
    if HAS_PADDING:
        # A row of padding sees nothing.
        whole_end = tl.where(first_row + query_offset < first_key, first_key, whole_end)
        end = tl.where(highest_row < first_key, first_key, end)

    if PATTERN == SINK_AND_WINDOW_IN_KERNEL:
        near = tl.maximum(window_start, lowest_row - second_parameter + 1)
        # From the row at the third parameter on, rows are dense.
        near = tl.where(highest_row >= third_parameter, window_start, tl.minimum(near, end))
        whole_near = tl.where(lowest_row >= third_parameter, first_key, highest_row - second_parameter + 1)
        accumulator, total, highest = _range(
            window_start, tl.minimum(first_key + first_parameter, near),
            whole_window_start, tl.minimum(first_key + first_parameter, whole_end),
            query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
            first_parameter, second_parameter, third_parameter, 0, accumulator, total, highest,
            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip
        accumulator, total, highest = _range(
            near, end, tl.maximum(whole_window_start, whole_near), whole_end,
            query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
            first_parameter, second_parameter, third_parameter, 0, accumulator, total, highest,
            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip

    if PATTERN == POWER_IN_KERNEL:
        block = first_parameter
        lowest_block = (lowest_row - first_key) // block
        highest_block = tl.maximum(highest_row - first_key, 0) // block
        after_sinks = tl.minimum(first_key + third_parameter * block, end)
        # The first blocks.
        accumulator, total, highest = _range(
            window_start, after_sinks, whole_window_start, tl.minimum(after_sinks, whole_end),
            query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
            first_parameter, second_parameter, third_parameter, -1, accumulator, total, highest,
            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip
        # Those at powers of two; rows of several blocks have them at several places.
        after_sinks = tl.maximum(after_sinks, window_start)
        distance = 1
        while distance <= highest_block:
            start = tl.maximum(first_key + (lowest_block - distance) * block, after_sinks)
            stop = tl.minimum(first_key + (highest_block - distance + 1) * block, end)
            stop = tl.where(distance < second_parameter, start, tl.maximum(stop, start))
            is_whole = (lowest_block == highest_block) & (first_row + query_offset >= first_key)
            accumulator, total, highest = _range(
                start, stop, whole_window_start, tl.where(is_whole, stop, start),
                query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
                first_parameter, second_parameter, third_parameter, distance, accumulator, total, highest,
                CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
            )  # fmt: skip
            distance *= 2
        # The blocks nearby.
        near = tl.maximum(first_key + (lowest_block - second_parameter + 1) * block, after_sinks)
        near = tl.minimum(near, end)
        accumulator, total, highest = _range(
            near, end,
            tl.maximum(whole_window_start, first_key + (highest_block - second_parameter + 1) * block), whole_end,
            query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
            first_parameter, second_parameter, third_parameter, 0, accumulator, total, highest,
            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip

    scale = 1.0 if HAS_SOFTCAP else scaling * LOG2_E
    if PATTERN == SHARDS_IN_KERNEL:
        block = first_parameter
        phase = tl.load(phases + head)
        lowest_block = tl.maximum(lowest_row - first_key, 0) // block
        highest_block = tl.maximum(highest_row - first_key, 0) // block
        # Blocks of the shard that lie behind all rows' windows of blocks, a tile at a time.
        first_far = (third_parameter - phase % third_parameter) % third_parameter
        far_blocks = tl.maximum(lowest_block - second_parameter - first_far + third_parameter, 0) // third_parameter
        tiles_of_one = block // BLOCK_M
        for number in tl.range(0, far_blocks * tiles_of_one, num_stages=STAGES):
            far_block = first_far + number // tiles_of_one * third_parameter
            first = first_key + far_block * block + number % tiles_of_one * BLOCK_M
            key_tile = load_whole_tile(key_base + first * k_m.to(tl.int64), in_m * k_m, in_d, D, BLOCK_D, True)
            value_tile = load_whole_tile(value_base + first * v_m.to(tl.int64), in_m * v_m, in_dv, DV, BLOCK_DV, False)
            logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
            if HAS_WINDOW:
                logits = tl.where(rows[:, None] - (first + in_m)[None, :] < window, logits, float("-inf"))
            accumulator, total, highest, _, _ = accumulate(
                logits, scale, value_tile, accumulator, total, highest, PRECISION
            )
        near = tl.maximum(first_key + (lowest_block - second_parameter + 1) * block, window_start)
        near = tl.minimum(near, end)
        accumulator, total, highest = _range(
            near, end,
            tl.maximum(whole_window_start, first_key + (highest_block - second_parameter + 1) * block), whole_end,
            query_tile, key_base, value_base, k_m, v_m, rows, in_d, in_dv, num_keys, first_key, window, softcap, scaling,
            first_parameter, second_parameter, third_parameter, phase, accumulator, total, highest,
            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, PATTERN, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip

    if HAS_ROWS:
        # By number from the first real query on, as tiles are.
        number = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_choice += batch * choice_b + (head * choice_heads // num_heads) * choice_h + number
    if HAS_WHOLE:
        of_tile = batch * whole_b + (head * whole_heads // num_heads) * whole_h + row_tile
        begin = tl.load(whole_begin + of_tile)
        stop = tl.load(whole_stop + of_tile)
        for entry in tl.range(begin, stop, num_stages=STAGES):
            tile_number = tl.load(whole_pool + entry).to(tl.int64)
            first = tile_number * BLOCK_M + first_key
            key_tile = load_whole_tile(key_base + first * k_m, in_m * k_m, in_d, D, BLOCK_D, True)
            value_tile = load_whole_tile(value_base + first * v_m, in_m * v_m, in_dv, DV, BLOCK_DV, False)
            logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
            if HAS_ROWS:
                of_block = row_choice + tile_number // tiles_of_block * choice_block
                logits = tl.where(tl.load(of_block, mask=row_inside, other=0)[:, None] != 0, logits, float("-inf"))
            accumulator, total, highest, _, _ = accumulate(
                logits, scale, value_tile, accumulator, total, highest, PRECISION
            )
    if HAS_COLUMNS:
        of_tile = batch * column_b + (head * column_heads // num_heads) * column_h + row_tile // column_tiles
        begin = tl.load(column_begin + of_tile)
        stop = tl.load(column_stop + of_tile)
        whole_stop = begin + (stop - begin) // BLOCK_M * BLOCK_M
        for entry in tl.range(begin, whole_stop, BLOCK_M, num_stages=STAGES):
            keys = tl.load(column_pool + entry + in_m).to(tl.int64) + first_key
            key_tile = load_whole_tile(key_base, keys * k_m, in_d, D, BLOCK_D, True)
            value_tile = load_whole_tile(value_base, keys * v_m, in_dv, DV, BLOCK_DV, False)
            logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
            accumulator, total, highest, _, _ = accumulate(
                logits, scale, value_tile, accumulator, total, highest, PRECISION
            )
        if whole_stop < stop:
            inside = whole_stop + in_m < stop
            keys = tl.load(column_pool + whole_stop + in_m, mask=inside, other=0).to(tl.int64) + first_key
            key_tile = load_tile(key_base, keys * k_m, in_d, D, BLOCK_D, inside, True)
            value_tile = load_tile(value_base, keys * v_m, in_dv, DV, BLOCK_DV, inside, False)
            logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
            logits = tl.where(inside[None, :], logits, float("-inf"))
            accumulator, total, highest, _, _ = accumulate(
                logits, scale, value_tile, accumulator, total, highest, PRECISION
            )
    if HAS_PART:
        of_tile = batch * part_b + (head * part_heads // num_heads) * part_h + row_tile
        begin = tl.load(part_begin + of_tile)
        stop = tl.load(part_stop + of_tile)
        for entry in tl.range(begin, stop, num_stages=PART_STAGES):
            tile_number = tl.load(part_pool + entry)
            keys = tile_number * BLOCK_M + in_m + first_key
            inside = keys < num_keys
            key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
            value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
            seen = inside[None, :] & _seen(rows, keys, first_key, window, 0, 0, 0, 0, CAUSAL, HAS_WINDOW, 0)
            if HAS_ROWS:
                of_block = row_choice + tile_number.to(tl.int64) // tiles_of_block * choice_block
                seen = seen & (tl.load(of_block, mask=row_inside, other=0)[:, None] != 0)
            logits = _logits(query_tile, key_tile, softcap, scaling, HAS_SOFTCAP, PRECISION)
            logits = tl.where(seen, logits, float("-inf"))
            accumulator, total, highest, _, _ = accumulate(
                logits, scale, value_tile, accumulator, total, highest, PRECISION
            )

    if HAS_SINKS:
        sink = LOG2_E * tl.load(sinks + batch * s_b + head * s_h + query_rows * s_n, mask=row_inside, other=0.0).to(
            tl.float32
        )
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink - new_highest)
        accumulator = accumulator * shrink[:, None]
        highest = new_highest
    whole = tl.where(total > 0, total, 1.0)
    tl.store(
        output + batch * o_b + head * o_h + query_rows[:, None].to(tl.int64) * o_n + in_dv[None, :],
        (accumulator / whole[:, None]).to(output.dtype.element_ty),
        mask=row_inside[:, None] & (in_dv[None, :] < DV),
    )
    if WRITE_LSE:
        tl.store(
            log_sum_exp + (batch * num_heads + head) * num_queries + query_rows,
            tl.where(total > 0, (highest + tl.log2(whole)) * LN_2, float("-inf")),
            mask=row_inside,
        )


def sparse_flash(
    inputs: AttentionInputs,
    visited: Pattern | Visits,
    heads: Tensor | None = None,
    output: Tensor | None = None,
    first_keys: Tensor | None = None,
    with_log_sum_exp: bool = False,
    config: tuple[int, int, int, int] | None = None,
    dense_rows: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Output ``(B, H, N, Dv)`` in the value's dtype over the visited keys and, on request, the log-sum-exp ``(B, H, N)``
    float32, natural. A row that sees no key has output 0.

    ``visited``: a static pattern, or lists. ``heads`` (h,) int32 restricts the work to some heads; the others' output is left as
    ``output`` has it. ``first_keys`` (B,) int32: the place of each sample's first real key where it is padded on the left;
    other padding is not known here. ``dense_rows``: so many of the last queries visit everything; with a ``SinkAndWindow`` alone.
    """
    if dense_rows and not isinstance(visited, SinkAndWindow):
        raise TypeError(f"no kernel has dense rows under {visited!r}")
    query, key, value = (last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    # No tile of a list has rows of padding.
    leaves_rows = isinstance(visited, Visits) and first_keys is not None
    if output is None:
        make = value.new_zeros if leaves_rows else value.new_empty
        output = make(batch, num_queries, num_heads, value_dim).transpose(1, 2)
    log_sum_exp = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32) if with_log_sum_exp else None
    if leaves_rows and log_sum_exp is not None:
        log_sum_exp.fill_(-torch.inf)
    block_d, block_dv = padded_size(head_dim), padded_size(value_dim)
    block_n, block_m, warps, stages = config or config_of(query.dtype, max(block_d, block_dv), num_queries)
    which, parameters = LISTS, (0, 0, 0)
    lists = dict.fromkeys(("whole", "part", "columns"))
    if isinstance(visited, Visits):
        block_n, block_m = visited.query_tile, visited.key_tile
        if config is None:
            warps, stages = warps_and_stages_of_lists(visited, query.dtype, max(block_d, block_dv))
        lists = {"whole": visited.whole, "part": visited.part, "columns": visited.columns}
    elif isinstance(visited, SinkAndWindow):
        which, parameters = (
            SINK_AND_WINDOW,
            (
                visited.sinks,
                visited.window,
                inputs.query_offset + max(0, num_queries - dense_rows),
            ),
        )
    elif isinstance(visited, PowerOfTwoBlocks):
        which, parameters = POWER_OF_TWO_BLOCKS, (visited.block, visited.window_blocks, visited.sink_blocks)
        if (
            config is None
            and visited.block < block_n
            and max(block_d, block_dv) <= 128
            and query.dtype != torch.float32
        ):
            # Rows of several blocks have theirs at several places.
            block_n, block_m, warps, stages = SMALL_BLOCKS
    elif isinstance(visited, ShardedBlocks):
        which, parameters = SHARDED_BLOCKS, (visited.block, visited.local_blocks, visited.stride)
        # Tiles of keys lie inside of blocks.
        block_m = math.gcd(visited.block, block_m)
    else:
        raise TypeError(f"no kernel knows the pattern {visited!r}")
    row_choice = visited.rows if isinstance(visited, Visits) else None
    sinks = None if inputs.sink_logits is None else inputs.sink_logits.expand(batch, num_heads, num_queries)
    launch(
        _sparse_flash,
        (ceil_div(num_queries, block_n), num_heads if heads is None else len(heads), batch),
        (
            query,
            key,
            value,
            output,
            log_sum_exp,
            first_keys,
            sinks,
            heads,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            *((0, 0, 0) if sinks is None else sinks.stride()),
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            key.shape[2],
            inputs.query_offset,
            inputs.scaling,
            inputs.softcap or 0.0,
            inputs.window or 0,
            *parameters,
            *(
                argument
                for entry in lists.values()
                for argument in (
                    (None, None, None, 0, 0, 0)
                    if entry is None
                    else (entry.begin, entry.stop, entry.pool, *strides_of(entry.begin), entry.begin.shape[1])
                )
            ),
            1 if lists["columns"] is None else lists["columns"].tiles,
            *((None, 0, 0, 0, 0, 1) if row_choice is None else _of_row_choice(row_choice, block_m)),
            visited.phases if isinstance(visited, ShardedBlocks) else None,
        ),
        {
            "CAUSAL": inputs.causal,
            "HAS_WINDOW": inputs.window is not None,
            "HAS_PADDING": first_keys is not None,
            "HAS_SOFTCAP": inputs.softcap is not None,
            "HAS_SINKS": sinks is not None,
            "HAS_HEADS": heads is not None,
            "PATTERN": which,
            "HAS_WHOLE": lists["whole"] is not None,
            "HAS_PART": lists["part"] is not None,
            "HAS_COLUMNS": lists["columns"] is not None,
            "HAS_ROWS": row_choice is not None,
            "WRITE_LSE": with_log_sum_exp,
            "D": head_dim,
            "DV": value_dim,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "PRECISION": "ieee",
            "STAGES": stages,
            "PART_STAGES": PART_STAGES,
        },
        warps,
    )
    return output, log_sum_exp


def _of_row_choice(rows: RowChoice, key_tile: int) -> tuple[Tensor, int, int, int, int, int]:
    chosen = rows.chosen.view(torch.uint8)
    return chosen, *strides_of(chosen), chosen.stride(2), chosen.shape[1], rows.block // key_tile


def warps_and_stages_of_lists(visits: Visits, dtype: torch.dtype, block_d: int) -> tuple[int, int]:
    """Three pairs of tiles on their way where they fit into a multiprocessor's memory, else two."""
    if dtype == torch.float32:
        return 4, 1
    warps = 8 if visits.query_tile > 64 or block_d > 128 else 4
    needed = dtype.itemsize * block_d * (visits.query_tile + 3 * 2 * visits.key_tile)
    return warps, STAGES_OF_LISTS if needed <= LARGEST_SHARED_MEMORY else FEWER_STAGES_OF_LISTS


def config_of(dtype: torch.dtype, block_d: int, num_queries: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, stages. float32 needs twice the shared memory."""
    if dtype == torch.float32:
        return (64, 64, 4, 1) if block_d <= 128 else (16, 64, 4, 1)
    return FEW_QUERIES if num_queries <= FEW_QUERIES[0] else CONFIGS[max(64, block_d)]
