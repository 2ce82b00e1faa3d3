"""How much of the last queries' attention each key and each distance holds, for the vertical-slash pattern.

Source: Jiang et al., MInference, arXiv 2407.02490. A first kernel leaves the logits of the last queries, and each
tile's log-sum-exp; a second takes each row's over all tiles; a third sums the weights down the columns and along the diagonals.
Nothing is added up by several programs at once, so that the same call always chooses the same keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import LOWEST_MAXIMUM, load_tile
from attn_kernels.edited_attention.launch import ceil_div, last_contiguous, launch, padded_size
from attn_kernels.edited_attention.tiles import LOG2_E, capped, scores

# Keys of a tile, and warps.
CONFIG = (128, 4)
# So many logits are in memory at once.
MOST_LOGITS = 2**27


@triton.jit
def _last_logits(
    query,
    key,
    logits,
    of_tiles,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    heads_per_kv,
    first_head,
    last,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) + first_head).to(tl.int64)
    place = batch * tl.num_programs(1) + tl.program_id(1)
    row = tl.arange(0, ROWS)
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_d = tl.arange(0, BLOCK_D)
    inside = keys < num_keys
    query_tile = tl.load(
        query + batch * q_b + head * q_h + (num_queries - last + row)[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=(row < last)[:, None] & (in_d < D)[None, :],
        other=0.0,
    )
    key_tile = load_tile(
        key + batch * k_b + head // heads_per_kv * k_h, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True
    )
    found = scores(query_tile, key_tile, scaling * LOG2_E, PRECISION)
    if HAS_SOFTCAP:
        found = capped(found, softcap, True)
    position = query_offset + num_queries - last + row
    seen = inside[None, :] & (keys[None, :] <= position[:, None])
    if HAS_WINDOW:
        seen = seen & (position[:, None] - keys[None, :] < window)
    found = tl.where(seen, found, float("-inf"))
    highest = tl.maximum(tl.max(found, 1), LOWEST_MAXIMUM)
    total = tl.sum(tl.exp2(found - highest[:, None]), 1)
    tl.store(
        logits + (place * last + row)[:, None] * num_keys + keys[None, :],
        found,
        mask=(row < last)[:, None] & inside[None, :],
    )
    tl.store(
        of_tiles + (place * last + row) * tl.num_programs(0) + tl.program_id(0),
        tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")),
        mask=row < last,
    )


@triton.jit
def _of_rows(of_tiles, of_rows, tiles, BLOCK: tl.constexpr):
    """A row's log-sum-exp, of those of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    in_block = tl.arange(0, BLOCK)
    highest, total = tl.full([BLOCK], LOWEST_MAXIMUM, tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, tiles, BLOCK):
        part = tl.load(of_tiles + row * tiles + begin + in_block, mask=begin + in_block < tiles, other=float("-inf"))
        new_highest = tl.maximum(highest, part)
        total = total * tl.exp2(highest - new_highest) + tl.exp2(part - new_highest)
        highest = new_highest
    most = tl.max(highest, 0)
    tl.store(of_rows + row, most + tl.log2(tl.sum(total * tl.exp2(highest - most), 0)))


