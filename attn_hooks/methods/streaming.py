"""Sink and window: each query sees the first tokens and the most recent ones.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2 (4 sinks; the
window is the cache size less the sinks). Also called A-shape.

    visible(i, j) = j < sinks  or  i - j < window        (and causal)

What differs from the paper: theirs is a cache policy, which drops keys and counts RoPE positions inside the cache; this is
the mask, in prefill and decode alike, and every key keeps its own position. The cache is not shortened. The identity is a
window of at least the sequence's length.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, NonNegative, Positive, Reads, Scope, Writes
from attn_kernels import Primitive, SinkAndWindow, Sparsity


class Streaming(Edit):
    """sinks: first tokens always seen (paper: 4). window: recent tokens seen, the query's own included."""

    method: ClassVar[str] = "streaming"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, section 3.2"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    sinks: NonNegative = Field(default=4, description="first tokens that every query sees")
    window: Positive = Field(default=1024, description="most recent tokens that a query sees, its own included")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        return [Sparsity(SinkAndWindow(self.sinks, self.window), heads=call.select_heads(self.heads))]
