"""PowerAttention: blocks at power-of-two distances, so that the receptive field doubles with each layer.

Source: Chen et al., "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention", arXiv
2503.03588, section 3. With b the block, B(t) = floor(t / b) and n = B(i) - B(j):

    visible(i, j) = n < window_blocks  or  n in {0, 1, 2, 4, 8, ...}  or  B(j) < sink_blocks        (and causal)

Blocks are counted from the sequence's first real token. The paper trains with the pattern and keeps no layer dense; the
block size and window are ours (its own are not stated in what we could read). Without training, expect loss on
retrieval unless some layers stay dense (``dense_layers``). The identity is a window of at least as many blocks as the sequence has.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, NonNegative, Positive, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_kernels import PowerOfTwoBlocks, Primitive, Sparsity


class PowerAttention(Edit):
    """block: tokens a block. window_blocks, sink_blocks: local and first blocks always seen."""

    method: ClassVar[str] = "power"
    source: ClassVar[str] = "PowerAttention, arXiv 2503.03588, section 3"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    block: Positive = Field(default=64, description="tokens in a block")
    window_blocks: Positive = Field(default=4, description="local blocks seen, the query's own included")
    sink_blocks: NonNegative = Field(default=1, description="first blocks that every query sees")
    dense_layers: Layers = Field(default=(), description="layers left dense, from 0")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        return tuple(layer for layer in super().layers_in(model) if layer not in self.dense_layers)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        self.check_layers(self.dense_layers, model)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        pattern = PowerOfTwoBlocks(self.block, self.window_blocks, self.sink_blocks)
        return [Sparsity(pattern, heads=call.select_heads(self.heads))]
