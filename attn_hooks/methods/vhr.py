"""VHR: vision-aware head reinforcement, which raises the heads whose output depends most on the image.

Source: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv 2412.13949.
With z[l, h] the output of head h of layer l, before o_proj, in the last row of the prompt, and z0[l, h] that of the same prompt
without its image,

    VHD[l, h] = || z[l, h] - z0[l, h] ||_2
    H_l = heads whose VHD exceeds the median of the layer;  z[l, h] <- alpha * z[l, h] for h in H_l

layer by layer: where layer l is scored, the layers below are reinforced already, with and without the image. The two prompts run
as rows of one batch (``lockstep.py``), so that this is one forward. Heads are chosen once for each prompt and stay for all its
generated tokens. A prompt without an image has VHD 0 and keeps its heads.

Heads that react to the image negatively do not count (the outlier filter): one whose VHD is above the layer's mean by
``outlier`` standard deviations, and whose output is larger without the image. The paper's exact test could not be read; this one
is ours. So is that rows before the prompt's last are left as they are (``rows`` has the other readings).

Published: alpha 2, the last 14 of 32 layers (18 for InstructBLIP); here by default the same share of any depth. 4 breaks the
model. The identity is alpha 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Layers, Reads, Scope, Writes
from attn_hooks.last_row import last_row_outputs
from attn_hooks.layout import TokenKind
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import LATER_TOKENS, LaterTokens, answering_rows, require_all_heads, rows_after_images
from attn_kernels import HeadAffine, Primitive

PUBLISHED_SHARE = 14 / 32


class VHR(Edit):
    """alpha: gain of the heads that depend on the image."""

    method: ClassVar[str] = "vhr"
    source: ClassVar[str] = "VHR, arXiv 2412.13949"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "value", "output", "tokens"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    needs_companions: ClassVar[bool] = True

    alpha: float = Field(default=2.0, ge=0.0, description="gain of the chosen heads; 1: identity")
    outlier: float | None = Field(
        default=1.0, ge=0.0, description="standard deviations above the mean that make an outlier; None: no filter"
    )
    rows: Literal["generated", "text", "all"] = Field(
        default="generated", description="rows reinforced: from the prompt's last on, all after the image, or all"
    )
    layers: Layers | None = Field(default=None, description="layers edited; None: the last 14 of 32, or that share")
    later_tokens: LaterTokens = Field(default="refuse", description=LATER_TOKENS + ", whose heads stay the prompt's")

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.layers is None:
            number = max(1, round(PUBLISHED_SHARE * model.num_layers))
            return model.layer_indices[-number:]
        return super().layers_in(model)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        model.require_image_keys(self.method)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        require_all_heads(self, call)
        if call.phase == "chunk":
            self._require_a_turn_of_text(call)
        if call.phase == "prefill":
            prompts = call.batch - call.companions
            with torch.no_grad():
                outputs = last_row_outputs(self, call)
                gain = self._gain(outputs[:prompts], outputs[-prompts:])
            # Without an image the two rows are the same, but for rounding.
            has_image = (call.layout.kinds[:prompts] >= TokenKind.IMAGE).any(1).to(call.device)
            gain = torch.where(has_image[:, None], gain, 1.0)
            call.state["gain"] = gain
            return [HeadAffine(gain=gain.repeat(call.batch // prompts, 1), rows=self._rows(call))]
        if "gain" not in call.state:
            raise self.refuse_phase(call, "no prompt was seen under this edit. Wrap first, then run the prompt.")
        rows = self._rows(call) if call.phase == "chunk" else None
        return [HeadAffine(gain=call.state["gain"], rows=rows)]

    def _require_a_turn_of_text(self, call: AttentionCall) -> None:
        if self.later_tokens == "refuse":
            reason = (
                "heads are chosen in the prompt's last row. Give the prompt in one forward, or set later_tokens='turn' for a "
                "conversation."
            )
            raise self.refuse_phase(call, reason)
        past = call.layout.length - call.inputs.num_queries
        if any(image.stop > past for image in call.layout.images):
            reason = "heads are chosen in a conversation's first turn, which must hold its images. Give all turns in one forward."
            raise self.refuse_phase(call, reason)

    def _gain(self, with_image: Tensor, without: Tensor) -> Tensor:
        """``(B, H)`` from head outputs ``(B, H, Dv)`` of the last row, float32."""
        divergence = vision_aware_head_divergence(with_image, without, self.outlier)
        chosen = divergence > median(divergence)
        return torch.where(chosen, self.alpha, 1.0)

    def _rows(self, call: AttentionCall) -> Tensor | None:
        """Row scope ``(B, N)``."""
        if self.rows == "generated":
            return answering_rows(self, call, None, self.later_tokens)
        if self.rows == "all":
            return None
        return rows_after_images(call)


def vision_aware_head_divergence(with_image: Tensor, without: Tensor, outlier: float | None) -> Tensor:
    """VHD ``(B, H)`` of head outputs ``(B, H, Dv)``, 0 for the heads that the filter takes out."""
    divergence = (with_image - without).norm(dim=-1)
    if outlier is None:
        return divergence
    bound = divergence.mean(-1, keepdim=True) + outlier * divergence.std(-1, keepdim=True, unbiased=False)
    is_larger_without = without.norm(dim=-1) > with_image.norm(dim=-1)
    return torch.where((divergence > bound) & is_larger_without, 0.0, divergence)


def median(values: Tensor) -> Tensor:
    """``(B, 1)`` of ``(B, H)``: the mean of the middle two for an even number, so that half of them exceed it."""
    return values.quantile(0.5, dim=-1, keepdim=True)
