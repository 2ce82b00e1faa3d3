"""Tri-shape: sink and window in the prompt, whose last rows are dense.

Source: the tri-shape pattern of MInference's code (microsoft/MInference), which came with Li et al., "SCBench: A KV Cache-Centric
Analysis of Long-Context Methods", arXiv 2412.10319. With n the length of the prompt,

    visible(i, j) = j < sinks  or  i - j < window  or  i >= n - dense_rows        (and causal)

The question stands in the last rows, which see the whole prompt. Decode is dense. Each prompt of a batch counts its own rows.
Several tokens after the prompt's first forward are refused, since the last rows would not be the prompt's, unless
``later_tokens="dense"``. The identity is a window, or dense rows, of at least the prompt's length.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, NonNegative, Positive, Reads, Scope, Writes
from attn_kernels import Primitive, SinkAndWindow, Sparsity


class TriShape(Edit):
    """sinks, window: first and recent tokens always seen. dense_rows: the prompt's last rows, which see everything."""

    method: ClassVar[str] = "trishape"
    source: ClassVar[str] = "tri-shape of SCBench, arXiv 2412.10319"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    # Where the prompt ended, dense rows begin.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    sinks: NonNegative = Field(default=128, description="first tokens that every query sees")
    window: Positive = Field(default=3968, description="most recent tokens that a query sees, its own included")
    dense_rows: NonNegative = Field(default=100, description="last tokens of the prompt, which see all of it")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "dense"] = Field(
        default="refuse", description="several new tokens after the prompt's first forward: refuse, or dense attention"
    )

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "decode":
            return []
        if call.phase == "chunk":
            if self.later_tokens == "dense":
                return []
            reason = "the prompt's last rows are dense. Give it in one forward, or set later_tokens='dense'."
            raise self.refuse_phase(call, reason)
        pattern = SinkAndWindow(self.sinks, self.window)
        return [Sparsity(pattern, heads=call.select_heads(self.heads), dense_rows=self.dense_rows)]
