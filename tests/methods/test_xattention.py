"""XAttention against its equations, written as loops, in a model with padding and grouped heads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attn_hooks
from attn_hooks import AnchorAttention, AttentionCall, Edit, VerticalSlash, XAttention, engine
from attn_hooks.methods.xattention import antidiagonal_mass, forced_blocks, heaviest, heaviest_by_kernel
from attn_kernels import AttentionInputs, KeyTiles, Sparsity
from tests.hooks import vlms
from tests.hooks.tiny import padded_batch, prompt, tiny_llama
from tests.kernels.triton_device import on_device


def literal_mass(query: Tensor, key: Tensor, offset: int, scaling: float, stride: int, block: int) -> Tensor:
    """m ``(T, U)`` of one head: ``query`` ``(n, D)`` and ``key`` ``(m, D)`` of real tokens alone."""
    rows, columns = len(query), len(key)
    mass = torch.zeros(-(-rows // block), -(-columns // block), dtype=torch.float64)
    for i in range(-(-rows // stride)):
        scores = []
        for j in range(-(-columns // stride)):
            if j * stride > offset + i * stride + stride - 1:
                scores.append(-math.inf)
                continue
            cell = 0.0
            for s in range(stride):
                row, column = i * stride + stride - 1 - s, j * stride + s
                if row < rows and column < columns:
                    cell += float(query[row] @ key[column])
            scores.append(cell * scaling / stride)
        weights = torch.tensor(scores, dtype=torch.float64).softmax(-1)
        for j, weight in enumerate(weights):
            mass[i * stride // block, j * stride // block] += weight
    return mass


def literal_choice(mass: Tensor, offset: int, block: int, threshold: float) -> Tensor:
    chosen = torch.zeros(mass.shape, dtype=torch.bool)
    for t in range(mass.shape[0]):
        first, last = offset + t * block, offset + t * block + block - 1
        for u in range(mass.shape[1]):
            chosen[t, u] = u == 0 or (u * block <= last and u * block + block > first)
        held, whole = float(mass[t][chosen[t]].sum()), float(mass[t].sum())
        for u in sorted(range(mass.shape[1]), key=lambda u: -float(mass[t, u])):
            if not chosen[t, u] and held < threshold * whole and mass[t, u] > 0:
                chosen[t, u] = True
                held += float(mass[t, u])
    return chosen


@st.composite
def calls(draw: st.DrawFn) -> AttentionInputs:
    """Left padding, grouped heads, chunks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, kv_heads = draw(st.sampled_from([(2, 1), (4, 2), (3, 3)]))
    num_queries, earlier = draw(st.sampled_from([1, 7, 16, 21])), draw(st.sampled_from([0, 0, 5, 8]))
    num_keys = num_queries + earlier
    left = torch.tensor([0, draw(st.integers(0, num_keys - 1))])
    index = torch.arange(num_keys)
    return AttentionInputs(
        *(
            torch.randn(2, number, size, 6, generator=generator)
            for number, size in ((heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys))
        ),
        scaling=draw(st.sampled_from([0.4, 2.0])),
        query_index=index[earlier:],
        key_index=index,
        query_position=index[earlier:] - left[:, None],
        key_position=index - left[:, None],
        key_valid=index >= left[:, None],
        first_query=earlier,
    )


