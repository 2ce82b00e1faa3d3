"""MoBA against its equations, written as loops, in a model with padding and grouped heads."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attn_hooks
from attn_hooks import AttentionCall, MoBA
from attn_hooks.methods.moba import chosen_blocks
from attn_kernels import AttentionInputs, KeyTiles, Sparsity
from attn_kernels.patterns import largest
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.sparsity import pattern_refusal
from attn_kernels.sparse_attention.visits import visits_of
from tests.hooks.tiny import padded_batch, prompt, tiny_llama
from tests.kernels.triton_device import on_device
from tests.methods.test_anchor import structured_call
from tests.methods.test_xattention import calls


def literal_visits(
    query: Tensor, key: Tensor, position: int, inputs: AttentionInputs, block: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Which keys ``(m, D)`` each query ``(n, D)`` of one head visits, real tokens alone, and by how much its last block won."""
    visits, margins = torch.zeros(len(query), len(key), dtype=torch.bool), torch.full((len(query),), math.inf)
    for row in range(len(query)):
        at = position + row
        gates = {}
        for number in range(at // block):
            within = range(number * block, number * block + block)
            if inputs.window is None or at - within[-1] < inputs.window:
                gates[number] = float(query[row] @ key[within.start : within.stop].mean(0))
        ranked = sorted(gates, key=lambda number: (-gates[number], number))
        for column in range(at + 1):
            in_window = inputs.window is None or at - column < inputs.window
            visits[row, column] = in_window and column // block in (at // block, *ranked[: top_k - 1])
        if 0 < top_k - 1 < len(ranked):
            margins[row] = gates[ranked[top_k - 2]] - gates[ranked[top_k - 1]]
    return visits, margins


@given(calls(), st.sampled_from([1, 2, 3, 4, 32]), st.integers(1, 4), st.sampled_from([None, 5]))
@settings(max_examples=80, deadline=None)
def test_visits_are_the_paper_s(inputs: AttentionInputs, block: int, top_k: int, window: int | None) -> None:
    """Left padding, grouped heads, more keys than queries, blocks longer than the prompt."""
    inputs = replace(inputs, window=window)
    rows = slice(0, inputs.num_queries)
    shown = KeyTiles(chosen_blocks(inputs, block, top_k), 1, block).shown(inputs, rows) & inputs.visible(rows)
    group, offset = inputs.num_heads // inputs.key.shape[1], inputs.query_offset
    for sample in range(2):
        first_key = int(inputs.key_valid[sample].long().argmax())
        first_row = max(0, first_key - offset)
        for head in range(inputs.num_heads):
            query = inputs.query[sample, head, first_row:].double()
            key = inputs.key[sample, head // group, first_key:].double()
            wanted, margin = literal_visits(query, key, offset + first_row - first_key, inputs, block, top_k)
            clear = margin > 1e-5
            assert torch.equal(shown[sample, head, first_row:, first_key:][clear], wanted[clear])


def test_of_equal_blocks_the_first_are_kept() -> None:
    numbers = torch.tensor([[2.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 3.0, -1.0, 5.0]])
    for count, wanted in ((0, []), (1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])):
        assert largest(numbers, count)[0].nonzero().flatten().tolist() == wanted
    assert largest(numbers, 2)[1:].int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]


def test_queries_in_parts_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = structured_call(70)
    whole = chosen_blocks(inputs, 4, 3)
    monkeypatch.setattr(sys.modules[MoBA.__module__], "MOST_SCORES", 1)
    assert torch.equal(chosen_blocks(inputs, 4, 3), whole)


def test_no_query_is_moved_by_what_comes_after_it() -> None:
    """Not by way of its own block's mean either."""
    inputs, row = structured_call(64), 37
    before = chosen_blocks(inputs, 8, 3)[:, :, : row + 1]
    key = inputs.key.clone()
    key[:, :, row + 1 :] += 100.0
    assert torch.equal(chosen_blocks(replace(inputs, key=key), 8, 3)[:, :, : row + 1], before)


def test_padding_on_the_right_changes_no_choice() -> None:
    inputs = structured_call(40)
    valid = torch.arange(40)[None] < 29
    padded = replace(inputs, key_valid=valid, padded=True, key=inputs.key.masked_fill(~valid[:, None, :, None], 1e4))
    assert torch.equal(chosen_blocks(padded, 4, 3)[:, :, :29], chosen_blocks(inputs, 4, 3)[:, :, :29])


