"""LoFiT under PEFT's own operations, on several families: what PEFT checks of its methods, and the equation itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import attn_hooks
from attn_hooks import AttnHooksError
from attn_hooks.lofit import LofitConfig, LofitLayer
from tests.families import build_tiny, family, token_ids
from tests.hooks import snapshot
from tests.hooks.tiny import HEAD_DIM, NUM_HEADS, NUM_LAYERS, generated, logits, padded_batch, prompt, tiny_llama
from tests.hooks.vlms import CASES as VLMS

HEADS = [(0, 2), (2, 0), (2, 7)]
FAMILIES = [
    "llama",
    "gemma",  # head_dim is not hidden size / heads
    "qwen2",  # biases on q, k, v and none on o_proj
    "mixtral",  # experts
    "gpt2",  # Conv1D
    "gpt_bigcode",  # one key head for all
    "gpt_neox",  # `dense`
    "opt",  # `out_proj`
    "bert",  # the projection lies beside the attention
    "gemma4_text",  # head_dim differs between layers
    "laguna",  # head counts differ between layers, a gate before the projection
    "deepseek_v3",  # value heads narrower than query heads
    "falcon_h1",  # attention and state space side by side
]


def adapted(config: LofitConfig | None = None, **overrides: Any) -> PeftModel:
    """Start values far from zero, so that whatever acts is seen."""
    return get_peft_model(tiny_llama(**overrides), config or LofitConfig(heads=HEADS, init_std=0.5)).eval()


def layers_of(model: nn.Module) -> dict[str, LofitLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LofitLayer)}


def hooked(model: nn.Module, offsets: dict[tuple[int, int], Tensor], scales: dict[tuple[int, int], Tensor]) -> Tensor:
    """The equation, written as hooks on the inputs of tiny_llama's output projections."""

    def at(layer: int) -> Any:
        def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            z = inputs[0].clone().view(*inputs[0].shape[:2], NUM_HEADS, HEAD_DIM)
            for head in range(NUM_HEADS):
                z[:, :, head] *= 1 + scales.get((layer, head), torch.zeros(HEAD_DIM))
                z[:, :, head] += offsets.get((layer, head), torch.zeros(HEAD_DIM))
            return (z.flatten(-2),)

        return before

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(at(index)) for index, layer in enumerate(model.model.layers)
    ]
    found = logits(model, **padded_batch("left"))
    for handle in handles:
        handle.remove()
    return found


def rows_of(model: PeftModel, component: str) -> dict[tuple[int, int], Tensor]:
    found = {}
    for layer in layers_of(model).values():
        rows = getattr(layer, f"lofit_{component}")["default"].detach()
        for head, row in zip(layer.lofit_heads["default"].tolist(), rows, strict=True):
            found[layer.layer, head] = row
    return found


# The equation


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("component", ["offset", "scale"])
def test_equals_hooks_on_the_output_projection(component: str, attn_implementation: str) -> None:
    model = adapted(
        LofitConfig(heads=HEADS, component=component, init_std=0.5), attn_implementation=attn_implementation
    )
    rows = rows_of(model, component)
    assert sorted(rows) == HEADS
    given = {"offsets": rows, "scales": {}} if component == "offset" else {"offsets": {}, "scales": rows}
    expected = hooked(tiny_llama(attn_implementation=attn_implementation), **given)
    torch.testing.assert_close(logits(model, **padded_batch("left")), expected, rtol=1e-6, atol=1e-6)


