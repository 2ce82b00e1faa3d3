"""Computes one edited call: chooses the path, runs it, and says which it was."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    HeadAffine,
    Order,
    Primitive,
    Tap,
    edited_attention,
    edited_weights,
    head_affine,
)

if TYPE_CHECKING:
    from attn_kernels.edited_attention.lowering import LoweredEdits

Plain = Callable[[], tuple[Tensor, Tensor | None]]
"""The model's own backend on this call: output ``(B, N, H, Dv)`` and weights, if it returns any."""


@dataclass
class Prepared:
    """What the edits of a layer answered to a call, and beside each primitive which edit it belongs to.

    ``lowered`` is made by the first call that runs on a GPU. ``vendor`` holds plain attention's output and log-sum-exp of
    this call, if a method's tap has computed them. ``is_settled``: they serve later calls of their kind, too, for which
    they are ``kept``. ``attends_as`` and ``routed_by``: whose queries and keys all heads use (see ``routed``), and the edit
    that said so.
    """

    primitives: list[Primitive]
    owners: list[int]
    lowered: LoweredEdits | None = None
    vendor: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    is_settled: bool = True
    kept: bool = False
    attends_as: Tensor | None = None
    routed_by: int | None = None

    @functools.cached_property
    def acting(self) -> tuple[int, ...]:
        """The edits that change something."""
        routed_by = [self.routed_by] if self.routed_by is not None and self.attends_as is not None else []
        pairs = zip(self.owners, self.primitives, strict=True)
        return tuple(dict.fromkeys([*routed_by, *(owner for owner, edit in pairs if not isinstance(edit, Tap))]))

    @property
    def takes_later_keys(self) -> bool:
        """Whether keys to come have their place: they lie outside of groups, but an order's values have to be given."""
        return not any(isinstance(edit, Order) and edit.key_value is not None for edit in self.primitives)

    @functools.cached_property
    def is_trained(self) -> bool:
        """Whether a factor is a parameter that an optimizer changes in place, so that nothing made of it serves twice."""
        parts = (part for edit in self.primitives for part in vars(edit).values())
        return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


@dataclass(frozen=True)
class Result:
    """Output ``(B, H, N, Dv)``; weights if asked for; ``heads`` (h,) whose weights were edited, None for all of them."""

    output: Tensor
    weights: Tensor | None
    path: str
    why: str
    edited_weights: bool
    heads: Tensor | None


def compute(inputs: AttentionInputs, prepared: Prepared, plain: Plain, wants_weights: bool) -> Result:
    """The call under its edits. ``plain`` runs where no edit needs the weights, or only those of some heads."""
    if not prepared.primitives:
        output, weights = plain()
        return Result(output.transpose(1, 2), weights, "backend + affine", "nothing edited in this call", False, None)
    if wants_weights or not has_kernels(inputs):
        why = "weights asked for" if wants_weights else "no Triton" if inputs.query.is_cuda else "no GPU"
        return in_pytorch(inputs, prepared.primitives, plain, wants_weights, why)
    # Imported here: machines without a GPU need no Triton.
    from attn_kernels.edited_attention import dispatch

    lowered, path = dispatch.plan(inputs, prepared.primitives, prepared.lowered)
    if not prepared.is_trained:
        prepared.lowered = lowered
    if lowered is None:
        return in_pytorch(inputs, prepared.primitives, plain, wants_weights, path.why)
    if not lowered.edits_weights and path.name != "decode":
        output, weights = plain()
        output = output.transpose(1, 2)
        if path.name == "edited flash with gradients":
            from attn_kernels.edited_attention.backward import with_head_affine

            output = with_head_affine(output, lowered)
        else:
            dispatch.head_affine_(output, lowered, lowered.heads)
        return Result(output, weights, "backend + affine", path.why, False, lowered.heads)
    vendor = prepared.vendor.pop() if prepared.vendor else None
    output, _ = dispatch.run(inputs, prepared.primitives, lowered=lowered, vendor=vendor, path=path)
    return Result(output, None, path.name, path.why, lowered.edits_weights, lowered.heads)


def routed(inputs: AttentionInputs, head: Tensor | None) -> AttentionInputs:
    """The same call with the queries and keys of query head ``head`` ``(B,)`` in place of every head's own, and the values as
    they are; -1, or None for all samples, leaves them."""
    if head is None:
        return inputs
    num_heads, kv_heads = inputs.num_heads, inputs.key.shape[1]
    head = head.to(inputs.query.device)[:, None]
    of_query = torch.where(head >= 0, head, torch.arange(num_heads, device=head.device))
    of_key = torch.where(head >= 0, head // (num_heads // kv_heads), torch.arange(kv_heads, device=head.device))

    def take(tensor: Tensor, heads: Tensor) -> Tensor:
        tensor = tensor.expand(len(heads), *tensor.shape[1:])
        return tensor.gather(1, heads.reshape(*heads.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:]))

    def by_head(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[1] == 1 else take(tensor, of_query)

    return replace(
        inputs,
        query=take(inputs.query, of_query),
        key=take(inputs.key, of_key),
        mask=by_head(inputs.mask),
        bias=by_head(inputs.bias),
        sink_logits=by_head(inputs.sink_logits),
    )


def has_kernels(inputs: AttentionInputs) -> bool:
    """Whether the kernels can run where the tensors are; without a GPU Triton is not even imported."""
    return inputs.query.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed: its wheels are for Linux on x86-64."""
    return importlib.util.find_spec("triton") is not None


def in_pytorch(
    inputs: AttentionInputs, primitives: Sequence[Primitive], plain: Plain, wants_weights: bool, why: str
) -> Result:
    """The call in PyTorch; heads whose weights no edit touches stay on the model's backend. ``why`` goes into the result."""
    weight_edits = [edit for edit in primitives if not isinstance(edit, HeadAffine)]
    recomputed = heads_recomputed(weight_edits, inputs)
    weights = None
    if len(recomputed) == inputs.num_heads:
        output = edited_attention(inputs, weight_edits)
    else:
        output, weights = plain()
        output = output.transpose(1, 2)
        if len(recomputed):
            output = output.index_copy(1, recomputed, edited_attention(inputs, weight_edits, recomputed))
    if len(recomputed):
        weights = edited_weights(inputs, weight_edits) if wants_weights else None
    path = "pytorch" if len(recomputed) else "backend + affine"
    return Result(head_affine(output, primitives, inputs.query), weights, path, why, len(recomputed) > 0, recomputed)


def heads_recomputed(edits: Sequence[Primitive], inputs: AttentionInputs) -> Tensor:
    """``(h,)`` long: heads whose weights some primitive changes or reads; the rest stay on the model's backend."""
    selected = torch.zeros(inputs.num_heads, dtype=torch.bool, device=inputs.query.device)
    for edit in edits:
        heads = getattr(edit, "heads", None)
        selected |= True if heads is None else heads
    return selected.nonzero().squeeze(-1)