@pytest.mark.parametrize("size", [1, 15, 64, 79, 130])
def test_the_kernel_gives_each_visited_key_its_weight_once(size: int) -> None:
    """Values are one-hot: the output is the row of weights."""
    inputs = on_device(replace(structured_call(size), value=torch.eye(size).expand(1, 2, -1, -1).contiguous()))
    pattern = KeyTiles(chosen_blocks(inputs, 16, 3), 1, 16)
    visits = visits_of(pattern, inputs, None)
    assert visits.counted(inputs).max() == 1
    output, _ = sparse_flash(inputs, visits)
    rows = slice(0, size)
    shown = pattern.shown(inputs, rows) & inputs.visible(rows)
    logits = inputs.query @ inputs.key.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scaling
    torch.testing.assert_close(output, logits.masked_fill(~shown, -torch.inf).softmax(-1), rtol=1e-3, atol=1e-4)
    if size == 130:
        assert 0 < shown.sum() < shown.shape[1] * inputs.visible(rows).sum()
        assert not torch.equal(shown[:, 0], shown[:, 1])


def test_which_blocks_have_a_kernel() -> None:
    chosen = torch.ones(1, 1, 4, 2, dtype=torch.bool)
    assert pattern_refusal(KeyTiles(chosen, 1, 2048)) is None
    assert pattern_refusal(KeyTiles(chosen, 1, 48)) is None
    assert pattern_refusal(KeyTiles(chosen, 1, 40)) == "key tiles of one query and 40 keys: no multiple of 16 keys"


def test_a_model_visits_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, and each head for itself; the rest of the model sees no difference between padding left and none."""
    seen: list[Any] = []
    primitives = MoBA.primitives

    def listen(edit: MoBA, call: AttentionCall) -> Any:
        answered = primitives(edit, call)
        seen.append(answered)
        return answered

    monkeypatch.setattr(MoBA, "primitives", listen)
    model, edit = tiny_llama(), MoBA(block=2, top_k=2)
    for side in ("left", "right"):
        batch = padded_batch(side)
        with attn_hooks.editing(model, edit):
            together = model(**batch).logits
            real = batch["attention_mask"][1].bool()
            alone = model(batch["input_ids"][1:, real]).logits
        torch.testing.assert_close(together[1, real], alone[0], rtol=1e-4, atol=1e-5)
    layers = model.config.num_hidden_layers
    assert len(seen) == 4 * layers
    chosen = []
    for (sparsity,) in seen[:layers]:
        assert isinstance(sparsity, Sparsity) and isinstance(sparsity.pattern, KeyTiles)
        chosen.append(sparsity.pattern.chosen[0])
    assert not any(torch.equal(chosen[0], other) for other in chosen[1:])
    assert not any(torch.equal(of_layer[0], other) for of_layer in chosen for other in of_layer[1:])


@torch.no_grad()
def test_more_is_kept_with_more_blocks_and_all_with_as_many_as_there_are() -> None:
    model, tokens = tiny_llama(), prompt(2, 40)
    plain = model(tokens).logits
    distances = []
    for top_k in (1, 4, 8, 9):
        with attn_hooks.editing(model, MoBA(block=4, top_k=top_k)):
            distances.append(float((model(tokens).logits - plain).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1] > 0
    for edit in (MoBA(block=4, top_k=10), MoBA(block=40, top_k=1)):
        with attn_hooks.editing(model, edit):
            assert torch.equal(model(tokens).logits, plain)
    with attn_hooks.editing(model, MoBA(block=2, top_k=1)):
        # One token sees itself.
        torch.testing.assert_close(model(tokens[:, :1]).logits, plain[:, :1])
        assert not torch.allclose(model(tokens[:, :3]).logits, plain[:, :3])


@pytest.mark.parametrize("parameters", [{"top_k": 0}, {"block": 0}, {"top_k": 1.5}])
def test_a_budget_of_nothing_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(attn_hooks.EditError, match=f"moba.*{next(iter(parameters))}"):
        MoBA(**parameters)


def test_decode_is_dense_and_later_turns_are_refused_or_dense() -> None:
    model, tokens = tiny_llama(), prompt(2, 20)
    for later_tokens in ("refuse", "dense"):
        with attn_hooks.editing(model, MoBA(block=2, top_k=2, later_tokens=later_tokens)):
            cache = model(tokens).past_key_values
            edited = model(tokens[:, :1], past_key_values=cache).logits
            if later_tokens == "refuse":
                with pytest.raises(attn_hooks.EditError, match="later_tokens='dense'"):
                    model(tokens[:, :3], past_key_values=cache)
            else:
                model(tokens[:, :3], past_key_values=cache)
            cache = model(tokens).past_key_values
        torch.testing.assert_close(model(tokens[:, :1], past_key_values=cache).logits, edited)
