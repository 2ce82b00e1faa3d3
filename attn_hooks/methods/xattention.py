"""XAttention: blocks of keys chosen by the sums of antidiagonals, in prefill.

Source: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025, arXiv 2503.16428. With a stride S,
queries and keys are taken in runs of S; the cell of run i and run j is scored by its antidiagonal,

    a[i, j] = softmax over j of  sum over s < S of  q[iS + S - 1 - s] . k[jS + s]  * scaling / S      (causal by runs)
    m[t, u] = sum of a[i, j] over the runs of query block t and key block u

A query block visits the block of the first key, those on its diagonal, and of the others the heaviest until the visited ones hold
``threshold`` of the row's m. Decode is dense.

Published: blocks of 128, S 16 or 8, threshold 0.9 or 0.95 for all heads, or one for each head from a search. Here each query head
chooses for itself with the keys of its group, and blocks are counted from a sample's first real token. Several tokens after the
prompt's first forward would lie in other blocks than in one forward, and are refused unless ``later_tokens="dense"``. Threshold 1
is the identity. A prompt of one block is dense.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from attn_hooks import engine
from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_hooks.real_tokens import first_key_and_row, from_place
from attn_kernels import AttentionInputs, KeyTiles, Primitive, Sparsity

# Scores of so many pairs of runs are in memory at once.
MOST_SCORES = 2**26


class XAttention(Edit):
    """threshold: share of the scores that the visited blocks hold. stride: tokens in a run. block: tokens in a block."""

    method: ClassVar[str] = "xattention"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "whole-matrix"
    head_indexed: ClassVar[bool] = True
    # Where the prompt ended, dense rows begin.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    threshold: float = Field(default=0.9, ge=0.0, le=1.0, description="share of the scores kept; 1: identity")
    stride: Positive = Field(default=16, description="tokens in a run (8 or 16 were published)")
    block: Positive = Field(default=128, description="tokens in a block, a multiple of the stride")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "dense"] = Field(
        default="refuse", description="several new tokens after the prompt's first forward: refuse, or dense attention"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.block % self.stride:
            raise ValueError(f"block {self.block} is no multiple of stride {self.stride}")
        return self

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "decode" or self.threshold == 1.0 or call.inputs.num_keys <= self.block:
            return []
        if call.phase == "chunk":
            if self.later_tokens == "dense":
                return []
            reason = "blocks are chosen in a prompt's first forward. Give it in one, or set later_tokens='dense'."
            raise self.refuse_phase(call, reason)
        with torch.no_grad():
            mass = antidiagonal_mass(call.inputs, self.stride, self.block)
            choose = heaviest_by_kernel if engine.has_kernels(call.inputs) else heaviest
            chosen = choose(mass, forced_blocks(call.inputs, self.block), self.threshold)
        return [Sparsity(KeyTiles(chosen, self.block, self.block), heads=call.select_heads(self.heads))]


def antidiagonal_mass(inputs: AttentionInputs, stride: int, block: int) -> Tensor:
    """m ``(B, H, T, U)`` float32 of query blocks and key blocks, counted from each sample's first real token; 0 in blocks that no
    query of the block sees."""
    batch, heads, kv_heads = inputs.query.shape[0], inputs.num_heads, inputs.key.shape[1]
    if engine.has_kernels(inputs):
        found = _on_the_device(inputs, stride, block)
        if found is not None:
            return found
    first_key, first_row = first_key_and_row(inputs)
    is_key, is_query = inputs.key_valid.expand(batch, -1), inputs.query_valid.expand(batch, -1)
    key = _runs(from_place(inputs.key.masked_fill(~is_key[:, None, :, None], 0), first_key, inputs), stride, block)
    # Scaled before: in float16 the sums could overflow.
    query = from_place(inputs.query * (inputs.scaling / stride), first_row, inputs)
    query = _runs(query, stride, block, backwards=True)
    query = query.unflatten(1, (kv_heads, heads // kv_heads))
    key_in_run = _in_runs(from_place(is_key[:, None, :, None], first_key, inputs), key.shape[2], stride)
    query_in_run = _in_runs(from_place(is_query[:, None, :, None], first_row, inputs), query.shape[3], stride)
    # By position; a chunk of a prompt begins later.
    key_position = torch.arange(key.shape[2], device=key.device) * stride
    query_position = (inputs.query_offset + first_row - first_key)[:, None] + (
        torch.arange(query.shape[3], device=key.device) * stride
    )
    runs_a_block = block // stride
    at_once = runs_a_block * max(1, MOST_SCORES // (batch * heads * runs_a_block * key.shape[2]))
    found = []
    for first in range(0, query.shape[3], at_once):
        rows = slice(first, first + at_once)
        position = query_position[:, rows, None]
        seen = (key_position <= position + stride - 1) & key_in_run[:, None, :] & query_in_run[:, rows, None]
        if inputs.window is not None:
            seen = seen & (key_position + stride - 1 > position - inputs.window)
        logits = (query[:, :, :, rows] @ key[:, :, None].transpose(-1, -2)).float()
        # Runs of padding see nothing.
        scores = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        cells = scores.unflatten(-1, (-1, runs_a_block)).unflatten(3, (-1, runs_a_block))
        found.append(cells.sum((4, 6)).flatten(1, 2))
    return torch.cat(found, dim=2)


def _on_the_device(inputs: AttentionInputs, stride: int, block: int) -> Tensor | None:
    """By the kernel; None where it knows no blocks of so many runs."""
    from attn_kernels.sparse_attention.antidiagonal import RUNS_OF_BLOCK, antidiagonal_block_mass

    if block // stride not in RUNS_OF_BLOCK:
        return None
    key, padding, batch = inputs.key, None, inputs.query.shape[0]
    if inputs.padded:
        first_key, first_row = first_key_and_row(inputs)
        is_key, is_query = inputs.key_valid.expand(batch, -1), inputs.query_valid.expand(batch, -1)
        key = key.masked_fill(~is_key[:, None, :, None], 0)
        padding = (
            first_row,
            first_key,
            *(
                _in_runs(
                    from_place(real[:, None, :, None], first, inputs),
                    -(-real.shape[1] // block) * (block // stride),
                    stride,
                )
                for real, first in ((is_query, first_row), (is_key, first_key))
            ),
        )
    return antidiagonal_block_mass(
        inputs.query, key, inputs.scaling, stride, block, inputs.query_offset, inputs.window, padding
    )


def _runs(tensor: Tensor, stride: int, block: int, backwards: bool = False) -> Tensor:
    """``(B, h, runs, stride * D)`` of whole blocks of ``(B, h, N, D)``, each run's tokens one after the other."""
    padded = functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % block)).unflatten(2, (-1, stride))
    return (padded.flip(3) if backwards else padded).flatten(3)


