"""Vectors on the outputs of a few heads: how many heads, and what their vectors are in one attention call."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.output_projection import takes_head_outputs
from attn_kernels import head_selection


def how_many(method: str, total: int, k: int | None, share: float | None) -> int:
    """``k``, or ``share`` of ``total`` heads, at least one. Raises ``EditError`` unless one of them is given, within its range."""
    if (k is None) == (share is None):
        raise error("bad-parameters", method=method, detail="give either k or share")
    if k is not None:
        if not 1 <= k <= total:
            raise error("bad-parameters", method=method, detail=f"k: there are {total} heads to choose from (got {k})")
        return k
    if not 0 < share <= 1:  # type: ignore[operator]
        raise error("bad-parameters", method=method, detail=f"share: must be above 0 and at most 1 (got {share})")
    return max(1, round(share * total))  # type: ignore[operator]


def check_head_vectors(edit: Edit, parameter: str, vectors: Tensor, heads: Heads, model: ModelInfo) -> None:
    """Raises ``EditError`` unless ``vectors`` are ``(heads, head_dim)`` of ``model``'s values and act where they were found."""
    layers = [model.layer(layer) for layer in edit.layers_in(model)]
    expected = (len(heads), max(layer.value_dim for layer in layers))
    if tuple(vectors.shape) != expected:
        raise error(
            "wrong-shape",
            method=edit.method,
            parameter=parameter,
            given=tuple(vectors.shape),
            model=model.model_class,
            expected=expected,
        )
    for layer in layers:
        if not takes_head_outputs(layer):
            raise error("gated-heads", method=edit.method, model=model.model_class, layer=layer.index)


def offset_of_call(heads: Heads, vectors: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Of a call's heads, the vectors ``(H, head_dim)``, zero where a head has none, and ``(H,)`` bool: which have one.

    Where layers differ in head_dim, ``vectors`` are as long as the longest, and smaller layers use the first entries.
    """
    rows = {head: row for row, (layer, head) in zip(vectors, heads, strict=True) if layer == call.layer}
    value_dim = call.inputs.value.shape[-1]
    unmoved = vectors.new_zeros(value_dim)
    offset = torch.stack([rows[head][:value_dim] if head in rows else unmoved for head in call.heads])
    return offset.to(call.device, non_blocking=True), head_selection([head in rows for head in call.heads], call.device)
