"""A trained LoFiT adapter as an edit: learned offsets on the outputs of a sparse set of heads.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563, equation 2
with A = 0, as after the second stage.

    z[l, h] <- z[l, h] + v[l, h]        for the chosen heads, on every row, before o_proj

It is what ``attn_hooks.lofit`` trains under PEFT, through ``HeadAffine``, so that it stands beside other edits:
``wrap(model, "lofit:path/of/adapter", "streaming")``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Reads, Scope, TensorField, Writes
from attn_hooks.errors import error
from attn_hooks.head_vectors import check_head_vectors, offset_of_call
from attn_hooks.model_info import ModelInfo
from attn_kernels import HeadAffine, Primitive


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
        from attn_hooks.lofit.saved import read_adapter

        config, vectors = read_adapter(path)
        if config.component != "offset":
            detail = f"it is an adapter of scales, component={config.component!r}, not of offsets on head outputs"
            raise error("bad-adapter", path=path, detail=detail)
        longest = max(len(row) for row in vectors.values())
        padded = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in vectors.values()]
        return cls(heads=tuple(vectors), offset=torch.stack(padded).float())

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        check_head_vectors(self, "offset", self.offset, self.heads, model)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        offset, heads = offset_of_call(self.heads, self.offset, call)
        return [HeadAffine(offset=offset, heads=heads)]
