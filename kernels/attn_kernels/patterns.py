"""Visibility patterns: which keys a query visits.

A static pattern is a function of two positions and knows nothing of tensors' layouts or of models: it answers for positions
counted from the sequence's first real token, so that left padding moves nothing. Kernels evaluate the same formulas without an
index in memory. Key tiles are chosen by a method for one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from attn_kernels.inputs import AttentionInputs, Rows


class Pattern(Protocol):
    """Anything that tells visible pairs from invisible ones; causality is not its business."""

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Bool tensor, broadcast over the two long tensors of positions."""
        ...


@dataclass(frozen=True)
class SinkAndWindow:
    """The first ``sinks`` keys and the last ``window`` keys (the query's own included).

    For sinks 1 and window 2, queries 0 to 4 down, keys across::

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 . 1 1 .
        1 . . 1 1
    """

    sinks: int
    window: int

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return (key_position < self.sinks) | (query_position - key_position < self.window)


@dataclass(frozen=True)
class PowerOfTwoBlocks:
    """Blocks at distance 0, 1, 2, 4, 8, ... plus a local window and the first blocks (PowerAttention, section 3).

    With ``n`` the distance in blocks, a pair is visible iff ``n < window_blocks`` or ``n`` is 0 or a power of two, or
    the key lies in the first ``sink_blocks`` blocks.
    """

    block: int
    window_blocks: int
    sink_blocks: int

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        query_block = torch.div(query_position, self.block, rounding_mode="floor")
        key_block = torch.div(key_position, self.block, rounding_mode="floor")
        distance = query_block - key_block
        power_of_two = (distance >= 0) & ((distance & (distance - 1)) == 0)
        return (distance < self.window_blocks) | power_of_two | (key_block < self.sink_blocks)


@dataclass(frozen=True)
class ShardedBlocks:
    """A local window of blocks, and of those further back every so many, others in each head (S2-Attention, section 2).

    With ``n`` the distance in blocks, a pair is visible iff ``n < local_blocks`` or the key's block plus the head's phase is a
    multiple of ``stride``.
    """

    block: int
    local_blocks: int
    stride: int
    phases: Tensor  # (H,) int32

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        query_block = torch.div(query_position, self.block, rounding_mode="floor")
        key_block = torch.div(key_position, self.block, rounding_mode="floor")
        in_shard = (key_block + self.phases[:, None, None]) % self.stride == 0
        return (query_block - key_block < self.local_blocks) | in_shard

    def __repr__(self) -> str:
        return f"{self.local_blocks} local blocks of {self.block} and one in {self.stride} further back"


@dataclass(frozen=True)
class Stripes:
    """Single keys that consecutive tiles of queries visit together.

    Attributes:
        kept: ``(b, h, G, M)`` bool: group g has the tiles from ``g * tiles`` on. Only keys count that lie before the group's
            first query, and in no key tile that one of its tiles has chosen.
        tiles: tiles of queries in a group.
    """

    kept: Tensor
    tiles: int


