"""Ablate heads: their output is zero, as if the head were not there.

Source: the head ablation of Michel et al., "Are Sixteen Heads Really Better than One?", arXiv 1905.10650, section 2.2
(a mask variable of 0 for the head).

    z_h <- 0        for the heads listed, on every row, before o_proj
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Reads, Scope, Writes
from attn_kernels import HeadAffine, Primitive


class Ablate(Edit):
    """heads: query heads to silence, pairs (layer, head) or {layer: [heads]}."""

    method: ClassVar[str] = "ablate"
    source: ClassVar[str] = "Michel et al. 2019, arXiv 1905.10650, section 2.2"
    reads: ClassVar[frozenset[Reads]] = frozenset({"output"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-token"
    head_indexed: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = False
    fixed_in_decode: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    heads: Heads = Field(min_length=1, description="query heads to silence: pairs (layer, head) or {layer: [heads]}")

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        return [HeadAffine(replace=call.select_heads(self.heads))]
