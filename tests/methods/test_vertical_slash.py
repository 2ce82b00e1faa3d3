"""Vertical-slash against its equations, written as loops, in a model with padding and grouped heads."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_hooks
from attn_hooks import AttentionCall, VerticalSlash, engine
from attn_hooks.methods import vertical_slash
from attn_hooks.methods.vertical_slash import column_and_diagonal_mass, crossed_tiles
from attn_kernels import AttentionInputs, KeyTiles, Sparsity
from attn_kernels.sparse_attention import last_rows
from attn_kernels.sparse_attention.last_rows import column_and_diagonal_sums
from bench.sparse_prefill import as_prompt
from tests.hooks.tiny import padded_batch, prompt, tiny_llama
from tests.kernels.triton_device import on_device
from tests.methods.test_xattention import calls


def one_forward(inputs: AttentionInputs) -> AttentionInputs:
    """The call's queries cut to as many as there are keys."""
    first = inputs.num_keys - inputs.num_queries
    return replace(
        inputs,
        **{name: getattr(inputs, name)[:, :, first:] for name in ("key", "value")},
        key_index=inputs.key_index[first:],
        key_position=inputs.key_position[:, first:],
        key_valid=inputs.key_valid[:, first:],
        first_query=0,
    )


@given(calls(), st.integers(1, 9), st.sampled_from([None, 3]), st.sampled_from([None, 2.0]))
@settings(max_examples=60, deadline=None)
def test_masses_are_sums_of_the_last_queries_weights(
    inputs: AttentionInputs, last: int, window: int | None, softcap: float | None
) -> None:
    inputs = replace(one_forward(inputs), window=window, softcap=softcap)
    columns, diagonals = column_and_diagonal_mass(inputs, last)
    size, group = inputs.num_keys, inputs.num_heads // inputs.key.shape[1]
    for sample in range(2):
        real = [n for n in range(size) if inputs.key_valid[sample, n]]
        for head in range(inputs.num_heads):
            by_key, by_distance = torch.zeros(size).double(), torch.zeros(size).double()
            for row in real:
                if row < size - last:
                    continue
                seen = [key for key in real if key <= row and (window is None or row - key < window)]
                logits = inputs.key[sample, head // group, seen].double() @ inputs.query[sample, head, row].double()
                logits = logits * inputs.scaling
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                for key, weight in zip(seen, logits.softmax(-1), strict=True):
                    by_key[key - real[0]] += weight
                    by_distance[row - key] += weight
            count = len(real)
            torch.testing.assert_close(columns[sample, head, :count].double(), by_key[:count], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                diagonals[sample, head, :count].double(), by_distance[:count], rtol=1e-4, atol=1e-5
            )
            assert (columns[sample, head, count:] == -1).all()
            assert (diagonals[sample, head, count:] == -1).all()


@given(st.integers(1, 30), st.sampled_from([(1, 1), (2, 3), (8, 4), (4, 8)]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_tiles_are_those_that_a_diagonal_crosses(size: int, blocks: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index, tensor = torch.arange(size), torch.zeros(1, 2, size, 4)
    inputs = AttentionInputs(
        tensor, tensor, tensor, 1.0, index, index, index[None], index[None], torch.ones(1, size) > 0, first_query=0
    )
    distances = torch.stack([torch.randperm(size, generator=generator) for _ in range(2)])[None, :, : 1 + size // 4]
    found = crossed_tiles(distances, inputs, *blocks)
    for head in range(2):
        crossed = torch.zeros(found.shape[2:], dtype=torch.bool)
        for t, s in product(range(found.shape[2]), range(found.shape[3])):
            rows, keys = range(t * blocks[0], (t + 1) * blocks[0]), range(s * blocks[1], (s + 1) * blocks[1])
            crossed[t, s] = any(row - key in distances[0, head].tolist() for row in rows for key in keys)
        assert torch.equal(found[0, head], crossed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("last", [1, 64, 200])
def test_kernels_sum_and_choose_the_same(
    dtype: torch.dtype, window: int | None, softcap: float | None, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads in several parts, on 150 keys: tiles are not full."""
    monkeypatch.setattr(last_rows, "MOST_LOGITS", 3 * last * 150)
    generator = torch.Generator().manual_seed(last)
    index = torch.arange(150)
    tensors = (torch.randn(2, heads, 150, 72, generator=generator).to(dtype) for heads in (4, 2, 2))
    inputs = on_device(
        AttentionInputs(
            *tensors,
            0.2,
            index,
            index,
            index[None],
            index[None],
            torch.ones(1, 150) > 0,
            first_query=0,
            padded=False,
            window=window,
            softcap=softcap,
        )
    )
    in_float = replace(inputs, query=inputs.query.float(), key=inputs.key.float())
    wanted = column_and_diagonal_mass(in_float, last)
    found = column_and_diagonal_sums(inputs.query, inputs.key, min(last, 150), 0, 0.2, softcap, window)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    edit = VerticalSlash(vertical=20, slash=30, first=3, nearest=5, last=last, query_block=32, block=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "has_kernels", lambda inputs: True)
        patch.setattr(last_rows, "column_and_diagonal_sums", lambda *_: tuple(part.clone() for part in wanted))
        patch.setattr(vertical_slash, "column_and_diagonal_mass", lambda *_: pytest.fail("the kernels know this call"))
        call = as_prompt(inputs)
        (by_kernels,) = edit.primitives(call)
    monkeypatch.setattr(engine, "has_kernels", lambda inputs: False)
    (by_pytorch,) = edit.primitives(as_prompt(in_float))
    patterns = [primitive.pattern for primitive in (by_kernels, by_pytorch) if isinstance(primitive, Sparsity)]
    assert isinstance(patterns[0], KeyTiles) and isinstance(patterns[1], KeyTiles)
    assert torch.equal(patterns[0].chosen, patterns[1].chosen)
    assert torch.equal(patterns[0].columns, patterns[1].columns)


SMALL: dict[str, Any] = {"first": 1, "nearest": 2, "last": 4, "query_block": 2, "block": 2}


def test_a_model_visits_the_heaviest(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, and each head for itself; the rest of the model sees no difference between padding left and none."""
    seen: list[tuple[AttentionInputs, Any]] = []
    primitives = VerticalSlash.primitives

    def listen(edit: VerticalSlash, call: AttentionCall) -> Any:
        answered = primitives(edit, call)
        seen.append((call.inputs, answered))
        return answered

    monkeypatch.setattr(VerticalSlash, "primitives", listen)
    model, edit = tiny_llama(), VerticalSlash(vertical=2, slash=3, **SMALL)
    batch = padded_batch("left")
    with attn_hooks.editing(model, edit):
        together = model(**batch).logits
        layers = len(seen)
        short = batch["input_ids"][1:, batch["attention_mask"][1].bool()]
        alone = model(short).logits
    torch.testing.assert_close(together[1, -short.shape[1] :], alone[0], rtol=1e-4, atol=1e-5)
    assert layers == model.config.num_hidden_layers
    for inputs, (sparsity,) in seen[layers:]:
        assert isinstance(sparsity, Sparsity) and isinstance(sparsity.pattern, KeyTiles)
        columns, diagonals = column_and_diagonal_mass(inputs, 4)
        columns[..., 0], diagonals[..., :2] = torch.inf, torch.inf
        shown = sparsity.shown(inputs, slice(0, inputs.num_queries))
        for head in range(inputs.num_heads):
            kept = sorted(range(inputs.num_keys), key=lambda key: -float(columns[0, head, key]))[:2]
            far = sorted(range(inputs.num_keys), key=lambda distance: -float(diagonals[0, head, distance]))[:3]
            for row in range(inputs.num_queries):
                for key in range(row + 1):
                    tile = [(r, k) for r in (row // 2 * 2, row // 2 * 2 + 1) for k in (key // 2 * 2, key // 2 * 2 + 1)]
                    wanted = key in kept or any(r - k in far for r, k in tile)
                    assert bool(shown[0, head, row, key]) == wanted


def test_more_is_kept_with_more_and_all_at_the_prompt_s_length() -> None:
    model, tokens = tiny_llama(), prompt(2, 40)
    plain = model(tokens).logits
    distances = []
    for count in (2, 8, 24, 39):
        with attn_hooks.editing(model, VerticalSlash(vertical=count, slash=2, **SMALL)):
            distances.append(float((model(tokens).logits - plain).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1]
    for edit in (VerticalSlash(vertical=40, slash=2, **SMALL), VerticalSlash(vertical=2, slash=40, **SMALL)):
        with attn_hooks.editing(model, edit):
            assert torch.equal(model(tokens).logits, plain)


def test_decode_is_dense_and_later_turns_are_refused_or_dense() -> None:
    model, tokens = tiny_llama(), prompt(2, 20)
    for later_tokens in ("refuse", "dense"):
        edit = VerticalSlash(vertical=2, slash=2, later_tokens=later_tokens, **SMALL)
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


def test_more_forced_than_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="nearest 100 among slash 50"):
        VerticalSlash(slash=50)