@triton.jit
def _sums(
    logits,
    of_rows,
    columns,
    diagonals,
    heads,
    first_head,
    last,
    num_keys,
    first_position,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < num_keys
    has_row = row < last
    # A row of no key weighs nothing.
    log_sum = tl.load(of_rows + place * last + row, mask=has_row, other=float("inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum)
    logits += (place * last + row) * num_keys
    by_key = tl.load(logits + entries[None, :], mask=has_row & inside[None, :], other=float("-inf"))
    keys = first_position + row - entries[None, :]
    by_distance = tl.load(logits + keys, mask=has_row & (keys >= 0) & inside[None, :], other=float("-inf"))
    found = (batch * heads + first_head + tl.program_id(1)) * num_keys + entries
    tl.store(columns + found, tl.sum(tl.exp2(by_key - log_sum), 0), mask=inside)
    tl.store(diagonals + found, tl.sum(tl.exp2(by_distance - log_sum), 0), mask=inside)


def column_and_diagonal_sums(
    query: Tensor,
    key: Tensor,
    last: int,
    query_offset: int,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """v and s, ``(B, H, M)`` float32 each: of the causal attention of the ``last`` queries, what each key and each distance holds.

    Args:
        query, key: ``(B, H, N, D)`` and ``(B, K, M, D)`` in one dtype.
        query_offset: place of the first query among the keys.
        scaling, softcap, window: the model's own.
    """
    query, key = last_contiguous(query), last_contiguous(key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    block, warps = CONFIG
    tiles = ceil_div(num_keys, block)
    columns, diagonals = (
        torch.empty(batch, num_heads, num_keys, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    at_once = max(1, MOST_LOGITS // (batch * last * num_keys))
    for first_head in range(0, num_heads, at_once):
        heads = min(at_once, num_heads - first_head)
        logits = columns.new_empty(batch, heads, last, num_keys)
        of_tiles, of_rows = columns.new_empty(batch, heads, last, tiles), columns.new_empty(batch, heads, last)
        launch(
            _last_logits,
            (tiles, heads, batch),
            (
                query,
                key,
                logits,
                of_tiles,
                *query.stride()[:3],
                *key.stride()[:3],
                num_heads // key.shape[1],
                first_head,
                last,
                num_queries,
                num_keys,
                query_offset,
                scaling,
                softcap or 0.0,
                window or 0,
            ),
            {
                "HAS_WINDOW": window is not None,
                "HAS_SOFTCAP": softcap is not None,
                "D": head_dim,
                "BLOCK_D": padded_size(head_dim),
                "ROWS": padded_size(last),
                "BLOCK": block,
                "PRECISION": "ieee",
            },
            warps,
        )
        launch(_of_rows, (batch * heads * last, 1, 1), (of_tiles, of_rows, tiles), {"BLOCK": 128}, 1)
        launch(
            _sums,
            (tiles, heads, batch),
            (
                logits,
                of_rows,
                columns,
                diagonals,
                num_heads,
                first_head,
                last,
                num_keys,
                query_offset + num_queries - last,
            ),
            {"ROWS": padded_size(last), "BLOCK": block},
            warps,
        )
    return columns, diagonals


@triton.jit
def _crossed(
    below,
    crossed,
    number_of_key_tiles,
    num_keys,
    query_offset,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64)
    below += place * (num_keys + 1)
    crossed += (place * tl.num_programs(0) + tile) * number_of_key_tiles
    query = query_offset + tile * QUERY_TILE
    for begin in range(0, number_of_key_tiles, BLOCK):
        numbers = begin + tl.arange(0, BLOCK)
        inside = numbers < number_of_key_tiles
        key = numbers * KEY_TILE
        until = tl.minimum(tl.maximum(query + QUERY_TILE - key, 0), num_keys)
        since = tl.minimum(tl.maximum(query - key - KEY_TILE + 1, 0), num_keys)
        found = tl.load(below + until, mask=inside, other=0) > tl.load(below + since, mask=inside, other=0)
        tl.store(crossed + numbers, found.to(tl.uint8), mask=inside)


def crossed_by(
    distances: Tensor, num_queries: int, num_keys: int, query_offset: int, query_tile: int, key_tile: int
) -> Tensor:
    """``(B, H, T, S)`` bool: tiles in which some query and some key lie at one of the distances ``(B, H, n)`` int64; those from
    M on stand for none."""
    kept = torch.zeros(*distances.shape[:2], num_keys + 2, dtype=torch.int32, device=distances.device)
    kept[..., 1:].scatter_(2, distances, 1)
    # How many kept distances lie below each.
    below = kept[..., :-1].cumsum(-1, dtype=torch.int32)
    tiles, key_tiles = ceil_div(num_queries, query_tile), ceil_div(num_keys, key_tile)
    crossed = torch.empty(*distances.shape[:2], tiles, key_tiles, dtype=torch.uint8, device=distances.device)
    launch(
        _crossed,
        (tiles, distances.shape[0] * distances.shape[1], 1),
        (below, crossed, key_tiles, num_keys, query_offset),
        {"QUERY_TILE": query_tile, "KEY_TILE": key_tile, "BLOCK": 512},
        4,
    )
    return crossed.view(torch.bool)
