"""One attention call, as a method sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attn_hooks import engine
from attn_hooks.layout import TokenLayout
from attn_hooks.model_info import ModelInfo
from attn_kernels import AttentionInputs, Primitive, Tap, head_selection, indices_of_heads, read_taps
from attn_kernels.primitives import TapKind

T = TypeVar("T")
Phase = Literal["prefill", "chunk", "decode"]
"""``prefill``: the first forward of a sequence; ``decode``: one more token; ``chunk``: several more tokens at once."""


@dataclass(frozen=True)
class AttentionCall:
    """Everything that one call of one layer offers to a method.

    ``key_start`` is the place in the sequence of the first key: not 0 where a sliding cache has dropped keys.
    ``heads`` are the global indices of the query heads present, which under tensor parallelism are this rank's.
    ``state`` is the method's own memory of this sequence in this layer; it lives as long as the cache.
    ``earlier`` holds the primitives of methods that act before this one; taps see their effect. ``selections`` are the
    layer's head selections so far: the same heads are the same tensor in every call. ``vendor`` keeps plain attention's
    output and log-sum-exp, if a tap needed them, for the engine. ``of_forward`` is what ``shared_by_layers`` keeps.
    ``hidden_states``, for edits that read ``hidden``: the residual stream of this call's tokens as it enters the decoder
    layer, before its norm, perhaps on another device; None while a decode step is prepared that was not taken yet.
    ``companions``: so many rows of the batch, the last, are the prompts without their images, in the prefill of methods that
    declare ``needs_companions``.
    ``info`` is what ``inspect_model`` found, None only in calls made by hand.
    """

    inputs: AttentionInputs
    model: str
    layer: int
    num_layers: int
    heads: range
    phase: Phase
    layout: TokenLayout
    image_token_id: int | None
    key_kinds: Tensor  # (B, M) uint8
    prompt_length: int | None
    state: dict[str, Any]
    earlier: list[Primitive] = field(default_factory=list)
    key_start: int = 0
    selections: dict[Any, Tensor] = field(default_factory=dict)
    vendor: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    of_forward: dict[Any, Any] = field(default_factory=dict)
    hidden_states: Tensor | None = None  # (B, N, E)
    info: ModelInfo | None = None
    companions: int = 0

    def shared_by_layers(self, place: tuple[object, ...], make: Callable[[], T]) -> T:
        """``make()``, once for all layers of this forward whose calls have as many keys: what depends on tokens alone."""
        place = (*place, self.inputs.num_queries, self.inputs.num_keys, self.device)
        if place not in self.of_forward:
            self.of_forward[place] = make()
        made: T = self.of_forward[place]
        return made

    @property
    def batch(self) -> int:
        return self.inputs.query.shape[0]

    @property
    def device(self) -> torch.device:
        return self.inputs.query.device

    @property
    def fewest_tokens(self) -> int:
        """Real tokens so far of the sample that has the fewest. Waits for the device where there is padding."""
        if not self.inputs.padded:
            return self.layout.length
        return self.shared_by_layers(("fewest tokens",), lambda: int(self.layout.valid.sum(1).min()))

    def select_heads(self, heads: Sequence[tuple[int, int]] | None) -> Tensor | None:
        """``(H,)`` bool over the heads of this call for pairs (layer, head); None stays None: all heads."""
        if heads is None:
            return None
        place = (heads, self.heads, self.device)
        if place not in self.selections:
            named = {head for layer, head in heads if layer == self.layer}
            self.selections[place] = head_selection([head in named for head in self.heads], self.device)
        return self.selections[place]

    def keys_at(self, positions: Tensor) -> Tensor:
        """A key group ``(B|1, 1, M)`` from a bool tensor over key positions ``(B|1, M)``, padding left out."""
        return (positions & self.inputs.key_valid)[:, None, :]

    def tap(self, kind: TapKind, keys: Tensor | None = None, heads: Tensor | None = None) -> Tensor:
        """A reduction of this call's weights over the real rows, under the edits that act before this method.

        See ``attn_kernels.Tap`` for the kinds and shapes. Costs one more pass over the scores of the heads asked for.
        """
        selected = None if heads is None else indices_of_heads(heads)
        rows = self.inputs.query_valid if self.inputs.padded else None
        if engine.has_kernels(self.inputs) and kind in ("column_sum", "column_mean", "group_mass", "log_sum_exp"):
            from attn_kernels.edited_attention import dispatch

            if kind in ("group_mass", "log_sum_exp"):
                found = dispatch.row_totals(self.inputs, self.earlier, selected, keys, self.vendor)
            else:
                found = dispatch.columns(self.inputs, self.earlier, selected, rows, kind == "column_mean", self.vendor)
            if found is not None:
                return found
        results: list[Tensor] = []
        tap = Tap(kind, results.append, keys=keys, rows=self.inputs.query_valid)
        read_taps(self.inputs, [*self.earlier, tap], None if selected is None else selected.long())
        return results[0]

    def on_this_calls_keys(self, group: Tensor) -> Tensor:
        """A key group over the whole sequence ``(B, H|1, T)`` as it lies on this call's keys ``(B, H|1, M)``.

        Keys after the group's end (generated since) are outside it; keys that a sliding cache has dropped are gone.
        """
        start = self.key_start
        present = group[..., start : start + self.inputs.num_keys]
        missing = self.inputs.num_keys - present.shape[-1]
        return torch.nn.functional.pad(present, (0, missing))
