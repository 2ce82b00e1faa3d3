"""What each key receives: sums of the softmax weights over rows, from a log-sum-exp that somebody else computed.

One product of queries and keys for the heads asked for, and no memory beyond the result: a program owns some keys and
visits the rows that may see them, so that each sum is one program's. The keys lie on the rows of the tile of logits, and
a thread adds up most of its row by itself. Only tiles at the edge of what is visible, and those of a touched key, test
every pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import load_tile, load_whole_tile
from attn_kernels.edited_attention.launch import (
    batch_stride,
    ceil_div,
    last_contiguous,
    launch,
    multiprocessors,
    padded_size,
    strides_of,
)
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered
from attn_kernels.edited_attention.tiles import LOG2_E, capped, mapped_logits, paired_visibility, scores
from attn_kernels.inputs import AttentionInputs

# Keys and rows of a tile, warps and pipeline stages, by padded head size.
CONFIGS: dict[int, tuple[int, int, int, int]] = {64: (128, 64, 4, 3), 128: (128, 64, 4, 3), 256: (64, 64, 4, 2)}
CONFIGS_FLOAT32: dict[int, tuple[int, int, int, int]] = {64: (32, 32, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1)}
# The rows of a key tile are shared by several programs until there are so many a multiprocessor; each gets so many tiles.
PROGRAMS_PER_MULTIPROCESSOR = 4
FEWEST_TILES = 4
# Rows of a row scope that are looked at together, to find the first and the last.
SCANNED_ROWS = 2048
# Keys of a program that adds the shares up, and its warps.
MERGED_KEYS, WARPS_OF_SUM = 512, 4


@triton.jit
def _visible_pairs(
    batch,
    head,
    keys,
    rows,
    query_offset,
    num_queries,
    num_keys,
    window,
    valid,
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
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
):
    """Which of ``keys`` (C,) each of ``rows`` (R,) may see before allow and deny pairs, and a bias in log2: (C, R)."""
    key_inside = keys < num_keys
    row_inside = rows < num_queries
    bias = tl.zeros([keys.shape[0], rows.shape[0]], tl.float32)
    if HAS_MASK:
        given = tl.load(
            mask
            + batch * mask_stride_b
            + head * mask_stride_h
            + rows[None, :].to(tl.int64) * mask_stride_n
            + keys[:, None].to(tl.int64) * mask_stride_m,
            mask=row_inside[None, :] & key_inside[:, None],
            other=0,
        )
        if MASK_IS_BIAS:
            shown = given.to(tl.float32) > LOWEST
            bias = tl.where(shown, given.to(tl.float32), 0.0) * LOG2_E
            visible = shown & key_inside[:, None]
        else:
            visible = (given != 0) & key_inside[:, None]
    else:
        visible = valid[:, None] & (rows >= 0)[None, :]
        if CAUSAL:
            visible = visible & (keys[:, None] <= (rows + query_offset)[None, :])
        if HAS_WINDOW:
            visible = visible & (keys[:, None] > (rows + query_offset - window)[None, :])
    if HAS_VALUES:
        of_query = tl.load(query_value + batch * query_value_stride + rows, mask=row_inside, other=0)
        of_key = tl.load(key_value + batch * key_value_stride + keys, mask=key_inside, other=0)
        by_value = (of_key[:, None] <= of_query[None, :]) & valid[:, None]
        if HAS_ORDER_HEADS:
            if tl.load(order_heads + head) != 0:
                visible = by_value
        else:
            visible = by_value
    return visible, bias


@triton.jit
def _column_pass(
    query,
    key,
    log_sum_exp,
    heads,
    row_scope,
    row_scope_stride,
    result,
    parts,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    lse_b,
    lse_h,
    lse_n,
    used_heads,
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
    key_codes,
    codes_b,
    codes_h,
    codes_length,
    row_codes,
    row_codes_stride,
    map_coefficients,
    pair_heads,
    splits,
    MEAN: tl.constexpr,
    COUNTS_PAIRS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_SCOPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCANNED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The first keys have the most rows under causality, and those programs start first.
    split = tl.program_id(0) % splits
    line = (tl.program_id(0) // splits).to(tl.int64)
    batch = line // used_heads
    head = line % used_heads
    if HAS_HEADS:
        head = tl.load(heads + head).to(tl.int64)
    first_key = tl.program_id(1) * BLOCK_M
    last_key = tl.minimum(first_key + BLOCK_M, num_keys) - 1
    keys = first_key + tl.arange(0, BLOCK_M)
    key_inside = keys < num_keys
    in_n = tl.arange(0, BLOCK_N)
    in_d = tl.arange(0, BLOCK_D)

    # The rows that may see any of these keys, and of them those that see all.
    start_row = 0
    stop_row = num_queries
    inner_start_row = 0
    inner_stop_row = num_queries
    if HAS_MASK or HAS_VALUES:
        inner_stop_row = 0
    else:
        if CAUSAL:
            start_row = tl.maximum(0, first_key - query_offset)
            inner_start_row = tl.maximum(0, last_key - query_offset)
        if HAS_WINDOW:
            stop_row = tl.minimum(num_queries, tl.maximum(0, last_key + window - query_offset))
            inner_stop_row = tl.minimum(num_queries, tl.maximum(0, first_key + window - query_offset))
    code = tl.zeros([BLOCK_M, 1], tl.int32)
    if HAS_CODES:
        codes_base = key_codes + batch * codes_b + head * codes_h
        code = tl.load(codes_base + keys, mask=keys < codes_length, other=0).to(tl.int32)[:, None]
        touched = tl.sum((code != 0).to(tl.int32)) > 0
        inner_stop_row = tl.where(touched, 0, inner_stop_row)
        if NUM_PAIRS > 0:
            # An allow pair may show a key to any row.
            start_row = tl.where(touched, 0, start_row)
            stop_row = tl.where(touched, num_queries, stop_row)
    if HAS_SCOPE:
        scope_base = row_scope + batch * row_scope_stride
        first_scoped = tl.full([SCANNED], 2147483647, tl.int32)
        last_scoped = tl.full([SCANNED], -1, tl.int32)
        for first in tl.range(start_row // SCANNED * SCANNED, stop_row, SCANNED):
            at = first + tl.arange(0, SCANNED)
            scoped = tl.load(scope_base + at, mask=at < num_queries, other=0) != 0
            first_scoped = tl.minimum(first_scoped, tl.where(scoped, at, 2147483647))
            last_scoped = tl.maximum(last_scoped, tl.where(scoped, at, -1))
        start_row = tl.maximum(start_row, tl.min(first_scoped, 0))
        stop_row = tl.minimum(stop_row, tl.max(last_scoped, 0) + 1)

    # In tiles; this program's share of them lies from start to stop, and inner tiles need no test.
    start = start_row // BLOCK_N
    stop = tl.maximum(start, tl.cdiv(stop_row, BLOCK_N))
    share = tl.cdiv(stop - start, splits)
    start = tl.minimum(start + split * share, stop)
    stop = tl.minimum(start + share, stop)
    inner_start = tl.minimum(tl.maximum(tl.cdiv(inner_start_row, BLOCK_N), start), stop)
    inner_stop = tl.minimum(tl.maximum(inner_stop_row // BLOCK_N, inner_start), stop)
    tested_before = inner_start - start
    tested = tested_before + stop - inner_stop

    query_base = query + batch * q_b + head * q_h
    lse_base = log_sum_exp + batch * lse_b + head * lse_h
    key_base = key + batch * k_b + head // heads_per_kv * k_h
    key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, key_inside, False)
    valid = key_inside
    if HAS_VALID:
        valid = tl.load(key_valid + batch * valid_stride + keys, mask=key_inside, other=0) != 0
    to_log2 = scaling * LOG2_E
    # Without a softcap the scaling is left to the exponential.
    scale_now = to_log2 if HAS_SOFTCAP else 1.0
    scale_later = 1.0 if HAS_SOFTCAP else to_log2
    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    scoped_rows = tl.zeros([BLOCK_N], tl.int32)

    for tile in tl.range(inner_start, inner_stop, num_stages=STAGES):
        first = tile * BLOCK_N
        query_tile = load_whole_tile(query_base + first.to(tl.int64) * q_n, in_n * q_n, in_d, D, BLOCK_D, True)
        lse = tl.load(lse_base + (first + in_n) * lse_n)
        # Against plus infinity every weight is 0: of a row that sees nothing, and of one out of scope.
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        if HAS_SCOPE:
            scoped = tl.load(scope_base + first + in_n) != 0
            lse = tl.where(scoped, lse, float("inf"))
            scoped_rows += scoped.to(tl.int32)
        logits = capped(scores(key_tile, query_tile, scale_now, PRECISION), softcap, HAS_SOFTCAP)
        total += tl.sum(tl.exp2(logits * scale_later - lse[None, :]), 1)
    if COUNTS_PAIRS:
        if HAS_SCOPE:
            count += tl.sum(scoped_rows, 0).to(tl.float32)
        else:
            count += ((inner_stop - inner_start) * BLOCK_N).to(tl.float32)

    # Counting has a loop of its own: a tile of weights and one of pairs to count do not fit in the registers.
    for counts in tl.static_range(2 if COUNTS_PAIRS else 1):
        for place in tl.range(0, tested, num_stages=STAGES):
            first = tl.where(place < tested_before, start + place, inner_stop + place - tested_before) * BLOCK_N
            rows = first + in_n
            row_inside = rows < num_queries
            row_code = tl.zeros([1, BLOCK_N], tl.int32)
            if HAS_ROW_CODES:
                row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0)
                row_code = row_code.to(tl.int32)[None, :]
            visible, bias = _visible_pairs(
                batch,
                head,
                keys,
                rows,
                query_offset,
                num_queries,
                num_keys,
                window,
                valid,
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
                HAS_MASK,
                MASK_IS_BIAS,
                LOWEST,
                HAS_VALUES,
                HAS_ORDER_HEADS,
            )
            if HAS_CODES:
                visible = paired_visibility(
                    visible,
                    valid[:, None],
                    code,
                    row_code,
                    head,
                    pair_heads,
                    num_heads,
                    NUM_PAIRS,
                    PAIR_KEYS,
                    PAIR_ROWS,
                )
            if HAS_SCOPE:
                visible = visible & (tl.load(scope_base + rows, mask=row_inside, other=0) != 0)[None, :]
            if counts == 1:
                count += tl.sum(tl.where(visible & row_inside[None, :], 1.0, 0.0), 1)
            else:
                query_tile = load_tile(query_base, rows.to(tl.int64) * q_n, in_d, D, BLOCK_D, row_inside, True)
                lse = tl.load(lse_base + rows * lse_n, mask=row_inside, other=float("-inf"))
                lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
                logits = capped(scores(key_tile, query_tile, to_log2, PRECISION), softcap, HAS_SOFTCAP)
                if MASK_IS_BIAS:
                    logits += bias
                if HAS_CODES:
                    logits = mapped_logits(
                        logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS
                    )
                total += tl.sum(tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0), 1)

    if MEAN and not COUNTS_PAIRS:
        # Where index alone decides, the number of rows is known.
        first_seeing = tl.maximum(0, keys - query_offset) if CAUSAL else tl.zeros([BLOCK_M], tl.int32)
        stop_seeing = tl.minimum(num_queries, keys + window - query_offset) if HAS_WINDOW else num_queries
        count += tl.where(split == 0, tl.maximum(0, stop_seeing - first_seeing), 0).to(tl.float32)
    if HAS_VALID and not HAS_MASK:
        # Inner tiles did not look.
        total = tl.where(valid, total, 0.0)
        count = tl.where(valid, count, 0.0)
    if ONE_SPLIT:
        if MEAN:
            total = total / tl.maximum(count, 1.0)
        tl.store(result + line * num_keys + keys, total, mask=key_inside)
    else:
        lines = tl.num_programs(0) // splits
        part = parts + (split * lines + line) * num_keys + keys
        tl.store(part, total, mask=key_inside)
        if MEAN:
            shift = (lines * splits).to(tl.int64) * num_keys
            tl.store(part + shift, count, mask=key_inside)


@triton.jit
def _add_up(parts, result, num_values, splits, MEAN: tl.constexpr, SIZE: tl.constexpr):
    """``result`` (num_values,) from ``parts`` (2 for a mean, splits, num_values): sums, and rows that were counted."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < num_values
    total = tl.zeros([SIZE], tl.float32)
    count = tl.zeros([SIZE], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts + split * num_values + at, mask=inside, other=0.0)
        if MEAN:
            count += tl.load(parts + (splits + split) * num_values + at, mask=inside, other=0.0)
    if MEAN:
        total = total / tl.maximum(count, 1.0)
    tl.store(result + at, total, mask=inside)


