"""Imbalanced attention fix (PAINT): raises the logits on two streams of image tokens where the answer is made.

Source: "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206.
With c[l] the attention of the vision tower's class token to each patch in tower layer l, summed over heads:

    B = patches with c[L-2] above Q3 + 1.5 (Q3 - Q1) of the image's patches                 (summary tokens)
    T = the floor(ratio * P) patches of the largest c[0], without B                         (local tokens)
    s[i, j] <- s[i, j] + alpha * |s[i, j]|  for j in T,   s[i, j] + beta * |s[i, j]|  for j in B

on the language model's logits s of the prompt's last row and of every generated row, layers 2 to L-1, all heads, then softmax.
The identity is alpha = beta = 0 and gamma = 1. The class token's row is recomputed from the tower's own queries and keys.

The same guidance as PAI's goes with it (``TextGuidance``, gamma 1.1; 1 for none). Published figures collapse above alpha
0.7: captions double in length while fewer objects are named. The released code takes beta 0.3, the paper's best row 0.4. Its
"spatial" stream ranks row sums of a softmax, which are all 1, so it is a random choice, and is left out.

The abstract promises gains by head; neither repository has them. ``head_modulation="image_mass"`` is our own reading of it: alpha
and beta of a head are multiplied by its weight on the image in the prompt's last row, over the mean of its layer's heads.
``form="add"`` adds alpha and beta themselves, which a constant on all logits does not change.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from attn_hooks.call import AttentionCall
from attn_hooks.class_token import class_attention, require_class_token
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import (
    LATER_TOKENS,
    LaterTokens,
    answering_rows,
    image_keys,
    last_row_logits,
    require_all_heads,
)
from attn_hooks.streams import TextGuidance
from attn_kernels import LogitMap, Primitive

STREAMS = ("local", "summary")


class Imbalanced(TextGuidance):
    """alpha: gain of the local tokens. beta: gain of the summary tokens."""

    method: ClassVar[str] = "imbalanced"
    source: ClassVar[str] = "imbalanced attention fix, arXiv 2501.12206"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "tokens", "vision"})
    writes: ClassVar[Writes] = "logits"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True

    alpha: float = Field(default=0.7, ge=0.0, description="share of its size added to a logit on a local token")
    beta: float = Field(default=0.4, ge=0.0, description="share of its size added to a logit on a summary token")
    ratio: float = Field(default=0.25, ge=0.0, le=1.0, description="part of an image's patches that are local tokens")
    form: Literal["abs", "add"] = Field(default="abs", description="adds the share of |s|, or the number itself")
    head_modulation: Literal["none", "image_mass"] = Field(
        default="none", description="one gain for all heads, as released, or by each head's weight on the image (ours)"
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

    @model_validator(mode="after")
    def _measured_on_one_forward(self) -> Self:
        if self.head_modulation != "none" and self.prompt_length is not None:
            raise ValueError("head_modulation measures the heads on a prompt in one forward: leave prompt_length out")
        return self

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.heads is None and self.layers is None:
            return tuple(layer for layer in model.layer_indices if layer >= 2)
        return Edit.layers_in(self, model)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        require_class_token(self.method, model)

    def is_settled(self, call: AttentionCall) -> bool:
        return self.prompt_length is None or call.layout.length >= self.prompt_length

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        image = call.keys_at(image_keys(self, call, self.prompt_length))
        rows = answering_rows(self, call, self.prompt_length, self.later_tokens)
        if call.phase != "decode":
            past = call.layout.length - call.inputs.num_queries
            new = call.shared_by_layers(("imbalanced", self.ratio), lambda: self._streams(call, past))
            for name, stream in zip(STREAMS, new, strict=True):
                earlier = call.state.get(name, stream[:, :0])[:, :past]
                call.state[name] = torch.cat([functional.pad(earlier, (0, past - earlier.shape[1])), stream], dim=1)
        local, summary = (call.on_this_calls_keys(call.state[name])[:, None] for name in STREAMS)
        heads = call.select_heads(self.heads)
        maps: list[Primitive] = []
        for gain, keys in ((self.alpha, local & image), (self.beta, summary & image)):
            for weight, of_sample in self._head_weights(call, image):
                strength = gain if weight is None else gain * weight
                of_form = {"absolute" if self.form == "abs" else "bias": strength}
                maps.append(LogitMap(keys & of_sample, **of_form, heads=heads, rows=rows))
        return maps

    def _streams(self, call: AttentionCall, past: int) -> Tensor:
        """Bool ``(2, B, N)``: the local and the summary tokens among the tokens of this forward."""
        streams = torch.zeros(2, call.batch, call.inputs.num_queries, dtype=torch.bool)
        if all(image.start < past for image in call.layout.images):
            return streams.to(call.device)
        attention, patches = class_attention(self.method, call)
        first, second_to_last = attention["first"].double().cpu(), attention["second to last"].double().cpu()
        images = [image for image in call.layout.images if image.start >= past]
        for image, at, early, late in zip(images, patches, first, second_to_last, strict=True):
            lower, upper = late.quantile(late.new_tensor([0.25, 0.75]))
            summary = late > upper + 1.5 * (upper - lower)
            local = torch.zeros_like(summary)
            local[early.topk(math.floor(self.ratio * len(early))).indices] = True
            streams[0, image.sample, at - past] = local & ~summary
            streams[1, image.sample, at - past] = summary
        return streams.to(call.device)

    def _head_weights(self, call: AttentionCall, image: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """Factors ``(H,)`` on the gains, and the samples ``(B, 1, 1)`` that each is for."""
        every = torch.ones(call.batch, 1, 1, dtype=torch.bool, device=call.device)
        if self.head_modulation == "none":
            return [(None, every)]
        require_all_heads(self, call)
        if "head weights" not in call.state:
            if call.phase != "prefill":
                raise self.refuse_phase(call, "head_modulation measures the heads on a prompt in one forward.")
            with torch.no_grad():
                mass = _image_mass(call, image)
                call.state["head weights"] = mass / mass.mean(1, keepdim=True).clamp(min=1e-9)
        weights: Tensor = call.state["head weights"]
        sample = torch.arange(call.batch, device=call.device)[:, None, None]
        return [(weight, sample == number) for number, weight in enumerate(weights)]


def _image_mass(call: AttentionCall, image: Tensor) -> Tensor:
    """``(B, H)``: each head's weight on the image in the last real row of each sample, as the model has it unedited."""
    logits, visible = last_row_logits(call)
    logits = logits.masked_fill(~visible, -torch.inf)
    sinks = call.inputs.sink_logits
    if sinks is not None:
        sink = sinks[..., -1:].to(logits).expand(len(logits), -1, -1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : image.shape[-1]]
    return torch.where(image, weights, 0.0).sum(-1)
