"""A trained LoFiT adapter as an edit: learned offsets on the outputs of a sparse set of heads.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563, equation 2
with A = 0, as after the second stage.

    z[l, h] <- z[l, h] + v[l, h]        for the chosen heads, on every row, before o_proj

It is what ``attn_hooks.lofit`` trains under PEFT, through ``HeadAffine``, so that it stands beside other edits:
``wrap(model, "lofit:path/of/adapter", "streaming")``.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Reads, Scope, TensorField, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.output_projection import takes_head_outputs
from attn_kernels import HeadAffine as HeadAffinePrimitive
from attn_kernels import Primitive, head_selection


class LoFiT(Edit):
    """``offset`` ``(heads, head_dim of the value)``: one row for each pair of ``heads``, in their order. Where layers differ in
    head_dim, rows are as long as the longest, and those of smaller layers use the first entries."""

    method: ClassVar[str] = "lofit"
    source: ClassVar[str] = "arXiv 2406.01563, eq. 2"
    reads: ClassVar[frozenset[Reads]] = frozenset({"output"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-token"
    head_indexed: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = False
    fixed_in_decode: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    heads: Heads = Field(description="query heads: pairs (layer, head) or {layer: [heads]}")
    offset: TensorField = Field(description="(heads, head_dim), one row for each pair of `heads`")

    @model_validator(mode="after")
    def _one_row_for_each_head(self) -> LoFiT:
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads: a head is listed twice")
        if self.offset.ndim != 2 or len(self.offset) != len(self.heads):
            raise ValueError(f"offset: {len(self.heads)} heads need as many rows, got {tuple(self.offset.shape)}")
        return self

    @classmethod
    def from_saved(cls, path: str) -> LoFiT:
        """The adapter that PEFT saved in the folder ``path`` or in that repository of the hub.

        Raises ``EditError`` if it is not one of offsets.
        """
        from peft.utils import load_peft_weights

        from attn_hooks.lofit import LofitConfig

        try:
            config = LofitConfig.from_pretrained(path)
            tensors = load_peft_weights(path, device="cpu")
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise error("bad-adapter", path=path, detail=f"PEFT cannot load it as LOFIT: {problem}") from None
        if not isinstance(config, LofitConfig) or config.component != "offset":
            kind = f"scales, component={config.component!r}" if isinstance(config, LofitConfig) else config.peft_type
            detail = f"it is an adapter of {kind}, not of offsets on head outputs"
            raise error("bad-adapter", path=path, detail=detail)
        by_layer = {_layer_of(name): rows for name, rows in tensors.items() if name.endswith(".lofit_offset")}
        counted = [[layer, head] for layer, rows in sorted(by_layer.items()) for head in range(len(rows))]
        heads = counted if config.heads is None else config.heads
        if [layer for layer, _ in heads] != [layer for layer, _ in counted]:
            detail = f"its tensors are of the layers {sorted(by_layer)}, its heads of others or of another number"
            raise error("bad-adapter", path=path, detail=detail)
        longest = max(rows.shape[1] for rows in by_layer.values())
        padded = [torch.nn.functional.pad(rows, (0, longest - rows.shape[1])) for _, rows in sorted(by_layer.items())]
        pairs = tuple((layer, head) for layer, head in heads)
        return cls(heads=pairs, offset=torch.cat(padded).float())

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        layers = [model.layer(layer) for layer in self.layers_in(model)]
        expected = (len(self.heads), max(layer.value_dim for layer in layers))
        if tuple(self.offset.shape) != expected:
            raise error(
                "wrong-shape",
                method=self.method,
                parameter="offset",
                given=tuple(self.offset.shape),
                model=model.model_class,
                expected=expected,
            )
        for layer in layers:
            if not takes_head_outputs(layer):
                raise error("gated-heads", method=self.method, model=model.model_class, layer=layer.index)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        rows = {head: row for row, (layer, head) in zip(self.offset, self.heads, strict=True) if layer == call.layer}
        value_dim = call.inputs.value.shape[-1]
        unmoved = self.offset.new_zeros(value_dim)
        offset = torch.stack([rows[head][:value_dim] if head in rows else unmoved for head in call.heads])
        heads = head_selection([head in rows for head in call.heads], call.device)
        return [HeadAffinePrimitive(offset=offset.to(call.device, non_blocking=True), heads=heads)]


def _layer_of(name: str) -> int:
    """The last number in a tensor's path."""
    numbers: list[str] = re.findall(r"\.(\d+)\.", name)
    return int(numbers[-1]) if numbers else 0
