"""What merging folds into the output projection, undoes, and keeps on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from attn_hooks import AttnHooksError
from attn_hooks.lofit import LofitConfig, LofitLayer
from tests.families import build_tiny, family, token_ids
from tests.hooks import snapshot
from tests.hooks.tiny import logits, tiny_llama
from tests.models import llama, prompts

HEADS = [(0, 2), (2, 0), (2, 7)]


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(tiny_llama(), LofitConfig(**{"heads": HEADS, "init_std": 0.5} | options)).eval()


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_merge_equals_unmerged_and_unmerging_is_exact(component: str) -> None:
    model = adapted(component=component).double()
    before, edited = snapshot.take(model), logits(model)
    model.merge_adapter()
    merged = logits(model)
    torch.testing.assert_close(merged, edited, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged), "merged once only"
    model.unmerge_adapter()
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), edited)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_merged_in_float32(component: str) -> None:
    tokens, heads = prompts(), [(0, 2), (3, 1), (3, 3)]
    model = get_peft_model(llama(torch.float32), LofitConfig(heads=heads, component=component, init_std=0.5)).eval()
    edited = logits(model, tokens)
    assert (edited - logits(llama(torch.float32), tokens)).abs().max() > 0.01
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), edited, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
@pytest.mark.parametrize("together", [True, False])
def test_several_adapters_are_merged_in_the_order_in_which_they_act(order: list[str], together: bool) -> None:
    model = adapted()
    model.add_adapter("other", LofitConfig(heads=[(2, 7), (3, 1)], component="scale", init_std=0.5))
    model.base_model.set_adapter(order)
    edited = logits(model)
    for names in [order] if together else [[name] for name in order]:
        model.merge_adapter(adapter_names=names)
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)


def test_disabling_a_merged_adapter_restores_the_base() -> None:
    model = adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_unloading_a_merged_adapter_restores_the_base() -> None:
    model = adapted()
    model.merge_adapter()
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


def test_a_merged_model_moves_with_its_dtype() -> None:
    model = adapted()
    model.merge_adapter()
    model = model.double()
    model.unmerge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_in_half_precision_the_sum_is_of_float32() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), LofitConfig(heads=HEADS, init_std=0.5)).eval()
    layer = next(module for module in model.modules() if isinstance(module, LofitLayer))
    weight = layer.weight.double()
    exact = weight @ layer.head_vectors(["default"]).offset.detach().double().flatten()
    model.merge_adapter()
    assert layer.bias.dtype == torch.bfloat16
    torch.testing.assert_close(layer.bias.detach(), exact.bfloat16(), rtol=2**-8, atol=1e-6)


def test_values_that_are_not_finite_are_not_merged_safely() -> None:
    model = adapted()
    layer = next(module for module in model.modules() if isinstance(module, LofitLayer))
    layer.lofit_offset["default"].data[0, 0] = float("nan")
    with pytest.raises(AttnHooksError) as refused:
        model.merge_and_unload(safe_merge=True)
    assert refused.value.code == "merge-not-finite"
    assert layer.bias is None


# On disk


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3", "granite", "internlm3"])
def test_where_the_config_decides_the_merged_model_is_saved_whole(name: str, tmp_path: Path) -> None:
    merged, edited, tokens = merged_family(name)
    merged.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(loaded.eval(), tokens), edited, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "starcoder2"])
def test_where_the_projection_has_a_bias_the_config_stays(name: str, tmp_path: Path) -> None:
    config = build_tiny(family(name)).config.to_dict()
    merged, edited, tokens = merged_family(name)
    assert merged.config.to_dict() == config
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), edited, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "mixtral", "phi3", "glm4"])
def test_where_the_family_has_no_bias_saving_is_refused(name: str, tmp_path: Path) -> None:
    merged, edited, tokens = merged_family(name)
    torch.testing.assert_close(logits(merged, tokens), edited, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttnHooksError) as refused:
        merged.save_pretrained(tmp_path)
    assert refused.value.code == "merged-bias-lost"
    assert not list(tmp_path.iterdir())


def test_merged_scales_are_saved_by_every_family(tmp_path: Path) -> None:
    merged, edited, tokens = merged_family("mistral", component="scale")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), edited, rtol=1e-5, atol=1e-5)


def merged_family(name: str, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The merged model, the logits of the unmerged, and their tokens."""
    model = build_tiny(family(name))
    tokens = token_ids(family(name), model)
    plain = logits(model, tokens)
    model = get_peft_model(model, LofitConfig(heads=[(0, 1), (1, 2)], init_std=1.0, **options)).eval()
    edited = logits(model, tokens)
    assert (edited - plain).abs().max() > 1e-2
    return model.merge_and_unload(), edited, tokens
