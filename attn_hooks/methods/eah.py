"""EAH: the head with the most vision sinks lends its attention map to all heads of its layer.

Source: Zhang et al., "Seeing Clearly by Layer Two", arXiv 2411.09968; later "Shallow Focus, Deep Fixes", EMNLP 2025. In a
shallow layer, with weights a of the prompt's N real rows and the image's keys V:

    c[h, j] = (sum over i > j of a[h, i, j]) / (N - j)
    h*      = the head of the most j in V with c[h, j] > threshold; the first of several; none if no head has any
    z[h]    = a[h*] v[h]   for every head h

Each head keeps its own values, so this is attention with the queries and keys of h*, which is how it is computed: no map is
ever held. Rows sum to 1. The identity is threshold 1. The released README has threshold 0.002 and layer 1, counted from 0.

Decode is not written down. With ``decode="keep"`` generated rows attend as h* does, too.

The released code differs, and published figures were made with it: ``faithful="code"`` has threshold 0.0008, acts in every layer
(its test for the layer is always true), never when head 0 has the most, and not in decode, where its single row loses the
diagonal and with it everything. It also takes N for 647 and V for columns 36 to 610, as for LLaVA-1.5 with one prompt; here
both are the prompt's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Layers, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import image_keys, require_all_heads


class EAH(Edit):
    """threshold: what a column receives on average to count as a vision sink."""

    method: ClassVar[str] = "eah"
    source: ClassVar[str] = "EAH, arXiv 2411.09968"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "tokens"})
    writes: ClassVar[Writes] = "routing"
    scope: ClassVar[Scope] = "whole-matrix"
    keeps_state: ClassVar[bool] = True

    threshold: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="of a vision sink; 1: identity; None: 0.002 for the paper, 0.0008 for the code",
    )
    faithful: Literal["paper", "code"] = Field(default="paper", description="whose rules; see the method's page")
    layers: Layers | None = Field(default=None, description="layers edited; None: 1 for the paper, all for the code")
    decode: Literal["keep", "none"] | None = Field(
        default=None,
        description="generated rows attend as the prompt's head does, or on their own; None: as faithful says",
    )
    later_tokens: Literal["refuse", "keep"] = Field(
        default="refuse", description="several new tokens after the prompt: refuse, or keep the prompt's head"
    )

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.layers is None and self.faithful == "paper":
            return (1,)
        return super().layers_in(model)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        model.require_image_keys(self.method)

    def attends_as(self, call: AttentionCall) -> Tensor | None:
        require_all_heads(self, call)
        if call.phase == "prefill":
            call.state["head"] = self._densest_head(call)
        elif call.phase == "chunk" and self.later_tokens == "refuse":
            reason = "the head needs all rows of the prompt. Give it in one forward, or set later_tokens='keep'."
            raise self.refuse_phase(call, reason)
        if "head" not in call.state:
            raise error("no-prefill", method=self.method, layer=call.layer, model=call.model)
        keep_in_decode = (self.decode or ("keep" if self.faithful == "paper" else "none")) == "keep"
        head: Tensor = call.state["head"]
        return head if call.phase == "prefill" or keep_in_decode else None

    @torch.no_grad()
    def _densest_head(self, call: AttentionCall) -> Tensor:
        """``(B,)`` long: h* of each sample, -1 where there is none."""
        inputs = call.inputs
        as_is = replace(call, earlier=[], vendor=[])
        received = as_is.tap("column_sum") - _diagonal(call, as_is.tap("log_sum_exp"))
        rows_from = inputs.query_position.amax(1, keepdim=True) - inputs.key_position + 1
        count = rows_from.clamp(min=1, max=inputs.window)[:, None]
        threshold = self.threshold
        if threshold is None:
            threshold = 0.002 if self.faithful == "paper" else 0.0008
        is_sink = (received / count > threshold) & call.keys_at(image_keys(self, call))
        sinks = is_sink.sum(-1)  # (B, H)
        most = sinks.amax(1, keepdim=True)
        first = (sinks == most).long().cumsum(1).eq(0).sum(1)
        no_head = (most[:, 0] == 0) | ((first == 0) if self.faithful == "code" else False)
        return torch.where(no_head, -1, first)


def _diagonal(call: AttentionCall, log_sum_exp: Tensor) -> Tensor:
    """``(B, H, M)``: what each key receives from its own row, from ``log_sum_exp`` ``(B, H, N)``; 0 for padding."""
    inputs = call.inputs
    first, last = inputs.query_offset, inputs.query_offset + inputs.num_queries
    key = inputs.key[:, inputs.kv_head_of, first:last].to(log_sum_exp.dtype)
    logits = (inputs.query.to(key) * key).sum(-1) * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    if inputs.bias is not None:
        bias = inputs.bias[..., first:last].diagonal(dim1=-2, dim2=-1)
        logits = logits + torch.where(bias > torch.finfo(bias.dtype).min / 2, bias, 0.0)
    weights = torch.where(inputs.query_valid[:, None], (logits - log_sum_exp).exp(), 0.0)
    return torch.nn.functional.pad(weights, (first, inputs.num_keys - last))
