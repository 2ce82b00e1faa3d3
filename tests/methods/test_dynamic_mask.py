"""DMA against its equations, written as loops, against Doge, and in a model with padding and grouped heads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import DogeConfig, DogeForCausalLM

import attn_hooks
from attn_hooks import DynamicMask, Streaming
from attn_hooks.methods.dynamic_mask import key_weights
from attn_kernels import AttentionInputs, HeaviestKeys, LogitMap, Sparsity, edited_attention, measure_recall
from tests.methods.test_xattention import calls
from tests.models import FAMILIES, SIZES, llama, prompts

LAYERS, KV_HEADS, HEAD_DIM = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"], SIZES["head_dim"]
GENERATOR = torch.Generator().manual_seed(0)
LEARNED: dict[str, Any] = {
    "a": torch.randn(LAYERS, KV_HEADS, generator=GENERATOR),
    "dt_weight": torch.randn(LAYERS, KV_HEADS, KV_HEADS * HEAD_DIM, generator=GENERATOR),
}


def literal_output(inputs: AttentionInputs, weight: Tensor, a: Tensor, form: str, window: int) -> Tensor:
    """Row by row; 0 in rows of padding."""
    batch, heads, rows = inputs.query.shape[:3]
    kv_heads = inputs.key.shape[1]
    output = torch.zeros(batch, heads, rows, inputs.value.shape[3], dtype=torch.float64)
    for b in range(batch):
        deltas = []
        for j in range(inputs.num_keys):
            dt = weight.double() @ torch.cat([inputs.value[b, h, j].double() for h in range(kv_heads)])
            delta = [float(a[h]) * math.log1p(math.exp(float(dt[h]))) for h in range(kv_heads)]
            deltas.append([math.exp(one) if form == "exp" else one for one in delta])
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(rows):
                at = inputs.query_offset + i
                legal = [j for j in range(at + 1) if inputs.key_valid[b, j]]
                legal = [j for j in legal if inputs.window is None or at - j < inputs.window]
                kept = sorted(legal, key=lambda j: (deltas[j][kv], j), reverse=True)[:window]
                if not kept or not inputs.key_valid[b, at]:
                    continue
                logits = torch.tensor(
                    [
                        float(inputs.query[b, h, i].double() @ inputs.key[b, kv, j].double()) * inputs.scaling
                        + deltas[j][kv]
                        for j in kept
                    ]
                )
                output[b, h, i] = logits.double().softmax(0) @ inputs.value[b, kv, kept].double()
    return output


def edits_of(inputs: AttentionInputs, weight: Tensor, a: Tensor, form: str, window: int) -> list[Any]:
    delta, group = key_weights(inputs.value, weight, a, form), inputs.num_heads // inputs.key.shape[1]
    everywhere = torch.ones(1, 1, inputs.num_keys, dtype=torch.bool)
    return [
        LogitMap(everywhere, bias=delta.repeat_interleave(group, 1)),
        Sparsity(HeaviestKeys(delta, window, group)),
    ]


@given(
    calls(),
    st.sampled_from([1, 2, 5, 100]),
    st.sampled_from(["exp", "linear"]),
    st.sampled_from([None, 5]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_outputs_are_the_paper_s(
    inputs: AttentionInputs, window: int, form: str, model_window: int | None, scale: float, seed: int
) -> None:
    """Left padding, grouped heads, more keys than queries, a sliding window; keys that weigh the same (``scale`` 0)."""
    inputs, kv_heads = replace(inputs, window=model_window), inputs.key.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(kv_heads, kv_heads * inputs.value.shape[3], generator=generator)
    a = scale * torch.randn(kv_heads, generator=generator)
    found = edited_attention(inputs, edits_of(inputs, weight, a, form, window))
    wanted = literal_output(inputs, weight, a, form, window)
    real = inputs.query_valid[:, None, :, None]
    torch.testing.assert_close((found * real).double(), wanted, rtol=1e-4, atol=1e-5)


@given(calls(), st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_query_keeps_so_many_keys(inputs: AttentionInputs, window: int, ties: bool) -> None:
    weight = inputs.key[:, :, :, 0].round() if ties else inputs.key[:, :, :, 0]
    rows = slice(0, inputs.num_queries)
    shown = HeaviestKeys(weight, window, inputs.num_heads // weight.shape[1]).shown(inputs, rows)
    legal = inputs.visible(rows)
    kept = (shown & legal).sum(-1)
    assert torch.equal(kept, legal.sum(-1).clamp(max=window).expand_as(kept))


def doge() -> DogeForCausalLM:
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**SIZES, keep_window_size=6)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
        torch.nn.init.normal_(layer.self_attn.dt_proj.weight)
    return model


@torch.no_grad()
def test_masks_are_doge_s() -> None:
    attention, generator = doge().model.layers[1].self_attn, torch.Generator().manual_seed(1)
    hidden, value = torch.randn(2, 20, 32, generator=generator), torch.randn(2, 2, 20, 8, generator=generator)
    dt = attention.dt_proj(value.transpose(1, 2).reshape(2, 20, -1))
    delta = torch.exp(attention.A * functional.softplus(dt)).transpose(-1, -2)
    legal = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    legal[1, :, :, :7] = False
    theirs = attention.prepare_dynamic_mask(hidden, delta, 6, legal)
    index = torch.arange(20)
    inputs = AttentionInputs(value, value, value, 1.0, index, index, index[None], index[None], legal[:, 0, -1])
    found = key_weights(value, attention.dt_proj.weight, attention.A, "exp")
    shown = HeaviestKeys(found, 6).shown(inputs, slice(0, 20)) & inputs.visible(slice(0, 20))
    ours = torch.where(shown, found[:, :, None], torch.finfo(torch.float32).min)
    rows = inputs.query_valid[:, None, :, None]
    torch.testing.assert_close(torch.where(rows, ours, 0.0), torch.where(rows, theirs, 0.0))


@torch.no_grad()
def test_a_checkpoint_of_doge_is_read(tmp_path: Path) -> None:
    model = doge()
    model.save_pretrained(tmp_path)
    edit = DynamicMask.from_saved(str(tmp_path))
    assert edit.form == "exp"
    for index, layer in enumerate(model.model.layers):
        assert torch.equal(edit.a[index], layer.self_attn.A)
        assert torch.equal(edit.dt_weight[index], layer.self_attn.dt_proj.weight)
    other = llama(torch.float32)
    ids = prompts(1, 14)
    plain = other(ids).logits
    with attn_hooks.editing(other, f"dynamic_mask:{tmp_path}"):
        assert not torch.allclose(other(ids).logits, plain)


def test_what_is_no_checkpoint_of_doge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(attn_hooks.EditError, match=r"does not hold A and dt_proj.weight of every layer"):
        DynamicMask.from_saved(str(tmp_path))
    with pytest.raises(attn_hooks.EditError, match="missing"):
        DynamicMask.from_saved(str(tmp_path / "missing.safetensors"))
    names = ("A", "dt_proj.weight", "dt_proj.bias")
    save_file({f"layers.0.self_attn.{name}": torch.ones(2) for name in names}, tmp_path / "one.safetensors")
    with pytest.raises(attn_hooks.EditError, match="dt_proj has a bias"):
        DynamicMask.from_saved(str(tmp_path))


def test_doge_itself_is_refused() -> None:
    with pytest.raises(attn_hooks.EditError, match="DogeForCausalLM computes its dynamic mask itself"):
        attn_hooks.wrap(doge(), DynamicMask(window=3))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_is_a_window_of_the_newest(family: str) -> None:
    """A = 0, given or not; learned sink logits tell a bias of 1 from none."""
    model, ids = FAMILIES[family](), prompts(2, 20)
    zero = {"a": torch.zeros(LAYERS, KV_HEADS), "dt_weight": LEARNED["dt_weight"]}
    with attn_hooks.editing(model, Streaming(sinks=0, window=4)):
        wanted = model(ids).logits
    for edit in (DynamicMask(window=4), DynamicMask(window=4, form="linear", **zero)):
        with attn_hooks.editing(model, edit):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    with attn_hooks.editing(model, DynamicMask(window=4, **zero)):
        assert torch.allclose(model(ids).logits, wanted, rtol=1e-4, atol=1e-5) == (family != "gpt_oss")


@torch.no_grad()
def test_a_window_of_the_prompt_s_length_leaves_the_bias() -> None:
    model, ids = llama(), prompts(2, 20)
    results = []
    for window in (20, 500):
        with attn_hooks.editing(model, DynamicMask(window=window, **LEARNED)):
            results.append(model(ids).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], model(ids).logits)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing() -> None:
    model, ids = llama(), prompts(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with attn_hooks.editing(model, DynamicMask(window=3, **LEARNED)):
        together, alone = model(ids, attention_mask=mask).logits, model(ids[1:, :12]).logits
    torch.testing.assert_close(together[1, :12], alone[0])


def test_some_heads_keep_all_keys_and_no_bias() -> None:
    inputs = next(iter(_one_call()))
    edits = edits_of(inputs, LEARNED["dt_weight"][0, :, :12].repeat(1, 1), LEARNED["a"][0], "exp", 2)
    some = torch.tensor([True, False, True, False])
    chosen = [replace(edit, heads=some) for edit in edits]
    found, every, plain = (edited_attention(inputs, which) for which in (chosen, edits, []))
    torch.testing.assert_close(found[:, some], every[:, some])
    torch.testing.assert_close(found[:, ~some], plain[:, ~some])
    kept = measure_recall(inputs, edits[1], torch.arange(16), [edits[0]])
    assert kept.total().recall < 1


def _one_call() -> list[AttentionInputs]:
    generator, index = torch.Generator().manual_seed(3), torch.arange(16)
    tensors = [torch.randn(1, heads, 16, 6, generator=generator) for heads in (4, 2, 2)]
    return [AttentionInputs(*tensors, 0.5, index, index, index[None], index[None], torch.ones(1, 16) > 0)]


def test_a_mask_for_each_head_is_refused() -> None:
    inputs = _one_call()[0]
    inputs = replace(inputs, mask=torch.ones(1, 4, 16, 16, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="a mask for each head"):
        HeaviestKeys(inputs.key[..., 0], 2, 2).shown(inputs, slice(0, 16))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": 0}, "window"),
        ({"a": LEARNED["a"]}, "give dt_weight and a, or neither"),
        ({"form": "square", **LEARNED}, "form"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(attn_hooks.EditError, match=message):
        DynamicMask(**parameters)


def test_tensors_of_another_model_are_refused() -> None:
    with pytest.raises(attn_hooks.EditError, match=r"a has shape \(5, 2\), LlamaForCausalLM needs \(4, 2\)"):
        attn_hooks.wrap(llama(num_hidden_layers=4), DynamicMask(**LEARNED))
    with pytest.raises(attn_hooks.EditError, match=r"dt_weight has shape \(5, 2, 8\), .* needs \(5, 2, 16\)"):
        attn_hooks.wrap(llama(), DynamicMask(**{**LEARNED, "dt_weight": LEARNED["dt_weight"][..., :8]}))
