"""PAI: pay attention to the image, by a map of the answering rows' logits on its keys.

Source: Liu et al., "Paying More Attention to Image", ECCV 2024, arXiv 2407.21771. On the logits s of the last row of a
prompt and of every generated row, for the keys j of the image:

    s[i, j] <- s[i, j] + alpha * |s[i, j]|

then softmax, so rows still sum to 1; and guidance on the next token's log-probabilities p, against p0 of the same text
without its image on the unedited model, with a cutoff of a tenth of the likeliest token (``TextGuidance``):

    p <- gamma (p - p0) + p0

The identity is alpha 0 and gamma 1. The published settings are alpha 0.2 (0.5 in follow-ups), gamma 1.1, layers 2 to L-1;
``gamma=1.0`` is the attention part alone, without a second stream. The map is not invariant to a constant on all logits, so
its strength differs between models.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import LATER_TOKENS, LaterTokens, answering_rows, image_keys
from attn_hooks.streams import TextGuidance
from attn_kernels import LogitMap, Primitive


class PAI(TextGuidance):
    """alpha: how much of its own size is added to a logit on the image."""

    method: ClassVar[str] = "pai"
    source: ClassVar[str] = "PAI, arXiv 2407.21771"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "tokens"})
    writes: ClassVar[Writes] = "logits"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True

    alpha: float = Field(
        default=0.2, ge=0.0, description="share of its size added to a logit on the image; 0: identity"
    )
    layers: Layers | None = Field(default=None, description="layers edited; None: 2 to L-1")
    heads: Heads | None = Field(
        default=None, description="query heads edited, pairs (layer, head); None: all of those layers"
    )
    prompt_length: Positive | None = Field(
        default=None, description="padded length of the prompt, needed if it comes in several forwards"
    )
    later_tokens: LaterTokens = Field(default="refuse", description=LATER_TOKENS)

    @model_validator(mode="after")
    def _turns_or_parts(self) -> Self:
        if self.later_tokens == "turn" and self.prompt_length is not None:
            raise ValueError(
                "with prompt_length all tokens behind it count as generated: leave it out, or later_tokens"
            )
        return self

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.heads is None and self.layers is None:
            return tuple(layer for layer in model.layer_indices if layer >= 2)
        return Edit.layers_in(self, model)

    def is_settled(self, call: AttentionCall) -> bool:
        return self.prompt_length is None or call.layout.length >= self.prompt_length

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        rows = answering_rows(self, call, self.prompt_length, self.later_tokens)
        keys = call.shared_by_layers(("image keys",), lambda: call.keys_at(image_keys(self, call, self.prompt_length)))
        return [LogitMap(keys, absolute=self.alpha, heads=call.select_heads(self.heads), rows=rows)]
