"""OPERA's penalty: against tokens that a response leans on more and more.

Source: Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
Retrospection-Allocation", CVPR 2024, arXiv 2311.17911. The N likeliest next tokens are each tried. With w[i, j] the last layer's
weight of response token i on response token j, the largest over heads, of rows that are divided by their sum over all keys, and i
up to the candidate itself,

    phi[j] = 1e-7 * product over i >= j of (sigma * w[i, j])
    l      <- l - alpha * max over j of phi[j]     for the candidates, minus infinity for all others

Defaults: N 5, sigma 50, alpha 1, beams of 5 (``num_beams=5``); greedy search and sampling take the same logits here. alpha 0
leaves the candidates' logits as they are; with greedy search that is the identity.

The released code differs, and published figures were made with it: ``faithful="code"`` takes minus the candidate's weight on the
image for its penalty while the response has fewer than 10 tokens. The rollback to the token that a response leans on, and the
choice of another, is a strategy of generation, not of logits, and is left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.candidates import WEIGHTS, CandidateEdit, Response
from attn_hooks.edit import Positive, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import require_all_heads
from attn_kernels import Primitive

SCALE_OF_PENALTY = 1e-7
FIRST_TOKENS = 10
# Its exponential is still a number.
LARGEST_LOG = 700.0


class Opera(CandidateEdit):
    """alpha: weight of the penalty. sigma: factor on weights. candidates: how many next tokens are tried."""

    method: ClassVar[str] = "opera"
    source: ClassVar[str] = "OPERA, arXiv 2311.17911"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "tokens"})
    writes: ClassVar[Writes] = "next-token"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True

    alpha: float = Field(default=1.0, ge=0.0, description="weight of the penalty; 0: none")
    sigma: float = Field(default=50.0, gt=0.0, description="factor on the weights")
    candidates: Positive = Field(default=5, description="likeliest next tokens that are tried; all others are out")
    faithful: Literal["paper", "code"] = Field(default="paper", description="whose rules; see the method's page")

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        return model.layer_indices[-1:]

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        """None: reads the newest rows' weights, the largest over heads, ``(B, N, M)`` float32."""
        if call.phase == "prefill":
            return []
        require_all_heads(self, call)
        inputs = call.inputs
        batch, num_heads, rows, width = inputs.query.shape
        with torch.no_grad():
            query = inputs.query.reshape(batch, inputs.key.shape[1], -1, width)
            logits = (query @ inputs.key.transpose(-1, -2) * inputs.scaling).reshape(batch, num_heads, rows, -1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if inputs.softcap is not None:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            visible = inputs.visible(slice(0, rows))
            weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0).amax(1)
        call.of_forward[WEIGHTS,] = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return []

    def take(self, response: Response, weights: Tensor) -> None:
        """``of_columns`` holds the logarithm of each column's product."""
        logs = (self.sigma * weights[:, response.start :].double()).log()
        known = response.of_columns
        response.of_columns = logs if known is None else torch.cat([known + logs[:, :-1], logs[:, -1:]], dim=1)

    def penalties(self, response: Response, weights: Tensor, own: Tensor) -> Tensor:
        written = weights.shape[-1] - response.start
        if self.faithful == "code" and written < FIRST_TOKENS:
            image = response.image.to(weights.device)
            return -self.alpha * (weights[..., : image.shape[1]] * image[:, None]).sum(-1)
        logs = (self.sigma * torch.cat([weights[..., response.start :], own[..., None]], dim=-1).double()).log()
        if response.of_columns is not None:
            logs[..., :-1] += response.of_columns[:, None]
        return self.alpha * SCALE_OF_PENALTY * logs.amax(-1).clamp(max=LARGEST_LOG).exp()
