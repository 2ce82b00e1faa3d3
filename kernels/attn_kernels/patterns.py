"""Static visibility patterns: which keys a query visits, as a function of two positions.

A pattern knows nothing of tensors' layouts or of models: it answers for positions counted from the sequence's first
real token, so that left padding moves nothing. Kernels evaluate the same formulas without an index in memory.
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
