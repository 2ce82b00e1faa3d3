"""AnchorAttention against its equations, written as loops, in a model with padding and grouped heads."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attn_hooks
from attn_hooks import AnchorAttention, AttentionCall
from attn_hooks.methods.anchor import Places, kept_stripes
from attn_kernels import AttentionInputs, KeyTiles, Sparsity
from attn_kernels.patterns import Stripes
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.visits import visits_of
from tests.hooks.tiny import padded_batch, prompt, tiny_llama
from tests.kernels.triton_device import on_device
from tests.methods.test_xattention import calls


def literal_counts(
    query: Tensor,
    key: Tensor,
    position: int,
    inputs: AttentionInputs,
    sizes: tuple[int, int, int],
    theta: float,
    faithful: Literal["paper", "code"] = "paper",
) -> tuple[Tensor, float]:
    """How often each query ``(n, D)`` of one head counts each key ``(m, D)``, real tokens alone, and how far the nearest candidate
    lies from the threshold. "code": where the released code scans for stripes."""
    block, step, sink_blocks = sizes
    span, sinks = block * step, sink_blocks * block
    counts, margin = torch.zeros(len(query), len(key), dtype=torch.int), math.inf

    def logit(row: Tensor, column: int) -> float:
        found = float(row @ key[column]) * inputs.scaling
        return found if inputs.softcap is None else inputs.softcap * math.tanh(found / inputs.softcap)

    def sees(row: int, column: int) -> bool:
        away = position + row - column
        return away >= 0 and (inputs.window is None or away < inputs.window)

    for begin in range(0, len(query), span):
        own = (position + begin) // block * block
        rows = range(begin, min(begin + span, len(query)))
        anchors = {}
        for row in rows:
            near = [j for j in range(len(key)) if sees(row, j) and (j < sinks or j >= own)]
            anchors[row] = max(logit(query[row], j) for j in near)
            counts[row, near] += 1
        scanned = range(block, own - block) if faithful == "code" else range(sinks, own)
        for column in scanned:
            reached = False
            for first in range(begin, rows.stop, block):
                of_block = range(first, min(first + block, rows.stop))
                pooled = query[of_block.start : of_block.stop].mean(0)
                excess = logit(pooled, column) - sum(anchors[row] for row in of_block) / len(of_block) + theta
                reached |= excess >= 0
                margin = min(margin, abs(excess))
            for row in rows:
                if reached and sees(row, column):
                    counts[row, column] += 1
    return counts, margin


def pattern_of(inputs: AttentionInputs, sizes: tuple[int, int, int], theta: float) -> KeyTiles:
    places = Places(inputs, *sizes)
    return KeyTiles(places.sinks_and_own(), sizes[0], sizes[0], Stripes(kept_stripes(places, theta), sizes[1]))


@given(
    calls(),
    st.sampled_from([(1, 1, 1), (2, 2, 1), (4, 1, 2), (2, 3, 2), (16, 1, 1)]),
    st.sampled_from([-3.0, 0.0, 1.0, 3.0]),
    st.sampled_from([None, 5]),
    st.sampled_from([None, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_visits_are_the_paper_s(
    inputs: AttentionInputs, sizes: tuple[int, int, int], theta: float, window: int | None, softcap: float | None
) -> None:
    """Left padding, grouped heads, more keys than queries, blocks longer than the prompt."""
    inputs = replace(inputs, window=window, softcap=softcap)
    rows = slice(0, inputs.num_queries)
    shown = pattern_of(inputs, sizes, theta).shown(inputs, rows) & inputs.visible(rows)
    group, offset = inputs.num_heads // inputs.key.shape[1], inputs.query_offset
    for sample in range(2):
        first_key = int(inputs.key_valid[sample].long().argmax())
        first_row = max(0, first_key - offset)
        for head in range(inputs.num_heads):
            query = inputs.query[sample, head, first_row:].double()
            key = inputs.key[sample, head // group, first_key:].double()
            position = offset + first_row - first_key
            wanted, margin = literal_counts(query, key, position, inputs, sizes, theta)
            assert wanted.max() <= 1
            if margin > 1e-4:
                assert torch.equal(shown[sample, head, first_row:, first_key:], wanted.bool())


@given(calls(), st.sampled_from([(2, 2, 1), (4, 1, 2)]), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_padding_on_the_right_changes_no_visit(
    inputs: AttentionInputs, sizes: tuple[int, int, int], added: int
) -> None:
    inputs = replace(inputs, key_valid=inputs.key_valid | True)
    last = inputs.num_queries - 1
    cut = max(0, last - added)
    short = replace(
        inputs,
        query=inputs.query[:, :, : cut + 1],
        **{name: getattr(inputs, name)[:, :, : cut + 1 + inputs.query_offset] for name in ("key", "value")},
        query_index=inputs.query_index[: cut + 1],
        query_position=inputs.query_position[:, : cut + 1],
        key_index=inputs.key_index[: cut + 1 + inputs.query_offset],
        key_position=inputs.key_position[:, : cut + 1 + inputs.query_offset],
        key_valid=inputs.key_valid[:, : cut + 1 + inputs.query_offset],
    )
    padded = replace(inputs, key_valid=inputs.key_index.expand(2, -1) <= cut + inputs.query_offset)
    rows = slice(0, cut + 1)
    long = pattern_of(padded, sizes, 1.0).shown(padded, rows) & padded.visible(rows)
    wanted = pattern_of(short, sizes, 1.0).shown(short, rows) & short.visible(rows)
    assert torch.equal(long[..., : short.num_keys], wanted)
    assert not long[..., short.num_keys :].any()


def structured_call(size: int, seed: int = 0) -> AttentionInputs:
    generator, index = torch.Generator().manual_seed(seed), torch.arange(size)
    tensors = [torch.randn(1, heads, size, 16, generator=generator) for heads in (4, 2, 2)]
    return AttentionInputs(
        *tensors, 0.5, index, index, index[None], index[None], torch.ones(1, size) > 0, first_query=0, padded=False
    )


@pytest.mark.parametrize("size", [1, 15, 64, 79, 130])
def test_the_kernel_gives_each_kept_key_its_weight_once(size: int) -> None:
    """Values are one-hot: the output is the row of weights."""
    inputs = on_device(replace(structured_call(size), value=torch.eye(size).expand(1, 2, -1, -1).contiguous()))
    pattern = pattern_of(inputs, (16, 2, 1), 3.0)
    visits = visits_of(pattern, inputs, None)
    assert visits.counted(inputs).max() == 1
    output, _ = sparse_flash(inputs, visits)
    rows = slice(0, size)
    shown = pattern.shown(inputs, rows) & inputs.visible(rows)
    logits = inputs.query @ inputs.key.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scaling
    torch.testing.assert_close(output, logits.masked_fill(~shown, -torch.inf).softmax(-1), rtol=1e-3, atol=1e-4)
    if size == 130:
        assert 0 < shown.sum() < shown.shape[1] * inputs.visible(rows).sum()


def test_the_released_code_counts_keys_twice_and_leaves_a_hole() -> None:
    inputs = structured_call(64)
    query, key = inputs.query[0, 0], inputs.key[0, 0]
    # As many sinks as it has: a super-block.
    sizes = (4, 4, 4)
    code, _ = literal_counts(query, key, 0, inputs, sizes, 100.0, faithful="code")
    paper, _ = literal_counts(query, key, 0, inputs, sizes, 100.0)
    assert torch.equal(paper, torch.ones(64, 64, dtype=torch.int).tril())
    assert (code[48:, 4:16] == 2).all()
    assert (code[48:, 44:48] == 0).all()


def test_stripes_grow_with_theta_and_ignore_what_all_keys_share() -> None:
    inputs = structured_call(96)
    kept = [kept_stripes(Places(inputs, 4, 4, 1), theta) for theta in (-1e6, 0.0, 2.0, 4.0, 1e6)]
    counts = [int(one.sum()) for one in kept]
    assert all(bool((less <= more).all()) for less, more in pairwise(kept))
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3]
    assert counts[-1] == 4 * sum(begin - 4 for begin in range(16, 96, 16))
    moved = replace(inputs, key=inputs.key + torch.linspace(-1, 1, 16))
    assert torch.equal(kept_stripes(Places(moved, 4, 4, 1), 2.0), kept[2])


def test_super_blocks_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = structured_call(150)
    whole = kept_stripes(Places(inputs, 4, 4, 1), 2.0)
    monkeypatch.setattr(sys.modules[Places.__module__], "MOST_SCORES", 1)
    assert torch.equal(kept_stripes(Places(inputs, 4, 4, 1), 2.0), whole)


SMALL: dict[str, Any] = {"block": 2, "step": 2}


def test_a_model_visits_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, and each head for itself; the rest of the model sees no difference between padding left and none."""
    seen: list[tuple[AttentionInputs, Any]] = []
    primitives = AnchorAttention.primitives

    def listen(edit: AnchorAttention, call: AttentionCall) -> Any:
        answered = primitives(edit, call)
        seen.append((call.inputs, answered))
        return answered

    monkeypatch.setattr(AnchorAttention, "primitives", listen)
    model, edit = tiny_llama(), AnchorAttention(theta=2.0, **SMALL)
    for side in ("left", "right"):
        batch = padded_batch(side)
        with attn_hooks.editing(model, edit):
            together = model(**batch).logits
            real = batch["attention_mask"][1].bool()
            alone = model(batch["input_ids"][1:, real]).logits
        torch.testing.assert_close(together[1, real], alone[0], rtol=1e-4, atol=1e-5)
    layers = model.config.num_hidden_layers
    assert len(seen) == 4 * layers
    shares = set()
    for inputs, (sparsity,) in seen[:layers]:
        assert isinstance(sparsity, Sparsity) and isinstance(sparsity.pattern, KeyTiles)
        stripes = sparsity.pattern.single_keys(inputs)
        shares.add(tuple(stripes.float().mean((0, 2, 3)).tolist()))
    assert len(shares) == layers
    assert all(len(set(share)) > 1 for share in shares)


