"""Lists of the keys that each tile of queries visits: whole tiles of keys, tiles that need a mask, and single columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import KeyTiles, Stripes, first_real_key
from attn_kernels.sparse_attention.fill_lists import fill_lists

# Rows or keys of a tile that the matrix units take, and that fit into a multiprocessor.
TILE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Lists:
    """One list for each sample, head and tile of queries, or so many ``tiles`` together, one after the other in a pool.

    Attributes:
        begin: ``(b, h, tiles)`` int32 or int64: where each list begins in the pool. ``b`` is B or 1; ``h`` is the number of
            query heads, of key and value heads, or 1.
        stop: where it ends, of the same shape, type and strides.
        pool: ``(n,)`` int32.
    """

    begin: Tensor
    stop: Tensor
    pool: Tensor
    tiles: int = 1


@dataclass(frozen=True)
class RowChoice:
    """Which rows of a tile see the listed key tiles at all.

    Attributes:
        chosen: ``(b, h, S, N)`` bool, contiguous: by block of keys and query, counted from a sample's first real ones. ``b`` is B
            or 1, ``h`` the number of query heads, of key and value heads, or 1.
        block: keys of a block, a multiple of the key tile.
    """

    chosen: Tensor
    block: int

    @property
    def heads(self) -> int:
        return self.chosen.shape[1]

    def of_tile(self, first_key: int, rows: slice, first_row: int, sample: int, head: int) -> Tensor:
        """``(n, 1)`` bool on the host: which of ``rows``, by place, where ``first_row`` is the first real one, see the tile."""
        number = slice(rows.start - first_row, min(rows.stop - first_row, self.chosen.shape[3] - first_row))
        return self.chosen[sample % len(self.chosen), head, first_key // self.block, number, None].cpu()


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
        rows: of all these key tiles, a query sees those that lie in its own blocks. None: all.
    """

    query_tile: int
    key_tile: int
    whole: Lists | None = None
    part: Lists | None = None
    columns: Lists | None = None
    rows: RowChoice | None = None

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
            begin, stop, pool = lists.begin.cpu(), lists.stop.cpu(), lists.pool.cpu()
            for b, first_key in enumerate(first_keys):
                first_row = max(0, first_key - inputs.query_offset)
                for h in range(heads):
                    of_head = h * begin.shape[1] // heads
                    size_of_rows = lists.tiles * self.query_tile
                    for t in range(begin.shape[2]):
                        list_of_tile = (b % begin.shape[0], of_head, t)
                        rows = slice(first_row + t * size_of_rows, first_row + (t + 1) * size_of_rows)
                        for entry in pool[begin[list_of_tile] : stop[list_of_tile]].tolist():
                            seen = 1
                            if self.rows is not None and lists is not self.columns:
                                seen = self.rows.of_tile(entry * size, rows, first_row, b, h * self.rows.heads // heads)
                            count[b, h, rows, first_key + entry * size : first_key + (entry + 1) * size] += seen
        return count.to(inputs.query.device)


def lists_of(chosen: Tensor) -> Lists:
    """From a mask ``(b, h, tiles, entries)`` bool: the places where it holds. Waits for the device."""
    counts = chosen.sum(-1)
    ends = counts.flatten().cumsum(0)
    stop = ends.view(counts.shape).to(torch.int32)
    return Lists(stop - counts.to(torch.int32), stop, chosen.nonzero()[:, -1].to(torch.int32))


def visits_of(tiles: KeyTiles, inputs: AttentionInputs, first_keys: Tensor | None) -> Visits:
    """The lists of chosen tiles, without those that causality, padding on the left (``first_keys`` ``(B,)``) and the window hide
    in full. Does not wait for the device."""
    of_call = (inputs.num_queries, inputs.num_keys, inputs.query_offset, inputs.window, first_keys)
    if tiles.query_tile == 1 and tiles.columns is None:
        return _visits_by_row(tiles, inputs, of_call)
    stripes = tiles.columns if isinstance(tiles.columns, Stripes) else None
    single = None if stripes is not None else tiles.columns
    bounds, whole, part, columns = fill_lists(tiles.chosen, single, tiles.query_tile, tiles.key_tile, *of_call)
    of_columns = None if columns is None else Lists(bounds[2], bounds[5], columns)
    if stripes is not None:
        # Keys are tiles of one, which all queries of a group see in full.
        rows = stripes.tiles * tiles.query_tile
        of_groups, shared, _, _ = fill_lists(tiles.single_keys(inputs), None, rows, 1, *of_call)
        of_columns = Lists(of_groups[0], of_groups[3], shared, stripes.tiles)
    return Visits(
        tiles.query_tile,
        tiles.key_tile,
        Lists(bounds[0], bounds[3], whole),
        Lists(bounds[1], bounds[4], part),
        of_columns,
    )


def _visits_by_row(
    tiles: KeyTiles, inputs: AttentionInputs, of_call: tuple[int, int, int, int | None, Tensor | None]
) -> Visits:
    """A tile of queries visits what any of its rows has chosen."""
    query_tile = next((size for size in TILE_SIZES if size >= inputs.num_queries), TILE_SIZES[-1])
    if inputs.query.dtype == torch.float32:
        query_tile = min(query_tile, 64)
    key_tile = next(size for size in (64, 32, 16) if tiles.key_tile % size == 0)
    rows = RowChoice(tiles.chosen.transpose(2, 3).contiguous(), tiles.key_tile)
    missing = -inputs.num_queries % query_tile
    padded = functional.pad(rows.chosen, (0, missing)) if missing else rows.chosen
    of_tiles = padded.unflatten(3, (-1, query_tile)).any(-1).transpose(2, 3)
    of_tiles = of_tiles.repeat_interleave(tiles.key_tile // key_tile, 3)[..., : -(-inputs.num_keys // key_tile)]
    bounds, whole, part, _ = fill_lists(of_tiles, None, query_tile, key_tile, *of_call)
    whole_lists, part_lists = Lists(bounds[0], bounds[3], whole), Lists(bounds[1], bounds[4], part)
    return Visits(query_tile, key_tile, whole_lists, part_lists, rows=rows)