def column_pass(
    inputs: AttentionInputs,
    log_sum_exp: Tensor,
    heads: Tensor | None = None,
    lowered: LoweredEdits | None = None,
    rows: Tensor | None = None,
    mean: bool = False,
    *,
    config: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
) -> Tensor:
    """``(B, h, M)`` float32: the weight that each key receives, summed over the rows of ``rows`` ``(B|1, N)``; None: all.

    ``mean`` divides by the number of those rows that may see the key, 0 where none may. ``log_sum_exp`` ``(B, H, N)`` is
    float32, natural, of the logits under ``lowered``, sink logits included; any strides. ``heads`` (h,) int32 or int64
    are the query heads wanted, None: all. Of ``lowered``, LogitMaps and Orders act; HeadAffines do nothing to weights.
    The result is the same in every run. ``config`` and ``splits`` are chosen from the shapes unless given.

    Raises NotLowered for a Regroup.
    """
    if lowered is not None and lowered.regroup is not None:
        raise NotLowered("columns under a Regroup")
    query, key = last_contiguous(inputs.query), last_contiguous(inputs.key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    used_heads = num_heads if heads is None else len(heads)
    result = query.new_empty(batch, used_heads, num_keys, dtype=torch.float32)
    if result.numel() == 0:
        return result
    block_d = padded_size(head_dim)
    block_m, block_n, warps, stages = config or config_of(query.dtype, block_d)
    key_tiles, lines = ceil_div(num_keys, block_m), batch * used_heads
    if splits is None:
        wanted = ceil_div(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(query.device), key_tiles * lines)
        splits = max(1, min(wanted, ceil_div(num_queries, block_n) // FEWEST_TILES))
    parts = None if splits == 1 else result.new_empty(2 if mean else 1, splits, *result.shape)
    edits = lowered if lowered is not None and lowered.edits_weights else None
    codes = edits.key_codes if edits is not None and edits.edits_logits and edits.key_codes.shape[-1] else None
    row_codes = None if edits is None or codes is None else edits.row_codes
    values = None if edits is None else edits.order_values
    order_heads = None if edits is None else edits.order_heads
    orders = edits is not None and (edits.num_pairs > 0 or values is not None)
    given = inputs.mask if inputs.mask is not None else inputs.bias
    if given is not None:
        given = given.expand(batch, num_heads, -1, -1)
    valid = inputs.key_valid if inputs.padded else None
    launch(
        _column_pass,
        (lines * splits, key_tiles, 1),
        (
            query,
            key,
            log_sum_exp,
            heads,
            None if rows is None else last_contiguous(rows),
            0 if rows is None else batch_stride(last_contiguous(rows)),
            result,
            parts,
            *query.stride()[:3],
            *key.stride()[:3],
            *log_sum_exp.stride(),
            used_heads,
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            num_keys,
            inputs.query_offset,
            inputs.scaling,
            inputs.softcap or 0.0,
            inputs.window or 0,
            valid,
            batch_stride(valid),
            given,
            *((0, 0, 0, 0) if given is None else given.stride()),
            None if values is None else values[0],
            None if values is None else values[1],
            0 if values is None else batch_stride(values[0]),
            0 if values is None else batch_stride(values[1]),
            order_heads,
            codes,
            *strides_of(codes),
            0 if codes is None else codes.shape[-1],
            row_codes,
            batch_stride(row_codes),
            None if edits is None else edits.map_coefficients,
            None if edits is None else edits.pair_heads,
            splits,
        ),
        {
            "MEAN": mean,
            "COUNTS_PAIRS": mean and (rows is not None or given is not None or orders),
            "ONE_SPLIT": splits == 1,
            "HAS_HEADS": heads is not None,
            "HAS_SCOPE": rows is not None,
            "CAUSAL": inputs.causal,
            "HAS_WINDOW": inputs.window is not None,
            "HAS_VALID": valid is not None,
            "HAS_MASK": given is not None,
            "MASK_IS_BIAS": inputs.mask is None and inputs.bias is not None,
            "LOWEST": 0.0 if inputs.bias is None else torch.finfo(inputs.bias.dtype).min / 2,
            "HAS_SOFTCAP": inputs.softcap is not None,
            "HAS_VALUES": values is not None,
            "HAS_ORDER_HEADS": order_heads is not None,
            "HAS_CODES": codes is not None,
            "HAS_ROW_CODES": row_codes is not None,
            "NUM_MAPS": 0 if edits is None else edits.num_maps,
            "MAP_KEYS": 0 if edits is None else edits.map_keys,
            "MAP_ROWS": 0 if edits is None else edits.map_rows,
            "NUM_PAIRS": 0 if edits is None else edits.num_pairs,
            "PAIR_KEYS": 0 if edits is None else edits.pair_keys,
            "PAIR_ROWS": 0 if edits is None else edits.pair_rows,
            "D": head_dim,
            "BLOCK_D": block_d,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "SCANNED": SCANNED_ROWS,
            "PRECISION": "ieee",
            "STAGES": stages,
        },
        warps,
    )
    if parts is not None:
        size = result.numel()
        grid = (ceil_div(size, MERGED_KEYS), 1, 1)
        launch(_add_up, grid, (parts, result, size, splits), {"MEAN": mean, "SIZE": MERGED_KEYS}, WARPS_OF_SUM)
    return result


def config_of(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Keys and rows of a tile, warps, stages."""
    return (CONFIGS_FLOAT32 if dtype == torch.float32 else CONFIGS)[max(64, block_d)]
