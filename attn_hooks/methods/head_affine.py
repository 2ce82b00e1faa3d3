"""Gains and offsets on head outputs, given by the user.

Source: the form shared by ITI (Li et al. 2023, arXiv 2306.03341, equation 2: an offset on head outputs) and LoFiT (Yin et
al. 2024, arXiv 2406.01563: learned offsets), and by head scaling in general.

    z[l, h] <- gain[l, h] * z[l, h] + offset[l, h]        on every row, before o_proj

The identity is gain 1 and offset 0.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Reads, Scope, TensorField, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_kernels import HeadAffine as HeadAffinePrimitive
from attn_kernels import Primitive, head_selection


class HeadAffine(Edit):
    """gain: (layers, heads). offset: (layers, heads, head_dim of the value). Either may be left out.

    Where layers differ in heads or head_dim, the shape is the largest's and smaller layers use the first entries.
    """

    method: ClassVar[str] = "head_affine"
    source: ClassVar[str] = "ITI, arXiv 2306.03341, eq. 2; LoFiT, arXiv 2406.01563"
    reads: ClassVar[frozenset[Reads]] = frozenset({"output"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-token"
    head_indexed: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = False
    fixed_in_decode: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    gain: TensorField | None = Field(default=None, description="(layers, query heads); 1 changes nothing")
    offset: TensorField | None = Field(default=None, description="(layers, query heads, head_dim); 0 changes nothing")

    @model_validator(mode="after")
    def _needs_one(self) -> HeadAffine:
        if self.gain is None and self.offset is None:
            raise ValueError("give gain, offset or both")
        return self

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        return tuple(layer for layer in model.layer_indices if self.heads_in(model, layer))

    def heads_in(self, model: ModelInfo, layer: int) -> tuple[int, ...]:
        touched: set[int] = set()
        for tensor, identity in ((self.gain, 1), (self.offset, 0)):
            if tensor is not None and layer < len(tensor):
                touched.update(head for head, changes in enumerate(_changing(tensor, identity)[layer]) if changes)
        return tuple(sorted(touched))

    def check(self, model: ModelInfo) -> None:
        heads = max(layer.num_heads for layer in model.layers)
        value_dim = max(layer.value_dim for layer in model.layers)
        expected = (model.num_layers, heads, value_dim)
        self._check_shape("gain", self.gain, expected[:2], model)
        self._check_shape("offset", self.offset, expected, model)

    def _check_shape(self, parameter: str, tensor: Tensor | None, expected: tuple[int, ...], model: ModelInfo) -> None:
        if tensor is not None and tuple(tensor.shape) != expected:
            raise error(
                "wrong-shape",
                method=self.method,
                parameter=parameter,
                given=tuple(tensor.shape),
                model=model.model_class,
                expected=expected,
            )

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        here = slice(call.heads.start, call.heads.stop)
        value_dim = call.inputs.value.shape[-1]
        gain = None if self.gain is None else self.gain[call.layer, here].to(call.device, non_blocking=True)
        offset = (
            None
            if self.offset is None
            else self.offset[call.layer, here, :value_dim].to(call.device, non_blocking=True)
        )
        if any(tensor is not None and tensor.requires_grad for tensor in (gain, offset)):
            # Training may change any head.
            return [HeadAffinePrimitive(gain=gain, offset=offset)]
        tables = [(self.gain, 1), (self.offset, 0)]
        changing = [_changing(tensor, identity)[call.layer][here] for tensor, identity in tables if tensor is not None]
        heads = head_selection([any(parts) for parts in zip(*changing, strict=True)], call.device)
        return [HeadAffinePrimitive(gain=gain, offset=offset, heads=heads)]


def _changing(tensor: Tensor, identity: int) -> list[list[bool]]:
    """By layer and head, whether ``tensor`` ``(layers, heads, ...)`` is not the identity; from the device only once."""
    version = 0 if tensor.is_inference() else tensor._version
    known = _changing_heads.get(tensor)
    if known is None or known[0] != version:
        known = (
            version,
            (tensor.detach().flatten(2).ne(identity).any(-1) if tensor.ndim > 2 else tensor != identity).tolist(),
        )
        _changing_heads[tensor] = known
    return known[1]


_changing_heads: MutableMapping[Tensor, tuple[int, list[list[bool]]]] = WeakTensorKeyDictionary()
