"""Companion rows: the same prompts without their images, in one batch with the prompts and in step with them, layer by layer.

For methods that compare a layer's heads with and without the image while the layers below are edited in both (VHR). The decoder's
prompt of B rows becomes one of 2 B: below the prompts their texts alone, padded on the left, with positions of their own.
When the decoder is done the companions are gone again from its outputs, from the cache and from what edits remember, so that
decode costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from attn_hooks.errors import error
from attn_hooks.layout import TokenLayout
from attn_hooks.model_info import ModelInfo
from attn_hooks.sequence import SequenceTracker


class Lockstep:
    """Hooks of the decoder around its prompts."""

    def __init__(self, method: str, model: ModelInfo, tracker: SequenceTracker, embed: Callable[[], nn.Module]) -> None:
        self.method, self.model, self.tracker, self.embed = method, model, tracker, embed

    @torch.compiler.disable(reason="attn_hooks adds companion rows to a prompt on the host")
    def before_forward(
        self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder, before all others."""
        in_flight = self.tracker.in_flight
        in_flight.companions = 0
        given = dict(zip(self.tracker.parameters, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        tokens = given.get("input_ids")
        tokens = in_flight.outer_tokens if tokens is None else tokens
        if past or in_flight.without_edits:
            return None
        if tokens is None:
            if in_flight.in_second_stream:
                return None
            reason = "the forward was given embeddings, which do not tell an image's tokens: give it input_ids"
            raise error("no-companions", method=self.method, model=self.model.model_class, reason=reason)
        images = self.model.images_in(tokens, in_flight.outer_given or given)
        if not images:
            return None
        self._refuse(given)
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.embed()(tokens)
        mask = given.get("attention_mask")
        mask = torch.ones_like(tokens) if mask is None else mask
        layout = TokenLayout.of_tokens(tokens, mask.bool(), self.model.bos_token_id, images)
        kept = mask.bool() & ~self.model.image_and_marks(tokens, layout).to(mask.device)
        # To the right, in order; what is left out becomes padding on the left.
        order = torch.sort(kept.to(torch.uint8), dim=1, stable=True).indices
        own_mask = kept.gather(1, order)
        given["inputs_embeds"] = torch.cat([embeddings, embeddings.gather(1, order[..., None].expand_as(embeddings))])
        given["input_ids"] = None
        given["attention_mask"] = torch.cat([mask, own_mask.to(mask)])
        given["position_ids"] = self._positions(given.get("position_ids"), mask, own_mask)
        if given.get("visual_pos_masks") is not None:
            marked = given["visual_pos_masks"]
            given["visual_pos_masks"] = torch.cat([marked, torch.zeros_like(marked)])
        filler = torch.zeros_like(tokens)
        in_flight.outer_tokens = torch.cat([tokens, torch.where(own_mask, tokens.gather(1, order), filler)])
        in_flight.companions = len(tokens)
        return (), given

    def _refuse(self, given: dict[str, Any]) -> None:
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        reason = None
        if isinstance(cache, Cache) and cache.is_compileable:
            reason = "a static cache has no room for them"
        elif mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            reason = "the decoder is handed a finished mask, which does not say how theirs would look"
        if reason is not None:
            raise error("no-companions", method=self.method, model=self.model.model_class, reason=reason)

    def _positions(self, given: Tensor | None, mask: Tensor, own_mask: Tensor) -> Tensor:
        own = (own_mask.long().cumsum(-1) - 1).clamp(min=0)
        if given is None:
            given = torch.arange(mask.shape[1], device=mask.device)[None]
        if given.ndim == 2:
            return torch.cat([given.expand_as(own), own])
        # Multimodal RoPE counts text alike in all its dimensions.
        return torch.cat([given, own.expand(len(given), -1, -1)], dim=1)

    @torch.compiler.disable(reason="attn_hooks takes companion rows away on the host")
    def after_forward(self, _decoder: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the decoder, after all others."""
        in_flight = self.tracker.in_flight
        prompts, in_flight.companions = in_flight.companions, 0
        if not prompts:
            return None
        parts = output.values() if isinstance(output, ModelOutput) else output
        cache = next((part for part in parts if isinstance(part, Cache)), None)
        if cache is not None:
            cache.batch_select_indices(torch.arange(prompts, device=output[0].device))
        if in_flight.current is not None:
            in_flight.current.keep_rows(prompts)
        return first_rows(output, prompts)


def first_rows(output: Any, rows: int) -> Any:
    """A module's output without the second half of its ``2 * rows`` rows."""
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            if not isinstance(value, Cache):
                output[name] = first_rows(value, rows)
        return output
    if isinstance(output, tuple):
        return tuple(first_rows(part, rows) for part in output)
    return output[:rows] if isinstance(output, Tensor) and len(output) == 2 * rows else output
