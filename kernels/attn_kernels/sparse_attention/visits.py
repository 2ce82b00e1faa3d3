"""Lists of the keys that each tile of queries visits: whole tiles of keys, tiles that need a mask, and single columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import KeyTiles, Stripes, first_real_key

# Places of so many keys in lists are in memory at once.
MOST_PLACES = 2**26


@dataclass(frozen=True)
class Lists:
    """One list for each sample, head and tile of queries, or so many ``tiles`` together, one after the other in a pool.

    Attributes:
        begin: ``(b, h, tiles + 1)`` int32 or int64: where each list begins in the pool, and where the last one ends. ``b`` is B
            or 1; ``h`` is the number of query heads, of key and value heads, or 1.
        pool: ``(n,)`` int32.
    """

    begin: Tensor
    pool: Tensor
    tiles: int = 1


@dataclass(frozen=True)
class Visits:
    """What each tile of ``query_tile`` queries visits. A key must not stand in two of its lists, or it would count twice.

    Tiles and columns are counted from each sample's first real query and key, so that padding on the left moves nothing.

    Attributes:
        query_tile: rows of a tile; tile t has the queries from ``t * query_tile`` on.
        key_tile: keys of a tile; tile j has the keys from ``j * key_tile`` on.
        whole: numbers of key tiles that every query of the tile sees in full. None: there are no such lists.
        part: numbers of key tiles of which each query sees what causality, padding and the window leave.
        columns: single keys that every query of the tile sees; the only lists that tiles may share.
    """

    query_tile: int
    key_tile: int
    whole: Lists | None = None
    part: Lists | None = None
    columns: Lists | None = None

    def visited(self, inputs: AttentionInputs) -> Tensor:
        """``(B, H, N, M)`` bool: the lists as a dense mask, with what the model itself hides left out."""
        shape = (inputs.query.shape[0], inputs.num_heads, inputs.num_queries, inputs.num_keys)
        count = self.counted(inputs)
        return (count > 0).expand(shape) & inputs.visible(slice(0, inputs.num_queries)).expand(shape)

    def counted(self, inputs: AttentionInputs) -> Tensor:
        """``(B, H, N, M)`` int: in how many lists a key stands for a query."""
        batch, heads = inputs.query.shape[0], inputs.num_heads
        count = torch.zeros(batch, heads, inputs.num_queries, inputs.num_keys, dtype=torch.int32)
        first_keys = first_real_key(inputs).expand(batch).tolist()
        for lists, size in ((self.whole, self.key_tile), (self.part, self.key_tile), (self.columns, 1)):
            if lists is None:
                continue
            begin, pool = lists.begin.cpu(), lists.pool.cpu()
            for b, first_key in enumerate(first_keys):
                first_row = max(0, first_key - inputs.query_offset)
                for h in range(heads):
                    of_head = h * begin.shape[1] // heads
                    for t in range(begin.shape[2] - 1):
                        first, stop = begin[b % begin.shape[0], of_head, t : t + 2].tolist()
                        size_of_rows = lists.tiles * self.query_tile
                        rows = slice(first_row + t * size_of_rows, first_row + (t + 1) * size_of_rows)
                        for entry in pool[first:stop].tolist():
                            count[b, h, rows, first_key + entry * size : first_key + (entry + 1) * size] += 1
        return count.to(inputs.query.device)


def lists_of(chosen: Tensor) -> Lists:
    """From a mask ``(b, h, tiles, entries)`` bool: the places where it holds. Waits for the device."""
    counts = chosen.sum(-1).flatten()
    ends = counts.cumsum(0)
    begin = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return Lists(begin[_places_of_begin(chosen)].contiguous(), chosen.nonzero()[:, -1].to(torch.int32))


def visits_of(tiles: KeyTiles, inputs: AttentionInputs, first_keys: Tensor | None) -> Visits:
    """The lists of chosen tiles, without those that causality, padding on the left (``first_keys`` ``(B,)``) and the window hide
    in full. Does not wait for the device."""
    device, offset = inputs.query.device, inputs.query_offset
    number_of_tiles, number_of_key_tiles = tiles.chosen.shape[2:]
    first_row = offset + torch.arange(number_of_tiles, device=device)[:, None] * tiles.query_tile
    first = torch.arange(number_of_key_tiles, device=device)[None, :] * tiles.key_tile
    if first_keys is not None:
        begin = first_keys[:, None, None, None]
        first_row, first = first_row + (begin - offset).clamp(min=0), first + begin
    last_row = (first_row + tiles.query_tile - 1).clamp(max=offset + inputs.num_queries - 1)
    last = first + tiles.key_tile - 1
    seen, in_full = first <= last_row, (last <= first_row) & (last < inputs.num_keys)
    if inputs.window is not None:
        seen, in_full = seen & (last > first_row - inputs.window), in_full & (first > last_row - inputs.window)
    numbers = torch.arange(number_of_key_tiles, device=device)
    whole = _lists_without_waiting(tiles.chosen & in_full, numbers)
    part = _lists_without_waiting(tiles.chosen & seen & ~in_full, numbers)
    columns = None
    if isinstance(tiles.columns, Stripes):
        stripes = tiles.single_keys(inputs)
        columns = _lists_without_waiting(stripes, torch.arange(stripes.shape[3], device=device), tiles.columns.tiles)
    elif tiles.columns is not None:
        # From the first real key on, as columns are.
        row = first_row[None, None] if first_keys is None else first_row - first_keys[:, None, None, None]
        column = tiles.columns[:, :, None, :]
        samples, heads = max(len(tiles.chosen), len(column), len(row)), max(tiles.chosen.shape[1], column.shape[1])
        place = (column // tiles.key_tile).clamp(max=number_of_key_tiles - 1)
        place = place.expand(samples, heads, number_of_tiles, -1)
        has_tile = tiles.chosen.expand(samples, heads, -1, -1).gather(-1, place)
        columns = _lists_without_waiting(~has_tile & (column < row) & (column < inputs.num_keys), column)
    return Visits(tiles.query_tile, tiles.key_tile, whole, part, columns)


def _lists_without_waiting(chosen: Tensor, entries: Tensor, tiles: int = 1) -> Lists:
    """As ``lists_of``, of ``entries`` broadcast over ``chosen``, in a pool that would hold every one."""
    size = chosen.numel()
    ends = chosen.sum(-1).flatten().cumsum(0)
    begin = torch.cat([ends.new_zeros(1), ends])
    before = begin[:-1].view(chosen.shape[:-1])
    entry = entries.to(torch.int32).expand(chosen.shape)
    pool = torch.empty(size + 1, dtype=torch.int32, device=chosen.device)
    # The places of all heads at once could be larger than their keys and values.
    at_once = max(1, MOST_PLACES * chosen.shape[1] // max(1, size))
    for first in range(0, chosen.shape[1], at_once):
        heads = slice(first, first + at_once)
        place = before[:, heads, :, None] + chosen[:, heads].cumsum(-1) - 1
        # What is not chosen goes to a place of its own behind all lists.
        place = torch.where(chosen[:, heads], place, size)
        pool.scatter_(0, place.flatten(), entry[:, heads].flatten())
    return Lists(begin[_places_of_begin(chosen)].contiguous(), pool, tiles)


def _places_of_begin(chosen: Tensor) -> Tensor:
    """``(b, h, tiles + 1)``: where each list's beginning, and the last one's end, stand in all of them one after the other."""
    batch, heads, tiles = chosen.shape[:3]
    rows = torch.arange(batch * heads, device=chosen.device).view(batch, heads, 1)
    return rows * tiles + torch.arange(tiles + 1, device=chosen.device)