def test_more_is_kept_at_a_larger_theta_and_all_with_enough_sinks() -> None:
    model, tokens = tiny_llama(), prompt(2, 40)
    plain = model(tokens).logits
    distances = []
    for theta in (-1e6, 4.0, 8.0, 1e6):
        with attn_hooks.editing(model, AnchorAttention(theta=theta, **SMALL)):
            distances.append(float((model(tokens).logits - plain).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-2]
    assert distances[-1] < 1e-3
    # The last super-block begins at 36.
    for edit in (AnchorAttention(theta=-1e6, sink_blocks=18, **SMALL), AnchorAttention(theta=-1e6)):
        with attn_hooks.editing(model, edit):
            assert torch.equal(model(tokens).logits, plain)


def test_decode_is_dense_and_later_turns_are_refused_or_dense() -> None:
    model, tokens = tiny_llama(), prompt(2, 20)
    for later_tokens in ("refuse", "dense"):
        edit = AnchorAttention(theta=0.0, later_tokens=later_tokens, **SMALL)
        with attn_hooks.editing(model, edit):
            cache = model(tokens).past_key_values
            edited = model(tokens[:, :1], past_key_values=cache).logits
            if later_tokens == "refuse":
                with pytest.raises(attn_hooks.EditError, match="later_tokens='dense'"):
                    model(tokens[:, :3], past_key_values=cache)
            else:
                model(tokens[:, :3], past_key_values=cache)
            cache = model(tokens).past_key_values
        torch.testing.assert_close(model(tokens[:, :1], past_key_values=cache).logits, edited)
