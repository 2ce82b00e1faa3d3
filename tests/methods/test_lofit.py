"""lofit against the same offsets added at o_proj's input, and against the adapter under PEFT that it is read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import attn_hooks
from attn_hooks import Ablate, AttnHooksError, LoFiT, Streaming
from attn_hooks.lofit import LofitConfig
from tests.families import build_tiny, family, token_ids
from tests.hooks.tiny import generated, logits, padded_batch, tiny_llama
from tests.models import left_padded, llama

HEADS = ((0, 2), (3, 1), (3, 0))
OFFSET = torch.linspace(-1.0, 1.0, 24).view(3, 8)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_equals_a_hook_on_the_output_projection() -> None:
    model = llama()
    ids, mask = left_padded()

    def at(index: int) -> Any:
        def before(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            z = inputs[0].unflatten(-1, (4, 8)).clone()
            for (layer, head), row in zip(HEADS, OFFSET, strict=True):
                if layer == index:
                    z[:, :, head] += row
            return (z.flatten(-2),)

        return before

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(at(index)) for index, layer in enumerate(model.model.layers)
    ]
    expected = model(ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    with attn_hooks.editing(model, LoFiT(heads=HEADS, offset=OFFSET)):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited, expected, rtol=1e-6, atol=1e-6)


def trained(folder: Path, model: Any = None, **options: Any) -> PeftModel:
    """An adapter as after training, saved in ``folder``."""
    options = {"heads": [(0, 2), (2, 0), (2, 7)], "init_std": 0.5} | options
    adapted = get_peft_model(tiny_llama() if model is None else model, LofitConfig(**options)).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral", "gpt2", "bert", "gemma4_text", "deepseek_v3", "opt"])
def test_an_adapter_acts_as_under_peft(name: str, tmp_path: Path) -> None:
    model = build_tiny(family(name))
    tokens = token_ids(family(name), model)
    plain = logits(model, tokens)
    adapted = trained(tmp_path, model, heads=[(0, 1), (1, 0), (1, 3)])
    expected = logits(adapted, tokens)
    assert (expected - plain).abs().max() > 1e-3
    wrapped = attn_hooks.wrap(build_tiny(family(name)), f"lofit:{tmp_path}")
    torch.testing.assert_close(logits(wrapped, tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(attn_hooks.unwrap(wrapped), tokens), plain)


@pytest.mark.parametrize("heads", [[(0, 2), (2, 0), (2, 7)], None])
def test_padded_batches_and_generation_are_the_adapters(heads: list[tuple[int, int]] | None, tmp_path: Path) -> None:
    adapted = trained(tmp_path, heads=heads)
    wrapped = attn_hooks.wrap(tiny_llama(), f"lofit:{tmp_path}")
    batch = padded_batch("left")
    torch.testing.assert_close(logits(wrapped, **batch), logits(adapted, **batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(wrapped, **batch), generated(adapted, **batch))
    assert not torch.equal(generated(tiny_llama(), **batch), generated(adapted, **batch))


@pytest.mark.parametrize("edit", [Streaming(sinks=1, window=3), Ablate(heads={2: [0, 3]})])
def test_beside_other_edits(edit: Any, tmp_path: Path) -> None:
    """Other edits on the model under PEFT: the adapter acts behind them, at the projection."""
    adapted = trained(tmp_path)
    alone = logits(adapted)
    expected = logits(attn_hooks.wrap(adapted, edit))
    assert (expected - alone).abs().max() > 1e-3
    wrapped = attn_hooks.wrap(tiny_llama(), edit, f"lofit:{tmp_path}")
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_add_up(tmp_path: Path) -> None:
    model = trained(tmp_path / "first")
    model.add_adapter("other", LofitConfig(heads=[(2, 7), (3, 1)], init_std=0.5))
    model.save_pretrained(tmp_path / "both")
    model.base_model.set_adapter(["default", "other"])
    wrapped = attn_hooks.wrap(tiny_llama(), f"lofit:{tmp_path / 'first'}", f"lofit:{tmp_path / 'both' / 'other'}")
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-4, atol=1e-4)


def test_in_a_recipe(tmp_path: Path) -> None:
    trained(tmp_path / "adapter")
    (tmp_path / "recipe.yaml").write_text(json.dumps({"edits": [f"lofit:{tmp_path / 'adapter'}"]}))
    from_recipe = attn_hooks.wrap(tiny_llama(), tmp_path / "recipe.yaml")
    assert attn_hooks.edits_in_force(from_recipe) == (LoFiT.from_saved(str(tmp_path / "adapter")),)


@pytest.mark.parametrize("name", ["qwen3_next", "bitnet", "diffllama"])
def test_where_something_stands_between_heads_and_projection_the_edit_is_refused(name: str) -> None:
    model = build_tiny(family(name))
    layer = attn_hooks.inspect_model(model).layers[-1]
    with pytest.raises(AttnHooksError) as refused:
        attn_hooks.wrap(model, LoFiT(heads=((layer.index, 0),), offset=torch.ones(1, layer.value_dim)))
    assert refused.value.code == "gated-heads"


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"heads": ((0, 2), (0, 2)), "offset": torch.ones(2, 8)}, "bad-parameters"),
        ({"heads": ((0, 2),), "offset": torch.ones(2, 8)}, "bad-parameters"),
        ({"heads": ((0, 2),), "offset": torch.ones(8)}, "bad-parameters"),
        ({"heads": ((0, 2),), "offset": torch.ones(1, 4)}, "wrong-shape"),
        ({"heads": ((9, 2),), "offset": torch.ones(1, 8)}, "layer-out-of-range"),
        ({"heads": ((0, 8),), "offset": torch.ones(1, 8)}, "head-out-of-range"),
    ],
)
def test_what_does_not_fit_is_refused(parameters: dict[str, Any], code: str) -> None:
    with pytest.raises(AttnHooksError) as refused:
        attn_hooks.wrap(tiny_llama(), LoFiT(**parameters))
    assert refused.value.code == code


def test_what_is_no_adapter_of_offsets_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "scale", component="scale")
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    trained(tmp_path / "other_heads")
    config = tmp_path / "other_heads" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"heads": [[0, 2], [1, 0], [2, 7]]}))
    for name in ("scale", "lora", "other_heads", "missing"):
        with pytest.raises(AttnHooksError) as refused:
            attn_hooks.wrap(tiny_llama(), f"lofit:{tmp_path / name}")
        assert refused.value.code == "bad-adapter", name
        assert name in str(refused.value)


def test_only_what_was_saved_has_a_path() -> None:
    with pytest.raises(AttnHooksError) as refused:
        attn_hooks.wrap(tiny_llama(), "streaming:somewhere")
    assert refused.value.code == "nothing-saved"
