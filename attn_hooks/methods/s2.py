"""S2-Attention: a local window, and of the blocks further back a shard that differs from head to head.

Source: Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", arXiv 2407.17678, and its kernel
library, DKernel. With r and c the blocks of query and key and h the key and value head,

    visible(h, r, c) = r - c < local_blocks  or  (c + h * step) mod stride = 0        (and causal)
    step = max(1, floor(stride / key heads))

so that heads together see every block if there are as many as ``stride``; if nobody would see some block, the edit is refused.
The library counts the step by query heads, by which 8 key heads of 32 query heads see half of the far blocks at stride 16; here
it is by whatever is sharded: key heads, whose query heads then share their keys, or with ``shards="query_heads"`` each query
head.

Blocks of 64 and a stride of 8 are those of the library's example, 16 local blocks those of ONNX Runtime's. Its authors train with
the pattern. It holds in decode, too, where the cache keeps its length. Blocks are counted from a sample's first real token.
Stride 1, or as many local blocks as the sequence has, is the identity.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_kernels import Primitive, ShardedBlocks, Sparsity


class S2Attention(Edit):
    """block: tokens in a block. local_blocks: recent ones, its own included. stride: of those further back one in so many."""

    method: ClassVar[str] = "s2"
    source: ClassVar[str] = "S2-Attention, arXiv 2407.17678"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    block: Positive = Field(default=64, description="tokens in a block")
    local_blocks: Positive = Field(default=16, description="recent blocks that a query sees, its own included")
    stride: Positive = Field(default=8, description="of the blocks further back a head sees one in so many")
    shards: Literal["key_heads", "query_heads"] = Field(
        default="key_heads", description="which heads differ in their blocks"
    )
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")

    def phase(self, head: int, num_heads: int, num_kv_heads: int) -> int:
        """Of query head ``head``: it sees the far blocks c with ``(c + phase) mod stride = 0``."""
        count = num_kv_heads if self.shards == "key_heads" else num_heads
        return head * count // num_heads * max(1, self.stride // count) % self.stride

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        for index in self.layers_in(model):
            layer = model.layer(index)
            named = self.heads_in(model, index) or tuple(range(layer.num_heads))
            seen = {self.phase(head, layer.num_heads, layer.num_kv_heads) for head in named}
            # A head that is not edited sees everything.
            if len(set(named)) == layer.num_heads and len(seen) < self.stride:
                ways_out = f"Set stride to at most {len(seen)}, or name fewer heads"
                if self.shards == "key_heads" and layer.num_heads > len(seen):
                    ways_out += ", or set shards='query_heads'"
                detail = (
                    f"stride: the heads of layer {index} of {model.model_class} together see {len(seen)} of every "
                    f"{self.stride} far blocks, and nobody the others. {ways_out}."
                )
                raise error("bad-parameters", method=self.method, detail=detail)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        inputs = call.inputs
        num_heads, num_kv_heads = inputs.num_heads, inputs.key.shape[1]
        if call.info is not None:
            # Of all ranks.
            layer = call.info.layer(call.layer)
            num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
        place = (self.method, self.stride, self.shards, call.heads, num_heads, num_kv_heads)
        if place not in call.selections:
            phases = [self.phase(head, num_heads, num_kv_heads) for head in call.heads]
            call.selections[place] = torch.tensor(phases, dtype=torch.int32).to(call.device)
        pattern = ShardedBlocks(self.block, self.local_blocks, self.stride, call.selections[place])
        return [Sparsity(pattern, heads=call.select_heads(self.heads))]
