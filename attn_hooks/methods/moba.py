"""MoBA: each query chooses the blocks of keys whose mean it goes along with most.

Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189. Keys are taken in blocks; with
kbar_n the mean of block n and B(i) the block of query i,

    g[i, n] = <q_i, kbar_n>    for n < B(i)
    visible(i, j) = B(j) = B(i)  or  B(j) among the ``top_k`` - 1 blocks of largest g[i]        (and causal)

Each query head chooses for itself with the keys of its group; of equal blocks the first. The mean of a query's own block would
hold keys that come after it, and is not looked at. Blocks are counted from a sample's first real token; under a model's own
sliding window those are chosen from that reach into it.

Its authors train with the pattern and say that it is no drop-in for a model trained with dense attention. The paper has no
default; block 2048 and ``top_k`` 3 stand in the released code's comments. Decode is dense, as there. Several tokens after the
prompt's first forward are refused unless ``later_tokens="dense"``. As many blocks as the prompt has are the identity.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_hooks.real_tokens import first_key_and_row, from_place
from attn_kernels import AttentionInputs, KeyTiles, Primitive, Sparsity
from attn_kernels.patterns import largest

# So many products of a query and a block's mean are in memory at once.
MOST_SCORES = 2**26


class MoBA(Edit):
    """block: tokens in a block. top_k: blocks that a query visits, its own included."""

    method: ClassVar[str] = "moba"
    source: ClassVar[str] = "MoBA, arXiv 2502.13189"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "whole-matrix"
    head_indexed: ClassVar[bool] = True
    # Where the prompt ended, dense rows begin.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    block: Positive = Field(default=2048, description="tokens in a block")
    top_k: Positive = Field(default=3, description="blocks that a query visits, its own included")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "dense"] = Field(
        default="refuse", description="several new tokens after the prompt's first forward: refuse, or dense attention"
    )

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "decode" or call.inputs.num_keys <= self.top_k * self.block:
            return []
        if call.phase == "chunk":
            if self.later_tokens == "dense":
                return []
            reason = "blocks are chosen in a prompt's first forward. Give it in one, or set later_tokens='dense'."
            raise self.refuse_phase(call, reason)
        with torch.no_grad():
            chosen = chosen_blocks(call.inputs, self.block, self.top_k)
        return [Sparsity(KeyTiles(chosen, 1, self.block), heads=call.select_heads(self.heads))]


def chosen_blocks(inputs: AttentionInputs, block: int, top_k: int) -> Tensor:
    """``(B, H, N, S)`` bool: which blocks of keys each query visits, both counted from a sample's first real token."""
    batch, heads, num_queries = inputs.query.shape[:3]
    first_key, first_row = first_key_and_row(inputs)
    mean, has_keys = block_means(inputs, first_key, block)
    query = from_place(inputs.query, first_row, inputs).unflatten(1, (mean.shape[1], -1))
    number = torch.arange(mean.shape[2], device=mean.device)
    position = (inputs.query_offset + first_row - first_key)[:, None] + torch.arange(num_queries, device=mean.device)
    # By block, as the kernel reads it.
    chosen = torch.empty(batch, heads, len(number), num_queries, dtype=torch.bool, device=mean.device)
    at_once = max(1, MOST_SCORES // (batch * heads * len(number)))
    for first in range(0, num_queries, at_once):
        rows = slice(first, first + at_once)
        at = position[:, rows, None]
        past = (number < at // block) & has_keys[:, None]
        if inputs.window is not None:
            past = past & ((number + 1) * block > at - inputs.window + 1)
        gate = query[:, :, :, rows].to(mean.dtype) @ mean[:, :, None].transpose(-1, -2)
        past, own = past[:, None, None], (number == at // block)[:, None, None]
        kept = own | (largest(gate.masked_fill_(~past, -torch.inf), top_k - 1) & past)
        chosen[..., rows] = kept.flatten(1, 2).transpose(2, 3)
    return chosen.transpose(2, 3)


def block_means(inputs: AttentionInputs, first_key: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """kbar ``(B, K, S, D)`` of blocks counted from each sample's first real key, in float32 at least, and ``(B, S)`` bool:
    blocks that hold a real key."""
    dtype = torch.promote_types(inputs.key.dtype, torch.float32)
    is_key = from_place(inputs.key_valid.expand(len(inputs.key), -1)[:, None, :, None], first_key, inputs)
    key = from_place(inputs.key, first_key, inputs)
    if inputs.padded:
        key = key.masked_fill(~is_key, 0)
    missing = -key.shape[2] % block
    total = functional.pad(key, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3, dtype=dtype)
    count = functional.pad(is_key, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3)
    return total / count.clamp(min=1), count[:, 0, :, 0] > 0
