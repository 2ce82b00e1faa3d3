"""Edited attention as the papers write it: all N x M weights in float64, then literally changed.

Registered with transformers like any other attention function and sharing no code with the engine, so that a whole
model can run under it and its logits can be held against a wrapped model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME_PREFIX = "literal_"

# What calls carry along that says nothing about their weights.
WITHOUT_MEANING = frozenset(
    {
        "dropout",
        "encoder_hidden_states",
        "is_causal",
        "labels",
        "logits_to_keep",
        "output_attentions",
        "output_router_logits",
        "sliding_window",  # the masks of both backends hold the window already
        "use_cache",
    }
)


@dataclass(frozen=True)
class LiteralEdit:
    """``source`` keys keep the factor ``keep`` of their weight; one head of one module is scaled by ``gain``.

    ``source`` is ``(B, T)`` over the tokens of the whole sequence, those to be generated included.
    """

    source: Tensor | None = None
    keep: float = 1.0
    module: nn.Module | None = None
    head: int = 0
    gain: float = 1.0


@dataclass
class LiteralAttention:
    """The attention function of one backend's masks.

    ``edit`` is what it does at present, ``length`` how many tokens the sequence has: a window's cache holds its last.
    """

    edit: LiteralEdit = field(default_factory=LiteralEdit)
    length: int = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        position_bias: Tensor | None = None,
        indices: Tensor | None = None,
        block_indices: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        unknown = {name for name, given in others.items() if given is not None} - WITHOUT_MEANING
        assert not unknown, f"{type(module).__name__} passes {sorted(unknown)}, which the oracle has no meaning for"
        queries_per_key = query.shape[1] // key.shape[1]
        keys = key.double().repeat_interleave(queries_per_key, dim=1)
        values = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        logits = query.double() @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if position_bias is not None:
            logits = logits + position_bias.double()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if block_indices is not None:
            positions = _rows(position_ids, query, key)
            attention_mask = module.indexer.build_block_mask(
                block_indices, attention_mask, key.shape[2], query.dtype, query.device, positions
            )
        visible = torch.ones_like(logits, dtype=torch.bool)
        if attention_mask is None:
            visible = visible.tril(key.shape[2] - query.shape[2])
        elif attention_mask.dtype == torch.bool:
            visible = visible & attention_mask
        else:
            visible = visible & (attention_mask > torch.finfo(attention_mask.dtype).min / 2)
            logits = logits + attention_mask.double().masked_fill(~visible[:, : attention_mask.shape[1]], 0.0)
        if indices is not None:
            chosen = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool)
            visible = visible & chosen.scatter(-1, indices.long(), True)[:, None]
        logits = logits.masked_fill(~visible, float("-inf"))
        weights = _softmax_with_sink(logits, s_aux, sinks)
        weights = self._regrouped(weights)
        output = (weights @ values).transpose(1, 2)
        if module is self.edit.module:
            output[:, :, self.edit.head] *= self.edit.gain
        return output.to(query.dtype).contiguous(), None

    def _regrouped(self, weights: Tensor) -> Tensor:
        if self.edit.source is None:
            return weights
        source = self.edit.source[:, max(self.length - weights.shape[-1], 0) : self.length]
        # A model may add keys of its own after the tokens' keys; they are no source.
        source = nn.functional.pad(source, (0, weights.shape[-1] - source.shape[-1]))[:, None, None].expand_as(weights)
        kept = weights * source * self.edit.keep
        freed = (weights * source).sum(-1, keepdim=True) * (1 - self.edit.keep)
        target = weights * ~source
        target_mass = target.sum(-1, keepdim=True)
        edited = kept + target * (1 + freed / target_mass)
        return torch.where(target_mass > 0, edited, weights)


def _softmax_with_sink(logits: Tensor, s_aux: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and, where a model has one, a sink that takes weight and gives no value."""
    sink = sinks.double() if sinks is not None else None
    if s_aux is not None:
        sink = s_aux.double().reshape(1, -1, 1, 1)
    if sink is not None:
        logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(dim=-1).nan_to_num(0.0)
    return weights if sink is None else weights[..., :-1]


def _rows(position_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[None]
    return position_ids.expand(query.shape[0], -1)


LITERAL = {backend: LiteralAttention() for backend in ("sdpa", "eager")}
for _backend, _function in LITERAL.items():
    AttentionInterface.register(NAME_PREFIX + _backend, _function)
    AttentionMaskInterface.register(NAME_PREFIX + _backend, ALL_MASK_ATTENTION_FUNCTIONS[_backend])


@contextmanager
def literally(model: PreTrainedModel, backend: str, edit: LiteralEdit) -> Iterator[PreTrainedModel]:
    """Runs one sequence of ``model``, forward by forward, under the oracle with ``backend``'s masks and ``edit``."""
    function = LITERAL[backend]
    function.edit, function.length = edit, 0

    def count_tokens(_model: nn.Module, _arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        function.length += given["input_ids"].shape[1]

    model.set_attn_implementation(NAME_PREFIX + backend)
    hook = model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()
        model.set_attn_implementation(backend)
        function.edit = LiteralEdit()
