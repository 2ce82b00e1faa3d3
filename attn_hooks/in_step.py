"""One forward for both streams of a decode step: the rows of the second below those of the first.

Decode waits for the host, and for the weights to be read, so that twice the rows take hardly longer. It needs streams of the same
tokens at the same positions, and caches that grow by concatenation. Between steps each cache has its own rows, as views of what
lies together in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attn_hooks.lockstep import first_rows

# Of a forward's arguments those with a row for each sequence, and those that all rows have in common.
OF_EACH_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
OF_ALL_ROWS = ("cache_position", "logits_to_keep")
# Without pixels nobody reads these.
OF_IMAGES = (
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
)


@dataclass(frozen=True)
class _Layer:
    """What both streams' layers hold, and where it lies together: keys and values."""

    own: tuple[Tensor, Tensor, Tensor, Tensor]
    together: tuple[Tensor, Tensor]


@dataclass
class InStep:
    """Two caches that go in step. ``batch``: the rows of each. ``first`` is known for the length of a step: that cache holds this
    object, and both would outlive it until the garbage collector comes."""

    second: Any
    batch: int
    layers: list[_Layer] = field(default_factory=list)
    first: Any = None

    def join(self, first: Any) -> None:
        """The first cache gets the rows of the second below its own."""
        self.first = first
        known, self.layers = self.layers, []
        for place, (mine, other) in enumerate(zip(self.first.layers, self.second.layers, strict=True)):
            own = (mine.keys, mine.values, other.keys, other.values)
            layer = known[place] if known else None
            if layer is not None and all(held is shown for held, shown in zip(own, layer.own, strict=True)):
                mine.keys, mine.values = layer.together
            else:
                mine.keys, mine.values = torch.cat([own[0], own[2]]), torch.cat([own[1], own[3]])
            # What lay together goes as soon as the first cache has something longer.
            other.keys = other.values = None

    def part(self) -> None:
        """Each cache gets its own rows again, a step longer, if they lie together."""
        if self.first is None:
            return
        for mine, other in zip(self.first.layers, self.second.layers, strict=True):
            together = (mine.keys, mine.values)
            mine.keys, other.keys = together[0].split(self.batch)
            mine.values, other.values = together[1].split(self.batch)
            if mine.is_sliding:
                other.cumulative_length = mine.cumulative_length
            self.layers.append(_Layer((mine.keys, mine.values, other.keys, other.values), together))
        self.first = None

    def outputs(self, output: Any) -> tuple[Any, Tensor]:
        """A forward's output for the first stream alone, and the second's logits ``(B, n, vocabulary)``."""
        logits = output.logits if hasattr(output, "logits") else output[0]
        return first_rows(output, self.batch), logits[self.batch :]


def can_join(first: Any, second: Any) -> bool:
    """Whether the layers of both caches grow by concatenation, and hold as much."""
    if not isinstance(first, Cache) or not isinstance(second, Cache) or getattr(first, "offloading", False):
        return False
    return len(first.layers) == len(second.layers) and all(
        type(mine) is type(other)
        and type(mine) in (DynamicLayer, DynamicSlidingWindowLayer)
        and mine.is_initialized
        and other.is_initialized
        and mine.keys.shape == other.keys.shape
        and not getattr(mine, "record_past", False)
        for mine, other in zip(first.layers, second.layers, strict=True)
    )


def for_both(given: Mapping[str, Any], batch: int) -> dict[str, Any] | None:
    """The arguments ``given`` of a forward over ``batch`` rows, for both streams; None where one of them cannot be doubled."""
    both = dict(given)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            if isinstance(value, Mapping):
                return None
            continue
        # Multimodal RoPE counts in several dimensions, which come first.
        dimension = 1 if name == "position_ids" and value.ndim == 3 else 0
        if name in OF_EACH_ROW:
            if value.shape[dimension] not in (1, batch):
                return None
            if value.shape[dimension] == batch:
                both[name] = torch.cat([value, value], dim=dimension)
        elif name not in OF_ALL_ROWS and name not in OF_IMAGES:
            return None
    return both
