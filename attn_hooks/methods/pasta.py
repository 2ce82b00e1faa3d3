"""PASTA: post-hoc attention steering toward highlighted spans of the prompt.

Source: Zhang et al., "Tell Your Model Where to Attend", arXiv 2311.02262, equation 2, with alpha = 0.01. For chosen heads and
every query row, on the keys of the prompt:

    exclude     s <- s + log(alpha)  on prompt keys outside the spans   (the default; equation 2 after softmax)
    include     s <- s - log(alpha)  on prompt keys outside the spans
    generation  s <- s + log(alpha)  on all prompt keys

then softmax, so rows still sum to 1. Generated keys are never touched. The identity is alpha 1.

The paper profiles heads on 1000 examples a task and steers the best; without ``heads`` all heads are steered, which is
stronger than published. ``include`` is the reference library's: its bias cancels on the spans and lifts the rest.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, NonNegative, Positive, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import image_keys
from attn_kernels import LogitMap, Primitive


def _forward(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] >= span[1]:
        raise ValueError("a span is (start, stop) with start < stop")
    return span


Span = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_forward)]


class PASTA(Edit):
    """spans: token positions (start, stop) to highlight, counted from each prompt's first real token (BOS included)."""

    method: ClassVar[str] = "pasta"
    source: ClassVar[str] = "PASTA, arXiv 2311.02262, eq. 2"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "tokens"})
    writes: ClassVar[Writes] = "logits"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True

    spans: Literal["image"] | Annotated[tuple[tuple[Span, ...], ...], Field(min_length=1)] = Field(
        description="for each prompt its (start, stop) pairs; one list serves all prompts; or 'image'"
    )
    alpha: float = Field(default=0.01, gt=0.0, le=1.0, description="factor on what is not highlighted; 1: identity")
    mode: Literal["exclude", "include", "generation"] = Field(default="exclude", description="which keys are scaled")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    prompt_length: Positive | None = Field(
        default=None, description="padded length of the prompt, needed if it comes in several forwards"
    )

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        if self.spans == "image":
            model.require_image_keys(self.method)

    def is_settled(self, call: AttentionCall) -> bool:
        # The prompt may come one token at a time.
        return self.prompt_length is None or call.layout.length > self.prompt_length

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "chunk" and self.prompt_length is None:
            reason = "these tokens may be prompt or generated. Set prompt_length."
            raise self.refuse_phase(call, reason)
        prompt_length = self.prompt_length or call.prompt_length
        if prompt_length is None:
            raise error("no-prefill", method=self.method, layer=call.layer, model=call.model)
        keys, bias = call.shared_by_layers((id(self), "keys"), lambda: self._biased_keys(call, prompt_length))
        return [LogitMap(keys, bias=bias, heads=call.select_heads(self.heads))]

    def _biased_keys(self, call: AttentionCall, prompt_length: int) -> tuple[Tensor, float]:
        """The key group ``(B, 1, M)`` that gets a bias, and the bias."""
        in_prompt = call.inputs.key_index[None, :] < prompt_length
        highlighted = self._highlighted(call)
        bias = math.log(self.alpha) * (-1.0 if self.mode == "include" else 1.0)
        kept = torch.zeros_like(highlighted) if self.mode == "generation" else highlighted
        if call.layout.length <= prompt_length and call.inputs.sink_logits is None:
            # All keys are the prompt's, and softmax does not see a constant on all logits: the few keys that are kept
            # get the opposite instead.
            return call.keys_at(kept), -bias
        biased = in_prompt & ~kept
        if self.spans == "image":
            # A prompt without an image highlights nothing, and is left as it is.
            biased = biased & highlighted.any(1, keepdim=True)
        return call.keys_at(biased), bias

    def _highlighted(self, call: AttentionCall) -> Tensor:
        """Bool ``(B, M)``: keys inside the spans of their prompt."""
        if self.spans == "image":
            return image_keys(self, call)
        position = call.inputs.key_position.expand(call.batch, -1)
        highlighted = torch.zeros_like(position, dtype=torch.bool)
        if call.batch % len(self.spans):
            raise error("spans-batch", method=self.method, given=len(self.spans), batch=call.batch)
        rows_per_prompt = call.batch // len(self.spans)
        for row in range(call.batch):
            for start, stop in self.spans[row // rows_per_prompt]:
                highlighted[row] |= (position[row] >= start) & (position[row] < stop)
                if (
                    call.phase == "prefill"
                    and stop > int(call.inputs.query_valid[row].sum())
                    and self.prompt_length is None
                ):
                    length = int(call.inputs.query_valid[row].sum())
                    raise error(
                        "span-out-of-prompt", method=self.method, start=start, stop=stop, row=row, length=length
                    )
        return highlighted
