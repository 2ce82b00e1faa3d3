"""A Sparsity of a call for the sparse kernel, and which calls that takes."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attn_kernels.edited_attention.head_affine import head_affine_
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered, indices_of_heads, lower, selected_heads
from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import HeaviestKeys, KeyTiles, Pattern, PowerOfTwoBlocks, ShardedBlocks, SinkAndWindow
from attn_kernels.primitives import HeadAffine, Primitive, Sparsity
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.visits import TILE_SIZES, visits_of

ROWS_COMPARED_AT_ONCE = 1024


def lower_sparsity(inputs: AttentionInputs, edits: Sequence[Primitive]) -> LoweredEdits:
    """The edits of a call with one Sparsity at least. Raises ``NotLowered`` for what only the PyTorch path can do."""
    patterns = [edit for edit in edits if isinstance(edit, Sparsity)]
    affine = [edit for edit in edits if isinstance(edit, HeadAffine)]
    if len(patterns) > 1:
        raise NotLowered("more than one Sparsity")
    if len(affine) + 1 < len(edits):
        raise NotLowered("a Sparsity beside other edits of the weights")
    pattern = patterns[0].pattern
    refusal = pattern_refusal(pattern)
    if refusal is not None:
        raise NotLowered(refusal)
    if isinstance(pattern, KeyTiles) and pattern.columns is not None and inputs.window is not None:
        # Rows of one tile would see different columns at its edge.
        raise NotLowered("single columns of keys in a sliding window")
    if patterns[0].dense_rows and not isinstance(pattern, SinkAndWindow):
        raise NotLowered(f"dense rows under {pattern}")
    return replace(lower(inputs, affine), sparsity=patterns[0], heads=selected_heads(edits), unscoped=None)


def pattern_refusal(pattern: Pattern | KeyTiles | HeaviestKeys) -> str | None:
    """Why no kernel knows a pattern; None if one does."""
    if isinstance(pattern, KeyTiles):
        if pattern.query_tile == 1 and pattern.columns is None:
            smallest = TILE_SIZES[0]
            return f"{pattern}: no multiple of {smallest} keys" if pattern.key_tile % smallest else None
        sizes = (pattern.query_tile, pattern.key_tile)
        return None if all(size in TILE_SIZES for size in sizes) else f"{pattern}: tiles are of {TILE_SIZES}"
    if isinstance(pattern, ShardedBlocks):
        smallest = TILE_SIZES[0]
        return f"{pattern}: no multiple of {smallest} keys" if pattern.block % smallest else None
    return None if isinstance(pattern, SinkAndWindow | PowerOfTwoBlocks) else f"the pattern {pattern}"


def sparse_refusal(inputs: AttentionInputs) -> str | None:
    """Why the sparse kernel cannot compute this call; None if it can. Waits for the device once for a mask."""
    if not inputs.causal:
        return "attention that is not causal"
    if inputs.padded and not bool(_padding(inputs)[1]):
        return "padding that is not on the left alone"
    given = inputs.mask if inputs.mask is not None else inputs.bias
    if given is None:
        return None
    place = (_version(given), inputs.window)
    known, is_plain = _is_plain.get(given, (None, False))
    if known != place:
        is_plain = all(
            bool(_says_nothing_else(inputs, slice(first, first + ROWS_COMPARED_AT_ONCE)))
            for first in range(0, inputs.num_queries, ROWS_COMPARED_AT_ONCE)
        )
        _is_plain[given] = place, is_plain
    return None if is_plain else "a mask of its own"


def sparse_attention(
    inputs: AttentionInputs, lowered: LoweredEdits, dense: Callable[[AttentionInputs], Tensor]
) -> Tensor:
    """Output ``(B, H, N, Dv)``: sparse in the heads of the Sparsity, by ``dense`` in the others, then the HeadAffine."""
    sparsity = lowered.sparsity
    assert sparsity is not None
    heads = None if sparsity.heads is None else indices_of_heads(sparsity.heads)
    output = None if heads is None or len(heads) == inputs.num_heads else dense(inputs)
    if heads is None or len(heads):
        first_keys = _padding(inputs)[0] if inputs.padded else None
        pattern = sparsity.pattern
        assert not isinstance(pattern, HeaviestKeys)
        visited = visits_of(pattern, inputs, first_keys) if isinstance(pattern, KeyTiles) else pattern
        output, _ = sparse_flash(inputs, visited, heads, output, first_keys, dense_rows=sparsity.dense_rows)
    assert output is not None
    if lowered.gain is not None:
        head_affine_(output, lowered, lowered.heads)
    return output


def _padding(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Each sample's first real key ``(B,)`` int32, and whether all keys up to the last query's are real from there on ``()``."""
    place = (_version(inputs.key_valid), inputs.query_offset, inputs.num_queries, inputs.query.shape[0])
    known = _paddings.get(inputs.key_valid)
    if known is None or known[0] != place:
        valid = inputs.key_valid[:, : inputs.query_offset + inputs.num_queries].expand(inputs.query.shape[0], -1)
        index = torch.arange(valid.shape[1], device=valid.device)
        first = torch.where(valid, index, valid.shape[1]).amin(1)
        known = (place, first.to(torch.int32), (valid == (index >= first[:, None])).all())
        _paddings[inputs.key_valid] = known
    return known[1], known[2]


def _says_nothing_else(inputs: AttentionInputs, rows: slice) -> Tensor:
    """Whether the mask or bias of real rows says what causality, padding and the window say, ``()`` bool."""
    expected = inputs.key_valid[:, None, None, :] & inputs.reachable(rows)
    if inputs.mask is not None:
        same = inputs.mask[:, :, rows] == expected
    else:
        assert inputs.bias is not None
        same = (inputs.visible(rows) == expected) & ((inputs.bias[:, :, rows] == 0) | ~expected)
    return (same | ~inputs.query_valid[:, None, rows, None]).all()


def _version(tensor: Tensor) -> int:
    """Changes with every change in place; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


# Layers share their masks: what was found of one serves until it is changed.
_paddings: MutableMapping[Tensor, tuple[tuple[int, ...], Tensor, Tensor]] = WeakTensorKeyDictionary()
_is_plain: MutableMapping[Tensor, tuple[tuple[int, int | None], bool]] = WeakTensorKeyDictionary()
