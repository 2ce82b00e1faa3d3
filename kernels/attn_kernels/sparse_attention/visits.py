"""Lists of the keys that each tile of queries visits: whole tiles of keys, tiles that need a mask, and single columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.inputs import AttentionInputs


@dataclass(frozen=True)
class Lists:
    """One list for each sample, head and tile of queries, one after the other in a pool.

    Attributes:
        begin: ``(b, h, tiles + 1)`` int32 or int64: where each list begins in the pool, and where the last one ends. ``b`` is B
            or 1; ``h`` is the number of query heads, of key and value heads, or 1.
        pool: ``(n,)`` int32.
    """

    begin: Tensor
    pool: Tensor


@dataclass(frozen=True)
class Visits:
    """What each tile of ``query_tile`` queries visits. A key must not stand in two of its lists, or it would count twice.

    Attributes:
        query_tile: rows of a tile; tile t has the queries from ``t * query_tile`` on.
        key_tile: keys of a tile; tile j has the keys from ``j * key_tile`` on.
        whole: numbers of key tiles that every query of the tile sees in full. None: there are no such lists.
        part: numbers of key tiles of which each query sees what causality, padding and the window leave.
        columns: single keys that every query of the tile sees.
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
        batch, heads, num_keys = inputs.query.shape[0], inputs.num_heads, inputs.num_keys
        tiles = -(-inputs.num_queries // self.query_tile)
        count = torch.zeros(batch, heads, tiles, num_keys, dtype=torch.int32)
        for lists, size in ((self.whole, self.key_tile), (self.part, self.key_tile), (self.columns, 1)):
            if lists is None:
                continue
            begin, pool = lists.begin.cpu(), lists.pool.cpu()
            for b in range(batch):
                for h in range(heads):
                    of_head = h * begin.shape[1] // heads
                    for t in range(tiles):
                        first, stop = begin[b % begin.shape[0], of_head, t : t + 2].tolist()
                        for entry in pool[first:stop].tolist():
                            count[b, h, t, entry * size : (entry + 1) * size] += 1
        return count.repeat_interleave(self.query_tile, dim=2)[:, :, : inputs.num_queries].to(inputs.query.device)


def lists_of(chosen: Tensor) -> Lists:
    """From a mask ``(b, h, tiles, entries)`` bool: the places where it holds. Waits for the device."""
    counts = chosen.sum(-1).flatten()
    ends = counts.cumsum(0)
    begin = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    tiles = chosen.shape[2]
    rows = torch.arange(chosen.shape[0] * chosen.shape[1], device=chosen.device).view(chosen.shape[:2])
    places = rows[..., None] * tiles + torch.arange(tiles + 1, device=chosen.device)
    return Lists(begin[places].contiguous(), chosen.nonzero()[:, -1].to(torch.int32))
