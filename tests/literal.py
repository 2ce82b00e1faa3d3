"""A slow attention to hold wrapped models to: builds every weight in float64 and lets a test edit them literally."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Step = Callable[[Tensor, int], Tensor]


def _unchanged(tensor: Tensor, _layer: int) -> Tensor:
    return tensor


@dataclass
class Literal:
    """Edits of one attention: of the logits ``(B, H, N, M)``, of the weights, of the head outputs ``(B, H, N, D)``."""

    logits: Step = _unchanged
    weights: Step = _unchanged
    output: Step = _unchanged


@contextmanager
def literal_attention(model: PreTrainedModel, edits: Literal) -> Iterator[None]:
    """Runs ``model`` on the literal attention inside the block."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        assert scaling is not None
        logits = query.double() @ key.double().transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        assert attention_mask is not None
        assert attention_mask.dtype == torch.bool
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        logits = edits.logits(logits, layer).masked_fill(~attention_mask, -torch.inf)
        if s_aux is not None:
            sink = s_aux.double()[None, :, None, None].expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1).nan_to_num(0.0)
        weights = edits.weights(weights, layer)
        output = edits.output(weights @ value.double(), layer)
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    def mask(*args: object, **kwargs: object) -> Tensor | None:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})  # type: ignore[arg-type]

    AttentionInterface.register("literal_test_attention", attention)
    AttentionMaskInterface.register("literal_test_attention", mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("literal_test_attention")
    try:
        yield
    finally:
        model.config._attn_implementation = before
