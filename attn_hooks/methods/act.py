"""ACT: calibrate hidden attention sinks.

Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", ICML 2024, arXiv 2406.15765. Per layer and head, on
the whole prompt of N real tokens with weights a:

    c[j] = mean over the queries i that see j of a[i, j]
    S    = { j : c[j] > alpha / N }  without the first token            (paper; alpha = 5)
    a'[i, j] = beta * a[i, j]                               for j in S  (beta = 0.4)
    a'[i, j] = a[i, j] * (1 - beta * A_S(i)) / (1 - A_S(i)) otherwise, with A_S(i) = sum of a[i, j] over S

so rows still sum to 1. The identity is beta 1.

``faithful="code"`` is the released code's rule instead: c[j] > 0.1 whatever N, and the first sink found is spared rather
than token 0 (``threshold`` and ``keep_first`` choose either rule by itself). Its decode step gives rows that sum to about
1.7; there that setting is refused, not reproduced.

Decode is undefined in the paper. Here S is frozen at the end of the prompt and each new row is calibrated with it. S needs
all rows of the prompt, so a prompt given in chunks is refused; for a conversation's later turns, ``later_tokens="keep"``
goes on with the first prompt's S.

The released code edits heads found by a search on 900 prompts a task, in layers 2 to L-2; without ``heads`` all heads of those
layers are edited.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_kernels import Primitive, Regroup, indices_of_heads


class ACT(Edit):
    """beta: factor that a sink keeps. alpha (paper) or absolute (code): threshold on the column mean."""

    method: ClassVar[str] = "act"
    source: ClassVar[str] = "ACT, arXiv 2406.15765"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights"})
    writes: ClassVar[Writes] = "weights"
    scope: ClassVar[Scope] = "whole-matrix"
    head_indexed: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True

    beta: float = Field(default=0.4, ge=0.0, le=1.0, description="factor kept on a sink's weight; 1: identity")
    alpha: float = Field(default=5.0, gt=0.0, description="paper: a sink's column mean exceeds alpha / N")
    absolute: float = Field(default=0.1, ge=0.0, lt=1.0, description="code: a sink's column mean exceeds this")
    faithful: Literal["paper", "code"] = Field(default="paper", description="whose rules find the sinks")
    threshold: Literal["relative", "absolute"] | None = Field(
        default=None, description="alpha / N or absolute; None: relative for the paper, absolute for the code"
    )
    keep_first: Literal["position0", "first_detected"] | None = Field(
        default=None, description="the sink that is spared; None: position0 for the paper, first_detected for the code"
    )
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: 2 to L-2")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "keep"] = Field(
        default="refuse", description="several new tokens after the prompt: refuse, or keep the prompt's sinks"
    )

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.heads is None and self.layers is None:
            return tuple(layer for layer in model.layer_indices if 2 <= layer <= model.num_layers - 2)
        return super().layers_in(model)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        heads = call.select_heads(self.heads)
        if call.phase == "prefill":
            call.state["sinks"] = self._find_sinks(call, heads)
        elif call.phase == "decode" and self.faithful == "code":
            raise self.refuse_phase(call, "the released code's rows no longer sum to 1 there. Use faithful='paper'.")
        elif call.phase == "chunk" and self.later_tokens == "refuse":
            reason = "sinks need all rows of the prompt. Give it in one forward, or set later_tokens='keep'."
            raise self.refuse_phase(call, reason)
        if "sinks" not in call.state:
            raise error("no-prefill", method=self.method, layer=call.layer, model=call.model)
        return [Regroup(source=call.on_this_calls_keys(call.state["sinks"]), keep=self.beta, heads=heads)]

    def _find_sinks(self, call: AttentionCall, heads: Tensor | None) -> Tensor:
        """Step A: bool ``(B, H, M)``; heads that are not selected have none."""
        column_mean = call.tap("column_mean", heads=heads)
        threshold = self.threshold or ("relative" if self.faithful == "paper" else "absolute")
        keep_first = self.keep_first or ("position0" if self.faithful == "paper" else "first_detected")
        relative = threshold == "relative"

        def at_least() -> Tensor:
            """(B, 1, M|1): what a key's mean must exceed; a spared one's never does."""
            real_tokens = call.inputs.key_valid.sum(-1)[:, None, None]
            bound = (
                self.alpha / real_tokens
                if relative
                else torch.full_like(real_tokens, self.absolute, dtype=torch.float32)
            )
            if keep_first != "position0":
                return bound
            return torch.where((call.inputs.key_position == 0)[:, None, :], float("inf"), bound)

        found = column_mean > call.shared_by_layers(("act", relative, self.alpha, self.absolute, keep_first), at_least)
        if keep_first != "position0":
            found = found & ~(found & (found.cumsum(-1) == 1))
        if heads is None:
            return found
        sinks = torch.zeros(*found.shape[:1], len(call.heads), found.shape[2], dtype=torch.bool, device=call.device)
        return sinks.index_copy_(1, indices_of_heads(heads).long(), found)