@given(calls(), st.sampled_from([(1, 2), (2, 4), (4, 4), (2, 8)]), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_masses_and_choices_are_the_paper_s(inputs: AttentionInputs, sizes: tuple[int, int], threshold: float) -> None:
    stride, block = sizes
    mass = antidiagonal_mass(inputs, stride, block)
    forced = forced_blocks(inputs, block)
    group, offset = inputs.num_heads // inputs.key.shape[1], inputs.query_offset
    for sample in range(2):
        first_key = int(inputs.key_valid[sample].long().argmax())
        first_row = max(0, first_key - offset)
        for head in range(inputs.num_heads):
            query = inputs.query[sample, head, first_row:].double()
            key = inputs.key[sample, head // group, first_key:].double()
            position = offset + first_row - first_key
            expected = literal_mass(query, key, position, inputs.scaling, stride, block)
            rows, columns = expected.shape
            torch.testing.assert_close(mass[sample, head, :rows, :columns].double(), expected, rtol=1e-4, atol=1e-5)
            assert mass[sample, head, rows:].sum() == mass[sample, head, :, columns:].sum() == 0
            # On the same masses: rounding must not decide between equals.
            own = mass[sample : sample + 1, head : head + 1]
            chosen = heaviest(own, forced[sample : sample + 1], threshold)[0, 0, :rows, :columns]
            wanted = literal_choice(own[0, 0, :rows, :columns], position, block, threshold)
            held, needed = (float((own[0, 0, :rows, :columns] * which).sum()) for which in (chosen, wanted))
            assert torch.equal(chosen, wanted) or held == pytest.approx(needed, rel=1e-5)


@given(calls(), st.sampled_from([(1, 2), (2, 4), (4, 4), (2, 8)]), st.sampled_from([None, 5]))
@settings(max_examples=40, deadline=None)
def test_the_kernel_finds_the_same_masses(inputs: AttentionInputs, sizes: tuple[int, int], window: int | None) -> None:
    inputs = on_device(replace(inputs, window=window))
    with patch.object(engine, "has_kernels", return_value=False):
        wanted = antidiagonal_mass(inputs, *sizes)
    with patch.object(engine, "has_kernels", return_value=True):
        found = antidiagonal_mass(inputs, *sizes)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_without_padding_in_each_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(150)
    tensors = (torch.randn(1, heads, 150, 72, generator=generator).to(dtype) for heads in (4, 2, 2))
    inputs = AttentionInputs(
        *tensors, 0.2, index, index, index[None], index[None], torch.ones(1, 150) > 0, first_query=0, padded=False
    )
    inputs = on_device(inputs)
    with patch.object(engine, "has_kernels", return_value=False):
        wanted = antidiagonal_mass(replace(inputs, query=inputs.query.float(), key=inputs.key.float()), 8, 64)
    with patch.object(engine, "has_kernels", return_value=True):
        found = antidiagonal_mass(inputs, 8, 64)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("earlier", [0, 1, 7, 8, 20])
@pytest.mark.parametrize("new", [1, 8, 19])
def test_forced_blocks_without_padding_are_those_of_any_prompt(earlier: int, new: int) -> None:
    index = torch.arange(earlier + new)
    inputs = AttentionInputs(
        torch.randn(1, 2, new, 8), *torch.randn(2, 1, 2, earlier + new, 8), 1.0, index[earlier:], index,
        index[None, earlier:], index[None], torch.ones(1, earlier + new) > 0, first_query=earlier, padded=True,
    )  # fmt: skip
    assert torch.equal(forced_blocks(replace(inputs, padded=False), 8), forced_blocks(inputs, 8))


@given(calls(), st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_kernel_chooses_the_same_blocks(inputs: AttentionInputs, threshold: float) -> None:
    inputs = on_device(inputs)
    mass, forced = antidiagonal_mass(inputs, 2, 4), forced_blocks(inputs, 4)
    wanted, found = heaviest(mass, forced, threshold), heaviest_by_kernel(mass, forced, threshold)
    # Rounding must not decide between equals.
    difference = ((mass * wanted).sum(-1) - (mass * found).sum(-1)).abs() / mass.sum(-1).clamp(min=1e-6)
    assert bool(((wanted == found).all(-1) | (difference < 1e-5)).all())


def test_large_products_do_not_overflow_in_float16() -> None:
    index = torch.arange(64)
    ones = torch.full((1, 1, 64, 128), 7.0, dtype=torch.float16)
    inputs = AttentionInputs(
        ones, ones, ones, 128**-0.5, index, index, index[None], index[None], torch.ones(1, 64) > 0, first_query=0
    )
    mass = antidiagonal_mass(inputs, 16, 32)
    # Two runs a block, which see one, two, three and four runs alike.
    torch.testing.assert_close(mass[0, 0], torch.tensor([[2.0, 0.0], [2 / 3 + 1 / 2, 1 / 3 + 1 / 2]]))


def test_a_model_visits_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, and each head for itself; the rest of the model sees no difference between padding left and none."""
    seen: list[tuple[AttentionInputs, Any]] = []
    primitives = XAttention.primitives

    def listen(edit: XAttention, call: AttentionCall) -> Any:
        answered = primitives(edit, call)
        seen.append((call.inputs, answered))
        return answered

    monkeypatch.setattr(XAttention, "primitives", listen)
    model, edit = tiny_llama(), XAttention(threshold=0.3, stride=1, block=2)
    batch = padded_batch("left")
    with attn_hooks.editing(model, edit):
        together = model(**batch).logits
        layers = len(seen)
        short = batch["input_ids"][1:, batch["attention_mask"][1].bool()]
        alone = model(short).logits
    torch.testing.assert_close(together[1, -short.shape[1] :], alone[0], rtol=1e-4, atol=1e-5)
    assert layers == model.config.num_hidden_layers
    shares = set()
    for _, (sparsity,) in seen[:layers]:
        assert isinstance(sparsity, Sparsity)
        assert isinstance(sparsity.pattern, KeyTiles)
        shares.add(tuple(sparsity.pattern.chosen.float().mean((0, 2, 3)).tolist()))
    assert len(shares) == layers
    assert all(len(set(share)) > 1 for share in shares)


def test_more_is_kept_at_a_higher_threshold_and_all_at_1() -> None:
    model, tokens = tiny_llama(), prompt(2, 40)
    plain = model(tokens).logits
    distances = []
    for threshold in (0.0, 0.5, 0.9, 0.999):
        with attn_hooks.editing(model, XAttention(threshold=threshold, stride=2, block=4)):
            distances.append(float((model(tokens).logits - plain).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1]
    with attn_hooks.editing(model, XAttention(threshold=1.0, stride=2, block=4)):
        assert torch.equal(model(tokens).logits, plain)
    with attn_hooks.editing(model, XAttention(threshold=0.0)):
        # One block.
        assert torch.equal(model(tokens).logits, plain)


def test_decode_is_dense_on_the_cache_of_a_sparse_prompt() -> None:
    model, tokens = tiny_llama(), prompt(2, 20)
    with attn_hooks.editing(model, XAttention(threshold=0.1, stride=1, block=2)):
        cache = model(tokens).past_key_values
        edited = model(tokens[:, :1], past_key_values=cache).logits
        cache = model(tokens).past_key_values
    torch.testing.assert_close(model(tokens[:, :1], past_key_values=cache).logits, edited)


def test_later_turns_are_refused_or_dense() -> None:
    model, tokens = tiny_llama(), prompt(2, 20)
    with attn_hooks.editing(model, XAttention(threshold=0.1, stride=1, block=2)):
        cache = model(tokens).past_key_values
        with pytest.raises(attn_hooks.EditError, match="later_tokens='dense'"):
            model(tokens[:, :3], past_key_values=cache)
    with attn_hooks.editing(model, XAttention(threshold=0.1, stride=1, block=2, later_tokens="dense")):
        cache = model(tokens).past_key_values
        edited = model(tokens[:, :3], past_key_values=cache).logits
        cache = model(tokens).past_key_values
    torch.testing.assert_close(model(tokens[:, :3], past_key_values=cache).logits, edited)


def test_a_block_that_is_no_multiple_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="block 100 is no multiple of stride 16"):
        XAttention(block=100)


@pytest.mark.parametrize(
    "edit",
    [
        AnchorAttention(theta=-100.0, block=2, step=1),
        XAttention(threshold=0.0, stride=1, block=2),
        VerticalSlash(vertical=1, slash=2, first=1, nearest=1, last=2, query_block=2, block=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_tokens_of_an_image_still_see_those_ahead(edit: Edit) -> None:
    """Gemma 3 lets them: its first patch hears of the last one, tiles ahead or not."""
    model, inputs = vlms.CASES["gemma3"].model(), vlms.CASES["gemma3"].inputs()
    inputs["token_type_ids"] = (inputs["input_ids"] == vlms.IMAGE).long()
    patches = (inputs["input_ids"][2] == vlms.IMAGE).nonzero().flatten()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    inputs.pop("pixel_values")
    with torch.enable_grad(), attn_hooks.editing(model, edit):
        model(inputs_embeds=embedded, **inputs).logits[2, patches[0]].sum().backward()
    assert embedded.grad[2, patches].abs().sum(-1).min() > 0
