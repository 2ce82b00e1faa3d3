"""RED under PEFT: the equation, and what PEFT's own adapters can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from attn_hooks import AttnHooksError
from attn_hooks.lofit import LofitConfig, RedConfig, RedLayer
from tests.families import build_tiny, family, token_ids
from tests.hooks import snapshot
from tests.hooks.tiny import NUM_HEADS, NUM_LAYERS, logits, padded_batch, prompt, tiny_llama
from tests.hooks.vlms import CASES as VLMS

WIDTH = tiny_llama().config.hidden_size


def refusal(code: str) -> Any:
    return pytest.raises(AttnHooksError, match=rf"\[{code}\]")


def layers_of(model: nn.Module) -> list[tuple[str, RedLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RedLayer)]


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    """As after training."""
    found = get_peft_model(tiny_llama() if model is None else model, RedConfig(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    for _, layer in layers_of(found):
        for vectors in (layer.ffn_red_scale, layer.ffn_red_bias):
            vectors["default"].data += torch.randn(vectors["default"].shape, generator=generator) / 2
    return found


@pytest.mark.parametrize("layers", [None, [2, 0]])
def test_equals_a_hook_on_down_proj(layers: list[int] | None) -> None:
    model = adapted(layers=layers)
    vectors = {
        name: (layer.ffn_red_scale["default"], layer.ffn_red_bias["default"]) for name, layer in layers_of(model)
    }
    assert len(vectors) == (NUM_LAYERS if layers is None else 2)
    plain = tiny_llama()
    for name, (scale, bias) in vectors.items():
        module = plain.get_submodule(name.removeprefix("base_model.model."))
        module.register_forward_hook(lambda _, __, output, scale=scale, bias=bias: scale * output + bias)
    expected = logits(plain, **padded_batch("left"))
    torch.testing.assert_close(logits(model, **padded_batch("left")), expected, rtol=1e-6, atol=1e-6)
    assert (expected - logits(tiny_llama(), **padded_batch("left"))).abs().max() > 0.1


def test_starts_at_the_base_and_trains_its_vectors_alone() -> None:
    model = get_peft_model(tiny_llama(), RedConfig()).train()
    assert torch.equal(logits(model), logits(tiny_llama()))
    model(prompt(), labels=prompt()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all("ffn_red_" in name for name in trained)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 8 * WIDTH


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt", "bert", "gpt_neox", "falcon_h1", "starcoder2"])
def test_families(name: str, tmp_path: Path) -> None:
    model = build_tiny(family(name))
    tokens = token_ids(family(name), model)
    plain = logits(model, tokens)
    before = snapshot.take(model)
    model = adapted(model)
    edited = logits(model, tokens)
    assert (edited - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_tiny(family(name)), tmp_path)
    assert torch.equal(logits(loaded, tokens), edited)
    with refusal("red-not-merged"):
        model.merge_and_unload()
    unloaded = model.unload()
    unloaded.requires_grad_(True)
    assert snapshot.changes(before, unloaded) == []


def test_of_a_vision_language_model_the_text_decoder_alone_is_adapted() -> None:
    names = [name for name, _ in layers_of(get_peft_model(VLMS["llava"].model(), RedConfig()))]
    assert len(names) == 2 and not [name for name in names if "vis" in name]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_are_refused(name: str) -> None:
    model = build_tiny(family(name))
    before = snapshot.take(model)
    with refusal("no-feed-forward"):
        get_peft_model(model, RedConfig())
    assert snapshot.changes(before, model) == []


def test_half_precision_keeps_vectors_in_float32() -> None:
    model = adapted(tiny_llama().bfloat16())
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_several_adapters() -> None:
    model = adapted(layers=[1])
    first = logits(model)
    model.add_adapter("other", RedConfig(layers=[1, 3]))
    assert torch.equal(logits(model), first), "a new adapter is not active"
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(tiny_llama()))
    with refusal("mixed-batch"):
        model(input_ids=prompt(), adapter_names=["default", "other"])


def test_somebody_else_s_method_of_that_name_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.FFN_RED, LofitConfig)
    with refusal("foreign-lofit"):
        RedConfig()


def test_what_the_model_lacks_is_refused() -> None:
    for layers, code in (([4], "layer-out-of-range"), ([], "bad-parameters")):
        with refusal(code):
            get_peft_model(tiny_llama(), RedConfig(layers=layers))


def test_beside_lofit() -> None:
    """LoFiT on the heads of a model under RED."""
    inner = adapted()
    plain = logits(inner)
    outer = get_peft_model(inner, LofitConfig(heads=[(1, NUM_HEADS - 1)], init_std=0.5)).eval()
    assert (logits(outer) - plain).abs().max() > 1e-3
