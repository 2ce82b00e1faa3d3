"""How much the class token of a vision tower attends to each patch, read while the tower runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attn_hooks.call import AttentionCall
from attn_hooks.errors import error
from attn_hooks.layout import ImageSpan
from attn_hooks.model_info import ModelInfo
from attn_hooks.sequence import CLASS_ATTENTION, SequenceTracker

LAYERS = {"first": 0, "second to last": -2}
"""Layers of the tower that are read, by name."""


def require_class_token(method: str, model: ModelInfo) -> None:
    """Raises ``EditError`` unless the images of ``model`` are the patches of a CLIP tower, one token a patch."""
    model.require_image_keys(method)
    assert model.vision is not None, "it has image keys"
    config = model.vision.config
    tower = getattr(getattr(config, "vision_config", None), "model_type", "unknown")
    reason = None
    if tower != "clip_vision_model":
        reason = f"its vision tower, {tower}, is not CLIP's"
    elif config.model_type != "llava":
        reason = f"{config.model_type} makes no one token of each patch of one view"
    if reason is not None:
        raise error("no-class-attention", method=method, model=model.model_class, reason=reason)


def read_class_attention(model: nn.Module, tracker: SequenceTracker) -> list[RemovableHandle]:
    """Hooks on the query and key projections of the tower's ``LAYERS``; what they read is handed to the next forward."""
    towers = [
        module
        for module in model.modules()
        if getattr(getattr(module, "config", None), "model_type", None) == "clip_vision_model"
        and hasattr(module, "q_proj")
    ]
    handles = []
    for name, place in LAYERS.items():
        attention: Any = towers[place]
        reader = _Reader(tracker, name, attention.num_heads, attention.scale)
        handles += [
            attention.q_proj.register_forward_hook(reader.after_query),
            attention.k_proj.register_forward_hook(reader.after_key),
        ]
    return handles


class _Reader:
    """The class token's row of weights in one layer of the tower, from the outputs of its projections ``(images, 1 + P, E)``."""

    def __init__(self, tracker: SequenceTracker, name: str, num_heads: int, scale: float) -> None:
        self.tracker, self.name, self.num_heads, self.scale = tracker, name, num_heads, scale

    @torch.compiler.disable(reason="attn_hooks reads the vision tower on the host")
    @torch.no_grad()
    def after_query(self, _projection: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self._runs().append(output[:, :1].detach())

    @torch.compiler.disable(reason="attn_hooks reads the vision tower on the host")
    @torch.no_grad()
    def after_key(self, _projection: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        runs = self._runs()
        query, key = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).float() for part in (runs.pop(), output))
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(-1)  # (images, heads, 1, 1 + P)
        runs.append(weights[:, :, 0, 1:].sum(1))

    def _runs(self) -> list[Tensor]:
        flight = self.tracker.in_flight
        if flight.class_attention is None:
            flight.class_attention = {}
        return flight.class_attention.setdefault(self.name, [])


def class_attention(method: str, call: AttentionCall) -> tuple[dict[str, Tensor], list[Tensor]]:
    """``class_attention_in`` for the images of the forward that ``call`` belongs to."""
    past = call.layout.length - call.inputs.num_queries
    images = [image for image in call.layout.images if image.start >= past]
    return class_attention_in(method, call.model, images, call.of_forward.get((CLASS_ATTENTION,)))


def class_attention_in(
    method: str, model: str, images: Sequence[ImageSpan], read: dict[str, list[Tensor]] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """For the ``images`` of one forward, in the order of its layout, by what was ``read`` of the tower before it.

    Attention ``(images, P)`` by name of ``LAYERS``, summed over heads, and the key positions ``(P,)`` of each image's patches.
    Raises ``EditError`` where the tower did not run once for these images since the forward before.
    """
    runs = read or {}
    counts = {len(run) for run in runs.values()}
    reason = None
    if counts != {1}:
        reason = f"it ran {max(counts, default=0)} times for this forward, and features made elsewhere do not tell"
    elif any(image.grids is None for image in images):
        reason = next(image.why_no_grid for image in images if image.grids is None)
    rows = {name: run[0] for name, run in runs.items()}
    seen = len(next(iter(rows.values()))) if rows else 0
    if reason is None and (not seen or len(images) % seen):
        reason = f"it saw {seen} images, and the prompts hold {len(images)}"
    if reason is not None:
        raise error("no-class-attention", method=method, model=model, reason=reason)
    patches = [torch.cat([image.patches(grid).flatten() for grid in image.grids or ()]) for image in images]
    # generate() may have repeated each prompt for its beams after the tower ran.
    beams = len(images) // seen
    by_sample: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        by_sample.setdefault(image.sample // beams, []).append(place)
    source, begin = [0] * len(images), 0
    for places in by_sample.values():
        each = len(places) // beams
        for number, place in enumerate(places):
            source[place] = begin + number % each
        begin += each
    return {name: row[source] for name, row in rows.items()}, patches