@dataclass(frozen=True)
class KeyTiles:
    """Which tiles of keys each tile of queries visits in one call, and which single keys.

    All are counted from a sample's first real query and key, so that padding on the left moves nothing. Of a causal call they are
    chosen among what lies behind: keys ahead of a query that the model's own mask shows, as within an image, stay.

    Attributes:
        chosen: ``(b, h, T, S)`` bool; ``b`` is B or 1, ``h`` the number of query heads or 1. What the model itself hides stays
            hidden.
        query_tile: rows of a tile: tile t has the call's queries from ``t * query_tile`` on. 1: each query chooses for itself.
        key_tile: keys of a tile: tile s has the keys from ``s * key_tile`` on.
        columns: ``(b, h, C)`` int64, or None: single keys that every tile of queries visits which lies behind them as a whole; what
            is nearer has its tiles. Without repetition; numbers from M on stand for no key. Or ``Stripes``.
    """

    chosen: Tensor
    query_tile: int
    key_tile: int
    columns: Tensor | Stripes | None = None

    def shown(self, inputs: AttentionInputs, rows: Rows) -> Tensor:
        """``(B|1, h, n, M)`` bool for some of the call's queries."""
        chosen, device = self.chosen, self.chosen.device
        first_key = first_real_key(inputs)[:, None]
        # What lies before is padding, which nobody sees.
        of_query = self._tile_of(torch.arange(inputs.num_queries, device=device)[rows], inputs)
        key = (torch.arange(inputs.num_keys, device=device) - first_key).clamp(min=0)
        of_key = key // self.key_tile
        samples = max(len(chosen), len(first_key))
        shown = torch.stack(
            [
                chosen[sample % len(chosen)][:, of_query[sample % len(of_query)]][..., of_key[sample % len(of_key)]]
                for sample in range(samples)
            ]
        )
        if inputs.causal:
            shown = shown | (inputs.key_index > inputs.query_index[rows, None])
        if self.columns is None:
            return shown
        if isinstance(self.columns, Stripes):
            stripes, group = self.single_keys(inputs), of_query // self.columns.tiles
            return shown | torch.stack(
                [
                    stripes[sample % len(stripes)][:, group[sample % len(group)]][..., key[sample % len(key)]]
                    for sample in range(max(samples, len(stripes)))
                ]
            )
        batch, heads, _ = self.columns.shape
        is_column = torch.zeros(batch, heads, inputs.num_keys + 1, dtype=torch.bool, device=device)
        is_column = is_column.scatter_(2, self.columns.clamp(max=inputs.num_keys), True)
        is_column = is_column.expand(samples, -1, -1).gather(2, key.expand(samples, -1)[:, None].expand(-1, heads, -1))
        behind = key[:, None, :] < self._first_of_tile(of_query, inputs)[:, :, None]
        return shown | (is_column[:, :, None] & behind[:, None])

    def of_last_row(self, inputs: AttentionInputs) -> KeyTiles:
        """The same for the call's last query alone."""
        tile = self._tile_of(torch.tensor([inputs.num_queries - 1], device=self.chosen.device), inputs)[
            :, :, None, None
        ]
        samples = max(len(self.chosen), len(tile))
        chosen = self.chosen.expand(samples, -1, -1, -1)
        place = tile.transpose(1, 2).expand(samples, chosen.shape[1], 1, chosen.shape[3])
        columns = self.columns
        if isinstance(columns, Stripes):
            kept = self.single_keys(inputs)
            group = tile // columns.tiles
            kept = kept.expand(max(len(kept), samples), -1, -1, -1)
            kept = kept.gather(2, group.transpose(1, 2).expand(len(kept), kept.shape[1], 1, kept.shape[3]))
            columns = Stripes(kept, columns.tiles)
        elif columns is not None:
            first = self._first_of_tile(tile[:, 0, 0], inputs)[:, None]
            columns = torch.where(columns < first, columns, inputs.num_keys)
        return KeyTiles(chosen.gather(2, place), self.query_tile, self.key_tile, columns)

    def single_keys(self, inputs: AttentionInputs) -> Tensor:
        """``(b, h, G, M)`` bool: the stripes that count."""
        assert isinstance(self.columns, Stripes)
        kept, tiles = self.columns.kept, self.columns.tiles
        groups = kept.shape[2]
        in_tile = functional.pad(self.chosen, (0, 0, 0, groups * tiles - self.chosen.shape[2]))
        in_tile = in_tile.unflatten(2, (groups, tiles)).any(3).repeat_interleave(self.key_tile, -1)
        first = self._first_of_tile(torch.arange(groups, device=kept.device)[None] * tiles, inputs)
        behind = torch.arange(kept.shape[3], device=kept.device) < first[:, None, :, None]
        return kept & behind & ~in_tile[..., : kept.shape[3]]

    def _first_of_tile(self, tile: Tensor, inputs: AttentionInputs) -> Tensor:
        """Positions, from the first real key on, of the first queries of tiles ``(B|1, n)``."""
        first_row = (inputs.query_offset - first_real_key(inputs)).clamp(min=0)
        return first_row[:, None] + tile * self.query_tile

    def _tile_of(self, queries: Tensor, inputs: AttentionInputs) -> Tensor:
        """``(B|1, n)``: the tiles of queries ``(n,)``; the first one's for rows of padding."""
        first_row = (first_real_key(inputs)[:, None] - inputs.query_offset).clamp(min=0)
        return (queries - first_row).clamp(min=0) // self.query_tile

    def __repr__(self) -> str:
        queries = "one query" if self.query_tile == 1 else f"{self.query_tile} queries"
        return f"key tiles of {queries} and {self.key_tile} keys"


@dataclass(frozen=True)
class HeaviestKeys:
    """Each query visits the ``count`` heaviest of the keys that the model's own rules let it see; of equal ones the newest.

    Attributes:
        weight: ``(b, h, M)`` float; ``b`` is B or 1.
        count: keys visited.
        group: so many consecutive query heads share each of the ``h``.
    """

    weight: Tensor
    count: int
    group: int = 1

    def shown(self, inputs: AttentionInputs, rows: Rows) -> Tensor:
        """``(B|1, h * group, n, M)`` bool for some of the call's queries. The model's mask must be the same for all heads."""
        visible = inputs.visible(rows)
        if visible.shape[1] > 1:
            raise ValueError("a mask for each head leaves open which keys a group's heads choose from")
        weight = self.weight[:, :, None].masked_fill(~visible, -torch.inf)
        return largest(weight.flip(-1), self.count).flip(-1).repeat_interleave(self.group, 1)

    def __repr__(self) -> str:
        return f"the {self.count} heaviest keys"


def largest(numbers: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of each row ``(..., S)`` stand, bool; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(numbers, dtype=torch.bool)
    count = min(count, numbers.shape[-1])
    border = numbers.topk(count).values[..., -1:]
    above, equal = numbers > border, numbers == border
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def first_real_key(inputs: AttentionInputs) -> Tensor:
    """``(B|1,)`` long: the place of each sample's first real key; 0 where it has none."""
    return inputs.key_valid.long().argmax(-1)
