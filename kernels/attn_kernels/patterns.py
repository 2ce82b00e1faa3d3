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
class KeyTiles:
    """Which tiles of keys each tile of queries visits in one call.

    Attributes:
        chosen: ``(b, h, T, S)`` bool; ``b`` is B or 1, ``h`` the number of query heads, of key and value heads, or 1. What the
            model itself hides stays hidden.
        query_tile: rows of a tile: tile t has the call's queries from ``t * query_tile`` on.
        key_tile: keys of a tile: tile s has the keys from ``s * key_tile`` on, by place, padding counted.
    """

    chosen: Tensor
    query_tile: int
    key_tile: int

    def shown(self, queries: Tensor, num_heads: int, num_keys: int) -> Tensor:
        """``(b, H|1, n, M)`` bool for the long ``queries`` (n,) of the call."""
        by_head = (
            self.chosen
            if self.chosen.shape[1] == 1
            else self.chosen.repeat_interleave(num_heads // self.chosen.shape[1], dim=1)
        )
        key_tile_of = torch.arange(num_keys, device=self.chosen.device) // self.key_tile
        return by_head[:, :, queries // self.query_tile][..., key_tile_of]

    def __repr__(self) -> str:
        return f"key tiles of {self.query_tile} queries and {self.key_tile} keys"