def test_all_heads_by_default() -> None:
    model = adapted(LofitConfig(component="scale", init_std=0.5))
    assert sorted(rows_of(model, "scale")) == [
        (layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_HEADS)
    ]
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 4 * 8 * HEAD_DIM


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_zero_vectors_change_nothing(component: str) -> None:
    model = adapted(LofitConfig(component=component, init_std=0.0))
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_gradients_match_finite_differences(component: str) -> None:
    """Of the layer alone, since a model's norms compute in float32."""
    layer = LofitLayer(nn.Linear(4 * 3, 5).double(), "o_proj", layer=0, num_heads=4, head_dim=3)
    layer.update_layer("default", LofitConfig(heads=[(0, 1), (0, 3)], component=component), active=["default"])
    x, rows = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def output(rows: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {f"lofit_{component}.default": rows}, (x,))

    assert torch.autograd.gradcheck(output, rows)


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_only_the_chosen_heads_are_trained(component: str) -> None:
    model = adapted(LofitConfig(heads=HEADS, component=component, init_std=0.5))
    model(prompt(), labels=prompt()).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if "lofit_" in name}
    assert all(parameter.requires_grad == ("lofit_" in name) for name, parameter in model.named_parameters())
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 3 * HEAD_DIM


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    model = build_tiny(family(name))
    tokens = token_ids(family(name), model)
    last = attn_hooks.inspect_model(model).layers[-1]
    plain = logits(model, tokens)
    model = get_peft_model(model, LofitConfig(heads=[(last.index, last.num_heads - 1)], init_std=1.0)).eval()
    edited = logits(model, tokens)
    assert (edited - plain).abs().max() > 1e-3
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == last.value_dim
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_tiny(family(name)), tmp_path)
    assert torch.equal(logits(loaded, tokens), edited)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), edited, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_of_a_vision_language_model_the_text_decoder_alone_is_adapted(name: str) -> None:
    model = VLMS[name].model()
    inputs = VLMS[name].inputs()
    plain = logits(model, **inputs)
    model = get_peft_model(model, LofitConfig(init_std=0.5)).eval()
    assert len(layers_of(model)) == 2
    assert not [path for path in layers_of(model) if "vis" in path]
    assert (logits(model, **inputs) - plain).abs().max() > 1e-3
    assert torch.equal(logits(model.unload(), **inputs), plain)


@pytest.mark.parametrize("name", ["jetmoe", "deepseek_v4"])
def test_a_family_without_such_a_projection_is_refused(name: str) -> None:
    with pytest.raises(AttnHooksError) as refused:
        get_peft_model(build_tiny(family(name)), LofitConfig())
    assert refused.value.code == "no-output-projection"


def test_on_a_backend_that_edits_refuse() -> None:
    model = tiny_llama()
    # What flash_attention_2 sets, where it is installed.
    model.config._attn_implementation_internal = "flash_attention_2"
    assert len(layers_of(get_peft_model(model, LofitConfig()))) == NUM_LAYERS


# The config


@pytest.mark.parametrize(
    ("heads", "code"),
    [
        ([(4, 0)], "layer-out-of-range"),
        ([(0, 0), (1, 8)], "head-out-of-range"),
        ([], "bad-parameters"),
        ([(0, 1), (0, 1)], "bad-parameters"),
        ([(0, -1)], "bad-parameters"),
        ([3], "bad-parameters"),
        ([(0, 1, 2)], "bad-parameters"),
    ],
)
def test_heads_are_validated_before_the_model_is_touched(heads: Any, code: str) -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    with pytest.raises(AttnHooksError) as refused:
        get_peft_model(model, LofitConfig(heads=heads))
    assert refused.value.code == code
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(get_peft_model(model, LofitConfig(init_std=0))), logits(tiny_llama()))


@pytest.mark.parametrize("wrong", [{"component": "bias"}, {"init_std": -1.0}])
def test_other_parameters_are_validated(wrong: dict[str, Any]) -> None:
    with pytest.raises(AttnHooksError) as refused:
        LofitConfig(**wrong)
    assert refused.value.code == "bad-parameters"


def test_heads_may_be_given_by_layer() -> None:
    assert LofitConfig(heads={2: [7, 0], 0: [2]}).heads == [[0, 2], [2, 0], [2, 7]]


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(AttnHooksError) as refused:
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert refused.value.code == "adapter-format"


# Saving and loading


def test_the_file_is_small_and_names_no_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 500
    assert sorted(get_peft_model_state_dict(model)) == [
        "base_model.model.model.layers.0.self_attn.o_proj.lofit_offset",
        "base_model.model.model.layers.2.self_attn.o_proj.lofit_offset",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOFIT"
    assert config["heads"] == [list(pair) for pair in HEADS]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adapter", ["default", "lofit", "of"])
def test_saved_and_loaded(tmp_path: Path, adapter: str, low_cpu_mem_usage: bool) -> None:
    """Under names, too, that are parts of the prefix."""
    model = get_peft_model(tiny_llama(), LofitConfig(heads=HEADS, init_std=0.5), adapter_name=adapter).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    loaded = PeftModel.from_pretrained(tiny_llama(), folder, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


def test_an_adapter_of_the_first_release_keeps_loading() -> None:
    """The files are committed; what they say must not change its meaning."""
    folder = Path(__file__).parent / "adapter_of_version_1"
    loaded = PeftModel.from_pretrained(tiny_llama(), folder)
    rows = rows_of(loaded, "offset")
    assert sorted(rows) == HEADS
    for place, head in enumerate(HEADS):
        assert torch.equal(rows[head], torch.arange(HEAD_DIM) + 10.0 * place)


def test_through_transformers_own_loading(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, LofitConfig(heads=HEADS, init_std=0.5)).eval()
    model.save_pretrained(tmp_path / "adapter")
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(by_auto), logits(model))
    by_method = tiny_llama()
    by_method.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(by_method), logits(model))


