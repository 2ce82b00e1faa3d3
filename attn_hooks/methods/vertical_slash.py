"""Vertical-slash: columns and diagonals of keys chosen by a prompt's last queries, in prefill.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", NeurIPS 2024,
arXiv 2407.02490. With A the attention of the prompt's last ``last`` queries to all keys,

    v[j] = sum over rows i of A[i, j]         the ``vertical`` heaviest columns are kept, the ``first`` at any rate
    s[o] = sum over rows i of A[i, i - o]     the ``slash`` heaviest diagonals are kept, the ``nearest`` at any rate

A query visits the kept columns, and the blocks of keys that a kept diagonal crosses. Decode is dense.

Published: 64 last queries, blocks of 64, the first 30 columns, the nearest 100 diagonals, in all 1000 columns and 6096 diagonals
where no search has set others; one of three patterns for each head, from an offline search. Here all heads have this pattern, each
query head chooses for itself with the keys of its group, and positions count from a sample's first real token. Blocks lie on one
grid, counted from there, so that a diagonal crosses two or three blocks of a tile of queries; the released kernel lays blocks of 64
along each diagonal. Several tokens after the prompt's first forward are refused unless ``later_tokens="dense"``. A prompt no longer
than ``vertical`` or ``slash`` is dense.
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
from attn_kernels import AttentionInputs, KeyTiles, Primitive, Sparsity
from attn_kernels.patterns import first_real_key

# Scores of so many pairs are in memory at once.
MOST_SCORES = 2**26


class VerticalSlash(Edit):
    """vertical, slash: columns and diagonals kept. last: queries that choose. query_block, block: queries and keys of a tile."""

    method: ClassVar[str] = "vertical_slash"
    source: ClassVar[str] = "MInference, arXiv 2407.02490"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "visibility"
    scope: ClassVar[Scope] = "whole-matrix"
    head_indexed: ClassVar[bool] = True
    # Where the prompt ended, dense rows begin.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    by_pattern: ClassVar[bool] = True

    vertical: Positive = Field(default=1000, description="columns kept")
    slash: Positive = Field(default=6096, description="diagonals kept")
    first: int = Field(default=30, ge=0, description="columns kept at any rate, from the first token on")
    nearest: Positive = Field(default=100, description="diagonals kept at any rate, from a query's own key on")
    last: Positive = Field(default=64, description="the prompt's last queries, which choose")
    query_block: Positive = Field(default=128, description="queries of a tile")
    block: Positive = Field(default=64, description="keys of a tile")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")
    later_tokens: Literal["refuse", "dense"] = Field(
        default="refuse", description="several new tokens after the prompt's first forward: refuse, or dense attention"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.first > self.vertical or self.nearest > self.slash:
            raise ValueError(
                f"first {self.first} is among vertical {self.vertical}, nearest {self.nearest} among slash {self.slash}: "
                "it can't be more"
            )
        return self

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "decode" or call.inputs.num_keys <= max(self.vertical, self.slash):
            return []
        if call.phase == "chunk":
            if self.later_tokens == "dense":
                return []
            reason = "keys are chosen in a prompt's first forward. Give it in one, or set later_tokens='dense'."
            raise self.refuse_phase(call, reason)
        with torch.no_grad():
            pattern = (self._by_kernels if _knows_kernels(call.inputs) else self._chosen)(call.inputs)
        return [Sparsity(pattern, heads=call.select_heads(self.heads))]

    def _chosen(self, inputs: AttentionInputs) -> KeyTiles:
        columns, diagonals = self._with_what_is_kept(*column_and_diagonal_mass(inputs, self.last))
        kept = columns.topk(self.vertical).indices.sort(-1).values
        tiles = crossed_tiles(diagonals.topk(self.slash).indices, inputs, self.query_block, self.block)
        return KeyTiles(tiles, self.query_block, self.block, kept)

    def _by_kernels(self, inputs: AttentionInputs) -> KeyTiles:
        """The same; of equal sums the first."""
        from attn_kernels.sparse_attention.heaviest import heaviest_places
        from attn_kernels.sparse_attention.last_rows import column_and_diagonal_sums, crossed_by

        last = min(self.last, inputs.num_queries)
        settings = (inputs.query_offset, inputs.scaling, inputs.softcap, inputs.window)
        columns, diagonals = self._with_what_is_kept(
            *column_and_diagonal_sums(inputs.query, inputs.key, last, *settings)
        )
        sizes = (inputs.num_queries, inputs.num_keys, inputs.query_offset, self.query_block, self.block)
        tiles = crossed_by(heaviest_places(diagonals, self.slash), *sizes)
        return KeyTiles(tiles, self.query_block, self.block, heaviest_places(columns, self.vertical))

    def _with_what_is_kept(self, columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
        columns[..., : self.first] = torch.inf
        diagonals[..., : self.nearest] = torch.inf
        return columns, diagonals


def _knows_kernels(inputs: AttentionInputs) -> bool:
    plain = inputs.causal and not inputs.padded and inputs.mask is None and inputs.bias is None
    return plain and engine.has_kernels(inputs)


def column_and_diagonal_mass(inputs: AttentionInputs, last: int) -> tuple[Tensor, Tensor]:
    """v and s, ``(B, H, M)`` float32 each: by key, from a sample's first real one on, and by distance; -1 beyond its last.

    A model's learned sink logits are left out.
    """
    batch, kv_heads, num_keys = inputs.query.shape[0], inputs.key.shape[1], inputs.num_keys
    last = min(last, inputs.num_queries)
    places = torch.arange(num_keys, device=inputs.query.device)
    end = _end_of_queries(inputs)
    row = end[:, None] + torch.arange(-last, 0, device=places.device)
    at = row.clamp(min=0)
    if inputs.padded:
        width = inputs.query.shape[-1]
        query = inputs.query.gather(2, at[:, None, :, None].expand(-1, inputs.num_heads, -1, width))
        visible = torch.stack([inputs.visible(of_sample)[sample % batch] for sample, of_sample in enumerate(at)])
        visible = visible & (row >= 0)[:, None, :, None]
    else:
        query, visible = (
            inputs.query[:, :, -last:],
            inputs.visible(slice(inputs.num_queries - last, inputs.num_queries)),
        )
    query = query.unflatten(1, (kv_heads, -1))
    columns, diagonals = [], []
    # The scores of all heads at once could be larger than the keys.
    at_once = max(1, MOST_SCORES // query[:, 0, :, :, 0].numel() // num_keys)
    for first in range(0, kv_heads, at_once):
        kv = slice(first, first + at_once)
        logits = (query[:, kv] @ inputs.key[:, kv, None].transpose(-1, -2)).float() * inputs.scaling
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        seen = visible[:, None] if visible.shape[1] == 1 else visible.unflatten(1, (kv_heads, -1))[:, kv]
        # Rows of padding see nothing.
        weights = logits.masked_fill_(~seen, -torch.inf).softmax(-1).nan_to_num_(0.0).flatten(1, 2)
        columns.append(weights.sum(2))
        # In lines longer by one, what stood on one diagonal stands below each other.
        lines = functional.pad(weights, (last, 0)).flatten(2)
        lines = functional.pad(lines, (0, last)).unflatten(2, (last, num_keys + last + 1))
        diagonals.append(lines.sum(2))
    by_key, by_diagonal = torch.cat(columns, 1), torch.cat(diagonals, 1)
    heads = by_key.shape[1]
    if not inputs.padded:
        return by_key, by_diagonal[..., 1 : num_keys + 1].flip(-1)
    first_key = first_real_key(inputs)
    place = (places + first_key[:, None])[:, None].expand(batch, heads, -1)
    of_distance = (end[:, None] - places)[:, None].expand(batch, heads, -1)
    beyond = places >= (end - first_key)[:, None, None]
    by_key = by_key.gather(2, place.clamp(max=num_keys - 1)).masked_fill(beyond, -1.0)
    return by_key, by_diagonal.gather(2, of_distance.clamp(min=0)).masked_fill(beyond, -1.0)


def _end_of_queries(inputs: AttentionInputs) -> Tensor:
    """``(B|1,)`` long: one past the place of each sample's last real query."""
    real = inputs.query_valid
    return inputs.num_queries - real.flip(-1).long().argmax(-1)


def crossed_tiles(distances: Tensor, inputs: AttentionInputs, query_block: int, block: int) -> Tensor:
    """``(B, H, T, S)`` bool: tiles in which some query and some key lie at one of the distances ``(B, H, n)``."""
    device, num_keys = distances.device, inputs.num_keys
    kept = torch.zeros(*distances.shape[:2], num_keys + 1, dtype=torch.int32, device=device)
    kept[..., 1:].scatter_(2, distances, 1)
    # How many kept distances lie below each.
    below = kept.cumsum(-1)
    query = torch.arange(0, inputs.num_queries, query_block, device=device)[:, None]
    key = torch.arange(0, num_keys, block, device=device)
    nearest, furthest = query - (key + block - 1), query + query_block - 1 - key
    until, since = (furthest + 1).clamp(0, num_keys), nearest.clamp(0, num_keys)
    return below[..., until] > below[..., since]
