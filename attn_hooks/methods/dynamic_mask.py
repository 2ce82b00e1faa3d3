"""Dynamic mask attention (DMA): each head keeps the keys whose values weigh most.

Source: Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124, and Doge in transformers. With v_j the values of
all K key and value heads of token j, one after the other, and learned W and A of the layer,

    dt_j = W v_j  in R^K,    delta[h, j] = exp(A_h softplus(dt[h, j]))
    M[h, i, j] = delta[h, j] if j is among the ``window`` keys of largest delta[h] that query i may see, else minus infinity
    output = softmax(scaling * q_i . k_j + M[h, i, j]) v_j

for all query heads that read key and value head h; of equal keys the newest is kept. ``form="linear"`` leaves the exponential out,
as flash-sparse-attention does; which one a checkpoint was trained with it does not say. The window is 2048 in Doge.

A query's choice depends on what it may see alone, so decode and prompts in chunks choose as one forward would. Under a model's
own sliding window a query chooses among the keys inside it. W and A come from training: without them (``dt_weight=None``) all
keys weigh the same, A = 0 as at the beginning of training, which makes this a window of the newest keys. The identity is a window
of the sequence's length without W and A; with them the bias remains.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, TensorField, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_kernels import HeaviestKeys, LogitMap, Primitive, SinkAndWindow, Sparsity

NAME_OF_PARAMETER = re.compile(r"layers\.(\d+)\.self_attn\.(A|dt_proj\.weight|dt_proj\.bias)$")


class DynamicMask(Edit):
    """window: keys that a query visits. dt_weight, a: W ``(layers, K, K * value_dim)`` and A ``(layers, K)`` of every layer."""

    method: ClassVar[str] = "dynamic_mask"
    source: ClassVar[str] = "DMA, arXiv 2508.02124"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "value"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    window: Positive = Field(default=2048, description="keys that a query visits")
    dt_weight: TensorField | None = Field(
        default=None, description="W, (layers, K, K * value_dim); None: all keys alike"
    )
    a: TensorField | None = Field(default=None, description="A, (layers, K), given with W")
    form: Literal["exp", "linear"] = Field(
        default="exp", description="what the checkpoint's delta is of A softplus(dt)"
    )
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.dt_weight is None) != (self.a is None):
            raise ValueError("give dt_weight and a, or neither")
        return self

    @classmethod
    def from_saved(cls, path: str) -> DynamicMask:
        """W and A of a Doge checkpoint: a safetensors file, or a folder of them. Raises ``EditError`` if they are not there."""
        found: dict[str, dict[int, Tensor]] = {"A": {}, "dt_proj.weight": {}, "dt_proj.bias": {}}
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118, not a mapping
                        parameter = NAME_OF_PARAMETER.search(name)
                        if parameter is not None:
                            found[parameter[2]][int(parameter[1])] = tensors.get_tensor(name).float()
            except (OSError, SafetensorError) as problem:
                raise error("bad-saved-edits", path=file, detail=str(problem)) from None
        layers = range(len(found["A"]))
        if not layers or any(set(found[name]) != set(layers) for name in ("A", "dt_proj.weight")):
            raise error("bad-saved-edits", path=path, detail="it does not hold A and dt_proj.weight of every layer")
        if found["dt_proj.bias"]:
            raise error("bad-saved-edits", path=path, detail="its dt_proj has a bias, which this method does not take")
        a, weight = (torch.stack([found[name][layer] for layer in layers]) for name in ("A", "dt_proj.weight"))
        return cls(dt_weight=weight, a=a)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        for index in self.layers_in(model):
            layer = model.layer(index)
            if hasattr(layer.module, "dt_proj"):
                detail = f"{model.model_class} computes its dynamic mask itself, in layer {index}"
                raise error("bad-parameters", method=self.method, detail=detail)
            if self.dt_weight is None or self.a is None:
                continue
            shape = (model.num_layers, layer.num_kv_heads)
            for name, tensor, expected in (
                ("a", self.a, shape),
                ("dt_weight", self.dt_weight, (*shape, layer.num_kv_heads * layer.value_dim)),
            ):
                if tuple(tensor.shape) != expected:
                    raise error(
                        "wrong-shape",
                        method=self.method,
                        parameter=name,
                        given=tuple(tensor.shape),
                        model=model.model_class,
                        expected=expected,
                    )

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        heads = call.select_heads(self.heads)
        if self.dt_weight is None or self.a is None:
            return [Sparsity(SinkAndWindow(0, self.window), heads=heads)]
        weight, a = (tensor[call.layer].to(call.device, non_blocking=True) for tensor in (self.dt_weight, self.a))
        value = call.inputs.value
        if value.shape[1] != len(a):
            detail = f"a key's weight is of the values of all {len(a)} heads, and this rank has {value.shape[1]}"
            raise error("tensor-parallel", model=call.model, layer=call.layer, detail=detail)
        with torch.no_grad():
            delta = key_weights(value, weight, a, self.form)
        group = call.inputs.num_heads // value.shape[1]
        everywhere = torch.ones(1, 1, call.inputs.num_keys, dtype=torch.bool, device=call.device)
        return [
            LogitMap(everywhere, bias=delta.repeat_interleave(group, 1), heads=heads),
            Sparsity(HeaviestKeys(delta, self.window, group), heads=heads),
        ]


def key_weights(value: Tensor, weight: Tensor, a: Tensor, form: str) -> Tensor:
    """delta ``(B, K, M)`` of values ``(B, K, M, Dv)``, in float32 at least, with W ``(K, K * Dv)`` and A ``(K,)``."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    dt = value.transpose(1, 2).flatten(2).to(dtype) @ weight.to(dtype).T
    delta = a.to(dtype) * functional.softplus(dt)
    return (delta.exp() if form == "exp" else delta).transpose(1, 2)
