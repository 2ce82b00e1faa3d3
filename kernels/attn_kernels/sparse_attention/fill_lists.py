"""The lists of chosen key tiles and columns, filled by a kernel: without waiting, in one launch.

A program reads one tile of queries' row of the choice, tells tiles that all of its queries see in full from those that need a mask,
and writes both, and the columns outside of all chosen tiles, one after the other into its own part of a pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.launch import batch_stride, ceil_div, launch, strides_of

# Entries looked at together, and warps.
CONFIG = (512, 4)


@triton.jit
def _fill_lists(
    chosen,
    columns,
    bounds,
    whole_pool,
    part_pool,
    column_pool,
    first_keys,
    chosen_b,
    chosen_h,
    column_b,
    column_h,
    first_keys_b,
    number_of_key_tiles,
    number_of_columns,
    room_for_parts,
    num_queries,
    num_keys,
    query_offset,
    window,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    tiles = tl.num_programs(0)
    place = ((batch * tl.num_programs(1) + head) * tiles + tile).to(tl.int64)
    # Begins of all three lists, then their stops.
    stride = tiles.to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
    first_key = 0
    first_row = query_offset + tile * QUERY_TILE
    if HAS_PADDING:
        first_key = tl.load(first_keys + batch * first_keys_b).to(tl.int32)
        first_row += tl.maximum(first_key - query_offset, 0)
    last_row = tl.minimum(first_row + QUERY_TILE, query_offset + num_queries) - 1
    row_of_choice = chosen + batch * chosen_b + head * chosen_h + tile.to(tl.int64) * number_of_key_tiles
    # A tile of rows beyond the last sees nothing.
    seen_tiles = tl.where(first_row <= last_row, (last_row - first_key) // KEY_TILE + 1, 0)
    seen_tiles = tl.minimum(seen_tiles, number_of_key_tiles)
    whole_begin = place * number_of_key_tiles
    part_begin = place * room_for_parts
    whole_stop, part_stop = whole_begin, part_begin
    for begin in range(0, seen_tiles, BLOCK):
        numbers = begin + tl.arange(0, BLOCK)
        is_chosen = tl.load(row_of_choice + numbers, mask=numbers < seen_tiles, other=0) != 0
        first = first_key + numbers * KEY_TILE
        last = first + KEY_TILE - 1
        in_full = (last <= first_row) & (last < num_keys)
        if HAS_WINDOW:
            is_chosen = is_chosen & (last > first_row - window)
            in_full = in_full & (first > last_row - window)
        is_whole = (is_chosen & in_full).to(tl.int32)
        is_part = (is_chosen & (in_full == 0)).to(tl.int32)
        tl.store(whole_pool + whole_stop + tl.cumsum(is_whole, 0) - 1, numbers, mask=is_whole != 0)
        tl.store(part_pool + part_stop + tl.cumsum(is_part, 0) - 1, numbers, mask=is_part != 0)
        whole_stop += tl.sum(is_whole, 0)
        part_stop += tl.sum(is_part, 0)
    tl.store(bounds + place, whole_begin)
    tl.store(bounds + stride + place, part_begin)
    tl.store(bounds + 3 * stride + place, whole_stop)
    tl.store(bounds + 4 * stride + place, part_stop)
    if HAS_COLUMNS:
        column_begin = place * number_of_columns
        column_stop = column_begin
        for begin in range(0, number_of_columns, BLOCK):
            entries = begin + tl.arange(0, BLOCK)
            inside = entries < number_of_columns
            column = tl.load(columns + batch * column_b + head * column_h + entries, mask=inside, other=num_keys)
            behind = (column < first_row - first_key) & (column < num_keys)
            has_tile = tl.load(row_of_choice + column // KEY_TILE, mask=behind, other=1) != 0
            is_kept = (behind & (has_tile == 0)).to(tl.int32)
            tl.store(column_pool + column_stop + tl.cumsum(is_kept, 0) - 1, column.to(tl.int32), mask=is_kept != 0)
            column_stop += tl.sum(is_kept, 0)
        tl.store(bounds + 2 * stride + place, column_begin)
        tl.store(bounds + 5 * stride + place, column_stop)


def fill_lists(
    chosen: Tensor,
    columns: Tensor | None,
    query_tile: int,
    key_tile: int,
    num_queries: int,
    num_keys: int,
    query_offset: int,
    window: int | None,
    first_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Bounds ``(6, b, h, T)`` int64, the begins of tiles in full, tiles with a mask and columns, then their stops; and their pools,
    ``(n,)`` int32 each.

    Args:
        chosen: ``(b, h, T, S)`` bool, T tiles of queries and S of keys.
        columns: ``(b, h, C)`` int64, or None. ``b`` is B or 1, ``h`` H or 1, here as there.
        first_keys: ``(B,)`` int32, the place of each sample's first real key where there is padding on the left.
    """
    tiles, key_tiles = chosen.shape[2:]
    chosen = chosen.contiguous().view(torch.uint8)
    given = [part for part in (chosen, columns) if part is not None]
    batch = max(len(part) for part in (*given, *(() if first_keys is None else (first_keys,))))
    heads = max(part.shape[1] for part in given)
    lists = batch * heads * tiles
    # At the diagonal, at the window's edge, and where the keys end.
    room_for_parts = min(key_tiles, 2 * (ceil_div(query_tile, key_tile) + 1) + 1)
    number_of_columns = 0 if columns is None else columns.shape[2]

    def room(entries: int) -> Tensor:
        return torch.empty(lists * entries, dtype=torch.int32, device=chosen.device)

    bounds = torch.empty(6, batch, heads, tiles, dtype=torch.int64, device=chosen.device)
    whole_pool, part_pool = room(key_tiles), room(room_for_parts)
    column_pool = None if columns is None else room(number_of_columns)
    columns = None if columns is None else columns.contiguous()
    block, warps = CONFIG
    launch(
        _fill_lists,
        (tiles, heads, batch),
        (
            chosen,
            columns,
            bounds,
            whole_pool,
            part_pool,
            column_pool,
            first_keys,
            *strides_of(chosen),
            *strides_of(columns),
            batch_stride(first_keys),
            key_tiles,
            number_of_columns,
            room_for_parts,
            num_queries,
            num_keys,
            query_offset,
            window or 0,
        ),
        {
            "QUERY_TILE": query_tile,
            "KEY_TILE": key_tile,
            "HAS_WINDOW": window is not None,
            "HAS_PADDING": first_keys is not None,
            "HAS_COLUMNS": columns is not None,
            "BLOCK": block,
        },
        warps,
    )
    return bounds, whole_pool, part_pool, column_pool
