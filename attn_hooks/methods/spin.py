"""SPIN: suppress the heads that look at the image least, row by row.

Source: "Image-Guided Head Suppression", EMNLP 2025, arXiv 2505.16411. In each layer, for the last row i of a prompt and for
every generated row, on the logits s before softmax, with V the image's keys and H the heads of the layer:

    score[h] = sum over j in V of s[h, i, j]
    z[h, i] <- eps * z[h, i]  for the heads that are not among the floor(r * H) of the largest score

before o_proj. The identity is r 1, or eps 1. The released code divides the scores by their spread over the heads, which does
not change their order. Published settings: r 0.95, eps 0.05; CHAIR r 0.95, eps 0.08; POPE r 0.8, eps 0.1; Qwen-VL r 0.7,
eps 0.08 in layers 0 to 19. That r * H is rounded down, and at least one head stays, is our reading.

Scores are of the model's own logits, whatever else is edited; keys outside of a row's sliding window do not count.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Layers, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import (
    LATER_TOKENS,
    LaterTokens,
    answering_rows,
    image_keys,
    last_row_logits,
    require_all_heads,
)
from attn_kernels import HeadAffine, Primitive, Ranking

RANKING, RANKED_AT = "ranking by the image's keys", "length at which it was last used"


class SPIN(Edit):
    """r: the part of a layer's heads that is kept. eps: factor on the output of the others."""

    method: ClassVar[str] = "spin"
    source: ClassVar[str] = "SPIN, arXiv 2505.16411"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "tokens", "output"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True

    r: float = Field(default=0.95, gt=0.0, le=1.0, description="part of a layer's heads that is kept; 1: identity")
    eps: float = Field(default=0.05, ge=0.0, le=1.0, description="factor on the output of the other heads; 1: identity")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    later_tokens: LaterTokens = Field(default="refuse", description=LATER_TOKENS)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        model.require_image_keys(self.method)

    def is_settled(self, call: AttentionCall) -> bool:
        return _sees_all_of_image(call)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "chunk" and self.later_tokens == "refuse":
            reason = (
                "heads are chosen for one row at a time. Give the prompt in one forward, and generate without an assistant, or "
                "set later_tokens='turn' for a conversation."
            )
            raise self.refuse_phase(call, reason)
        require_all_heads(self, call)
        with torch.no_grad():
            gain = (
                self._ranking(call) if _sees_all_of_image(call) else self._gain(*self._scores(call), self._kept(call))
            )
        rows = answering_rows(self, call, None, self.later_tokens)
        heads = call.select_heads(tuple((call.layer, head) for head in call.heads))
        return [HeadAffine(gain=gain, rows=rows, heads=heads)]

    def _kept(self, call: AttentionCall) -> int:
        return max(1, math.floor(self.r * call.inputs.num_heads))

    def _ranking(self, call: AttentionCall) -> Ranking:
        """The sum of the image's logits is the logit of the sum of its keys, which stay from one step to the next."""
        if call.state.get(RANKED_AT) != call.layout.length - 1:
            image = image_keys(self, call) & call.inputs.key_valid
            key = call.inputs.key
            # No matrix product, which autocast would take to 16 bits.
            of_image = torch.where(image[:, None, :, None], key, 0.0)
            summed = of_image.sum(2, dtype=torch.promote_types(key.dtype, torch.float32))
            call.state[RANKING] = Ranking(summed, self._kept(call), self.eps, where=image.any(1))
        call.state[RANKED_AT] = call.layout.length
        ranking: Ranking = call.state[RANKING]
        return ranking

    def _scores(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """``(B, H)``, up to a positive factor, and ``(B, H|1)`` bool: whether the row sees an image."""
        image = image_keys(self, call) & call.inputs.key_valid
        logits, visible = last_row_logits(call)
        counted = image[:, None] & visible
        return torch.where(counted, logits, 0.0).sum(-1), counted.any(-1)

    def _gain(self, score: Tensor, sees_image: Tensor, kept: int) -> Tensor:
        """``(B, H)`` from scores ``(B, H)``: 1 for the heads that are kept, and where a row sees no image."""
        largest = score.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        gain = torch.full_like(score, self.eps).scatter(1, largest, 1.0)
        return torch.where(sees_image, gain, 1.0)


def _sees_all_of_image(call: AttentionCall) -> bool:
    """Whether a step's logits on the image are those of its keys, all of them and as they are."""
    inputs = call.inputs
    each_alone = (inputs.softcap, inputs.window, inputs.mask, inputs.bias)
    return call.phase == "decode" and all(given is None for given in each_alone)