def test_half_precision_keeps_vectors_in_float32() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), LofitConfig(heads=HEADS, init_std=0.5)).eval()
    assert {layer.lofit_offset["default"].dtype for layer in layers_of(model).values()} == {torch.float32}
    found = logits(model)
    assert found.dtype == torch.bfloat16
    rounded = tiny_llama().bfloat16().float()
    unedited_error = (logits(tiny_llama().bfloat16()) - logits(rounded)).abs().mean()
    exact = get_peft_model(rounded, LofitConfig(heads=HEADS)).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    assert (found - logits(exact)).abs().mean() < 1.5 * unedited_error
    half = get_peft_model(tiny_llama().bfloat16(), LofitConfig(heads=HEADS), autocast_adapter_dtype=False)
    assert {layer.lofit_offset["default"].dtype for layer in layers_of(half).values()} == {torch.bfloat16}
    assert logits(half).dtype == torch.bfloat16


@pytest.mark.parametrize("component", ["offset", "scale"])
def test_everything_moves_together(component: str) -> None:
    def places(model: nn.Module) -> set[str]:
        return {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}

    config = LofitConfig(heads=HEADS, component=component)
    moved = adapted(config).to("meta")
    assert places(moved) == {"meta"}
    assert places(get_peft_model(tiny_llama().to("meta"), config)) == {"meta"}, "made where the base is"
    for dtype in (torch.float64, torch.float16):
        cast = adapted(config).to(dtype)
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
        assert logits(cast).dtype == dtype
        cast.merge_adapter()
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}


# Several adapters


def second() -> LofitConfig:
    return LofitConfig(heads=[(2, 7), (3, 1)], component="scale", init_std=0.5)


def alone(model: PeftModel, name: str, config: LofitConfig) -> Tensor:
    """The logits of a fresh model with that adapter's vectors alone."""
    fresh = get_peft_model(tiny_llama(), config).eval()
    rows = get_peft_model_state_dict(model, adapter_name=name)
    peft.set_peft_model_state_dict(fresh, rows)
    return logits(fresh)