def _in_runs(real: Tensor, runs: int, stride: int) -> Tensor:
    """``(B, runs)`` bool: runs with a real token, of ``(B, 1, N, 1)`` bool."""
    tokens = real[:, 0, :, 0]
    return functional.pad(tokens, (0, runs * stride - tokens.shape[1])).unflatten(1, (-1, stride)).any(-1)


def forced_blocks(inputs: AttentionInputs, block: int) -> Tensor:
    """``(B|1, 1, T, U)`` bool: the first block, and those on the diagonal."""
    device = inputs.query.device
    if not inputs.padded:
        tiles, blocks = (-(-size // block) for size in (inputs.num_queries, inputs.num_keys))
        forced = torch.ones(1, 1, tiles, blocks, dtype=torch.bool, device=device)
        forced = forced.tril_(-(-inputs.query_offset // block)).triu_(inputs.query_offset // block)
        forced[..., 0] = True
        return forced
    first_key, first_row = first_key_and_row(inputs)
    tiles = torch.arange(0, inputs.num_queries, block, device=device)
    row = (inputs.query_offset + first_row - first_key)[:, None, None, None] + tiles[:, None]
    key = torch.arange(0, inputs.num_keys, block, device=device)
    return ((key <= row + block - 1) & (key + block > row)) | (key == 0)


def heaviest(mass: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """``(B, H, T, U)`` bool: the forced blocks, and of the others the heaviest until all of them hold ``threshold`` of the row."""
    forced = forced.expand(mass.shape)
    needed = threshold * mass.sum(-1, keepdim=True) - (mass * forced).sum(-1, keepdim=True)
    others, order = mass.masked_fill(forced, 0.0).sort(dim=-1, descending=True)
    before = others.cumsum(-1) - others
    kept = torch.zeros_like(forced).scatter(-1, order, (before < needed) & (others > 0))
    return kept | forced


def heaviest_by_kernel(mass: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """As ``heaviest``; of equal blocks the first."""
    from attn_kernels.sparse_attention.heaviest import keep_heaviest_

    return keep_heaviest_(forced.expand(mass.shape).contiguous(), mass, threshold)
