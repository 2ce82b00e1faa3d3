"""AnchorAttention: single keys that nearly reach the largest logit of a query's surroundings, in prefill.

Source: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", EMNLP 2025, arXiv 2505.23520.
Queries are taken in blocks, ``step`` blocks are a super-block g, and L_g is where it begins. A query visits the first
``sink_blocks`` blocks of keys, ending at I, and its own super-block; the largest logit there is its anchor. With qbar_r and abar_r
the means of query and anchor over block r, all queries of g visit the stripes

    { j in [I, L_g) :  scaling * <qbar_r, k_j>  >=  abar_r - theta   for some block r of g }

Published: blocks of 128, 16 of them a super-block, theta 12. Sinks are 128 keys here; the released code takes a whole super-block
of them. Its stripes begin inside its sinks, whose keys then count twice, and end a block before L_g, so that nobody sees the last
one; [I, L_g) is neither. Decode is dense. Each query head chooses for itself with the keys of its group; positions count from a
sample's first real token. Several tokens after the prompt's first forward would lie in other blocks than in one forward, and are
refused unless ``later_tokens="dense"``. Sinks up to the prompt's last super-block are the identity, so a prompt of one super-block
is dense.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_kernels import AttentionInputs, KeyTiles, Primitive, Sparsity
from attn_kernels.patterns import Stripes, first_real_key

# Scores of so many pairs are in memory at once, or those of one super-block.
MOST_SCORES = 2**26


class AnchorAttention(Edit):
    """theta: how far below the anchor a kept logit may lie. block: tokens in a block. step: blocks that share stripes."""

    method: ClassVar[str] = "anchor"
    source: ClassVar[str] = "AnchorAttention, arXiv 2505.23520"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "whole-matrix"
    head_indexed: ClassVar[bool] = True
    # Where the prompt ended, dense rows begin.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    theta: float = Field(default=12.0, description="how far below the anchor a kept logit may lie; larger keeps more")
    block: Positive = Field(default=128, description="tokens in a block")
    step: Positive = Field(default=16, description="blocks of queries in a super-block, which share their stripes")
    sink_blocks: Positive = Field(default=1, description="first blocks that every query sees")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "dense"] = Field(
        default="refuse", description="several new tokens after the prompt's first forward: refuse, or dense attention"
    )

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        of_super_block = self.block * self.step
        last_begin = (call.inputs.num_keys - 1) // of_super_block * of_super_block
        if call.phase == "decode" or last_begin <= self.sink_blocks * self.block:
            return []
        if call.phase == "chunk":
            if self.later_tokens == "dense":
                return []
            reason = "stripes are chosen in a prompt's first forward. Give it in one, or set later_tokens='dense'."
            raise self.refuse_phase(call, reason)
        with torch.no_grad():
            places = Places(call.inputs, self.block, self.step, self.sink_blocks)
            stripes = Stripes(kept_stripes(places, self.theta), self.step)
            pattern = KeyTiles(places.sinks_and_own(), self.block, self.block, stripes)
        return [Sparsity(pattern, heads=call.select_heads(self.heads))]


class Places:
    """A call's blocks and super-blocks, counted from each sample's first real query, and its keys from the first real one."""

    def __init__(self, inputs: AttentionInputs, block: int, step: int, sink_blocks: int) -> None:
        self.inputs, self.block, self.step = inputs, block, step
        self.device, self.span = inputs.query.device, block * step
        self.sinks = sink_blocks * block
        self.first_key = first_real_key(inputs)
        self.first_row = (self.first_key - inputs.query_offset).clamp(min=0)
        # The position of the first real query of the call.
        self.begin = inputs.query_offset + self.first_row - self.first_key
        self.super_blocks = -(-inputs.num_queries // self.span)

    def own_begin(self, super_block: Tensor) -> Tensor:
        """L ``(B|1, n)`` of super-blocks ``(n,)``: at the beginning of a block of keys."""
        return (self.begin[:, None] + super_block * self.span) // self.block * self.block

    def sinks_and_own(self) -> Tensor:
        """``(B|1, 1, T, U)`` bool: blocks of keys that are visited whatever they hold."""
        row = torch.arange(0, self.inputs.num_queries, self.block, device=self.device)
        key = torch.arange(0, self.inputs.num_keys, self.block, device=self.device)
        own = self.own_begin(row // self.span)[:, :, None]
        last = (self.begin[:, None] + row + self.block - 1)[:, :, None]
        return ((key < self.sinks) | ((key >= own) & (key <= last)))[:, None]

    def queries(self, tensor: Tensor, super_blocks: slice) -> Tensor:
        """``(B, h, n, step * block, D)`` of ``(B, h, N, D)``; 0 beyond the last."""
        place = torch.arange(super_blocks.start * self.span, super_blocks.stop * self.span, device=self.device)
        return _taken(tensor, place + self.first_row[:, None]).unflatten(2, (-1, self.span))

    def keys(self, tensor: Tensor, position: Tensor) -> Tensor:
        """``(B, h, n, D)`` of ``(B, h, M, D)`` at positions ``(B|1, n)``; 0 beyond the last."""
        return _taken(tensor, position + self.first_key[:, None])


def kept_stripes(places: Places, theta: float) -> Tensor:
    """``(B, H, G, M)`` bool: stripes of super-blocks, by position from a sample's first real key on."""
    inputs, step, span = places.inputs, places.step, places.span
    batch, heads = inputs.query.shape[:2]
    scores_of_one = batch * heads * max(span * (span + places.sinks), step * inputs.num_keys)
    at_once = max(1, MOST_SCORES // scores_of_one)
    found = []
    for first in range(0, places.super_blocks, at_once):
        super_blocks = slice(first, min(first + at_once, places.super_blocks))
        query, anchor = pooled_anchors(places, super_blocks)
        # What lies behind the last of these super-blocks.
        stop = min(inputs.num_keys, inputs.query_offset + (super_blocks.stop - 1) * span)
        position = torch.arange(stop, device=places.device)
        key = places.keys(inputs.key, position[None]).float()
        is_key = places.keys(inputs.key_valid[:, None, :, None], position[None])[:, :, :, 0]
        logits = _logits(query.flatten(3, 4), key[:, :, None], inputs).unflatten(3, query.shape[3:5])
        reached = (logits >= (anchor - theta)[..., None]).any(4).flatten(1, 2)
        own = places.own_begin(torch.arange(super_blocks.start, super_blocks.stop, device=places.device))
        between = (position >= places.sinks) & (position < own[:, None, :, None]) & is_key[:, :, None]
        found.append(functional.pad(reached & between, (0, inputs.num_keys - stop)))
    return torch.cat(found, dim=2)


def pooled_anchors(places: Places, super_blocks: slice) -> tuple[Tensor, Tensor]:
    """qbar ``(B, K, H / K, n, step, D)`` and abar ``(B, K, H / K, n, step)`` float32 of some super-blocks.

    abar is infinite in blocks without a real query.
    """
    inputs, kv_heads, device = places.inputs, places.inputs.key.shape[1], places.device
    query = places.queries(inputs.query, super_blocks).float().unflatten(1, (kv_heads, -1))
    is_query = places.queries(inputs.query_valid[:, None, :, None], super_blocks)[:, :, None, ..., 0]
    number = torch.arange(super_blocks.start, super_blocks.stop, device=device)
    row = (places.begin[:, None] + number * places.span)[..., None] + torch.arange(places.span, device=device)
    # A chunk of a prompt may begin inside a block.
    width = places.span + (places.block if inputs.query_offset else 0)
    own = places.own_begin(number)[..., None] + torch.arange(width, device=device)
    sinks = torch.arange(min(places.sinks, inputs.num_keys), device=device).expand(*own.shape[:2], -1)
    position = torch.cat([sinks, own], dim=-1)
    key, is_key = (
        places.keys(tensor, position.flatten(1)).unflatten(2, position.shape[1:])
        for tensor in (inputs.key, inputs.key_valid[:, None, :, None])
    )
    seen = (position[:, :, None] <= row[..., None]) & is_key[:, 0, :, None, :, 0]
    if inputs.window is not None:
        seen = seen & (position[:, :, None] > row[..., None] - inputs.window)
    logits = _logits(query, key[:, :, None].float(), inputs)
    anchor = logits.masked_fill_(~seen[:, None, None], -torch.inf).amax(-1)
    blocks = (places.step, places.block)
    count = is_query.unflatten(-1, blocks).sum(-1)
    pooled = (query * is_query[..., None]).unflatten(4, blocks).sum(5) / count.clamp(min=1)[..., None]
    # Rows of padding may see nothing.
    anchor = torch.where(is_query, anchor, 0.0).unflatten(-1, blocks).sum(-1) / count
    return pooled, torch.where(count > 0, anchor, torch.inf)


def _logits(query: Tensor, key: Tensor, inputs: AttentionInputs) -> Tensor:
    logits = (query * inputs.scaling) @ key.transpose(-1, -2)
    return logits if inputs.softcap is None else inputs.softcap * torch.tanh(logits / inputs.softcap)


def _taken(tensor: Tensor, place: Tensor) -> Tensor:
    """``(B, h, n, D)`` of ``(B, h, N, D)`` at places ``(B|1, n)``; 0 beyond the last."""
    samples, size = max(len(tensor), len(place)), tensor.shape[2]
    inside = (place < size)[:, None, :, None]
    place = place.clamp(max=size - 1)[:, None, :, None].expand(samples, tensor.shape[1], -1, tensor.shape[3])
    return tensor.expand(samples, -1, -1, -1).gather(2, place).masked_fill(~inside, 0)