def test_adding_switching_and_deleting() -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("other", second())
    assert torch.equal(logits(model), first), "a new adapter is not active"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith(".default") for name in trained)
    model.set_adapter("other")
    other = logits(model)
    assert torch.equal(other, alone(model, "other", second()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith(".other") for name in trained)
    model.delete_adapter("default")
    assert torch.equal(logits(model), other), "an inactive adapter is deleted"
    assert not [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if "default" in name]
    with pytest.warns(UserWarning):
        model.add_adapter("third", LofitConfig(heads=HEADS, init_std=0.5))
        model.delete_adapter("other")
    assert torch.equal(logits(model), alone(model, "third", LofitConfig(heads=HEADS))), "the active one is deleted"


def test_active_adapters_act_one_after_the_other() -> None:
    """(1 + A) z first, then + v; or the other way round: the order of activation."""
    model = adapted()
    model.add_adapter("other", second())
    offsets = {(at.layer, head): row.detach() for at in layers_of(model).values() for head, row in _rows(at, "default")}
    scales = {(at.layer, head): row.detach() for at in layers_of(model).values() for head, row in _rows(at, "other")}
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(
        logits(model, **padded_batch("left")), hooked(tiny_llama(), offsets, scales), rtol=1e-6, atol=1e-6
    )
    model.base_model.set_adapter(["default", "other"])
    shifted = {place: row * (1 + scales.get(place, torch.zeros(HEAD_DIM))) for place, row in offsets.items()}
    torch.testing.assert_close(
        logits(model, **padded_batch("left")), hooked(tiny_llama(), shifted, scales), rtol=1e-6, atol=1e-6
    )


def _rows(layer: LofitLayer, adapter: str) -> list[tuple[int, Tensor]]:
    if adapter not in layer.lofit_heads:
        return []
    rows = layer.lofit_offset[adapter] if adapter in layer.lofit_offset else layer.lofit_scale[adapter]
    return list(zip(layer.lofit_heads[adapter].tolist(), rows, strict=True))


def test_each_adapter_is_saved_in_its_folder(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", second())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_batch_with_several_adapters_is_refused(call: str) -> None:
    model = adapted()
    model.add_adapter("other", second())
    with pytest.raises(AttnHooksError) as refused:
        (model if call == "forward" else model.generate)(input_ids=prompt(), adapter_names=["default", "other"])
    assert refused.value.code == "mixed-batch"
    assert "other" in str(refused.value)


def test_unload_leaves_no_trace() -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    wrapped = get_peft_model(model, LofitConfig(heads=HEADS, init_std=0.5))
    assert wrapped.unload() is model
    model.requires_grad_(True)
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_beside_lora() -> None:
    """LoRA inside: the projection that LoFiT wraps is LoRA's."""
    torch.manual_seed(2)
    inner = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    ).eval()
    plain = logits(inner)
    model = get_peft_model(inner, LofitConfig(heads=HEADS, init_std=0.5)).eval()
    assert (logits(model) - plain).abs().max() > 1e-3
    with pytest.raises(AttnHooksError) as refused:
        model.merge_and_unload()
    assert refused.value.code == "not-mergeable"


# In use


def test_generation_with_and_without_a_cache() -> None:
    model = adapted()
    with_cache = generated(model)
    assert torch.equal(with_cache, generated(model, use_cache=False))
    assert not torch.equal(with_cache, generated(tiny_llama()))


def test_compiled_in_one_graph() -> None:
    model = adapted()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.parametrize("component", ["offset", "scale"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, component: str) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = adapted(LofitConfig(component=component, init_std=0.5)).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


def train(model: nn.Module, folder: Path, resume: bool = False, **arguments: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in prompt(batch=8)]
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    trainer = Trainer(model, TrainingArguments(**(options | arguments)), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    def fresh() -> PeftModel:
        torch.manual_seed(5)
        return get_peft_model(tiny_llama(), LofitConfig(heads=HEADS, task_type="CAUSAL_LM"))

    model = fresh()
    base = copy.deepcopy(model.get_base_model())
    trainer = train(model, tmp_path)
    model.eval()
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-2
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model))
    for (name, before), after in zip(base.named_parameters(), model.get_base_model().parameters(), strict=True):
        assert "lofit_" in name or torch.equal(before, after)
    resumed = fresh()
    (tmp_path / "checkpoint-4").rename(tmp_path / "finished")
    train(resumed, tmp_path, resume=True)
    assert torch.equal(logits(resumed.eval()), logits(model))
    assert trainer.state.global_step == 4


def test_a_preference_loss_takes_the_base_model_as_its_reference() -> None:
    """DPO's sigmoid loss on (prompt, answer) pairs, its reference the same model with the adapter disabled."""
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(), LofitConfig(heads=HEADS, init_std=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.0)
    better, worse = prompt(seed=1), prompt(seed=2)

    def score(tokens: Tensor) -> Tensor:
        log_probabilities = model(tokens).logits[:, :-1].log_softmax(-1)
        return log_probabilities.gather(-1, tokens[:, 1:, None])[:, 5:].sum((1, 2))

    def loss() -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = score(better) - score(worse)
        return -torch.nn.functional.logsigmoid(0.5 * (score(better) - score(worse) - reference)).mean()

    with torch.no_grad():
        base = score(better) - score(worse)
    assert loss().item() == pytest.approx(0.6931472), "untrained, it is its own reference"
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.2
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(score(better) - score(worse), base), "the reference stays where it was"


def test_a_quantised_projection_works_and_is_not_merged() -> None:
    class Int8Linear(nn.Linear):
        """Weights of one byte and a scale, as quantisation libraries hold them."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
            self.scale = linear.weight.data.abs().max() / 127
            weight = (linear.weight.data / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * self.scale).to(x.dtype).T

    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Int8Linear(layer.self_attn.o_proj)
    plain = logits(model)
    wrapped = get_peft_model(model, LofitConfig(heads=HEADS, init_std=0.5)).eval()
    assert {layer.lofit_offset["default"].dtype for layer in layers_of(wrapped).values()} == {torch.float32}
    assert (logits(wrapped) - plain).abs().max() > 1e-3
    wrapped(prompt(), labels=prompt()).loss.backward()
    assert all(layer.lofit_offset["default"].grad.abs().max() > 0 for layer in layers_of(wrapped).values())
    edited = logits(wrapped)
    with pytest.raises(AttnHooksError) as refused:
        wrapped.merge_and_unload()
    assert refused.value.code == "not-mergeable"
    assert torch.equal(logits(wrapped), edited)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), plain)
