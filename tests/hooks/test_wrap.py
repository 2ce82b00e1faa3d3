"""What ``wrap`` returns, takes, and changes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import Ablate, Edit, SinkScale, Streaming
from tests.hooks.tiny import ACTING_EDITS, BOS, generated, logits, padded_batch, prompt, tiny_config, tiny_llama

BACKENDS = ["sdpa", "eager"]
RECIPE = """
model: some/model
edits:
  - streaming
  - {method: sink_scale, scale: 3.0, layers: [1]}
  - method: ablate
    heads: {2: [0, 7]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("edit", ACTING_EDITS.values(), ids=ACTING_EDITS.keys())
def test_wrap_returns_the_same_object_and_adds_no_weights(edit: Edit) -> None:
    model = tiny_llama()
    model_class, names, modules = type(model), list(model.state_dict()), [name for name, _ in model.named_modules()]
    parameters, config = [id(parameter) for parameter in model.parameters()], model.config

    wrapped = attn_hooks.wrap(model, edit)

    assert wrapped is model
    assert type(wrapped) is model_class
    assert wrapped.config is config
    assert list(wrapped.state_dict()) == names
    assert [name for name, _ in wrapped.named_modules()] == modules
    assert [id(parameter) for parameter in wrapped.parameters()] == parameters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", ACTING_EDITS.values(), ids=ACTING_EDITS.keys())
def test_each_edit_changes_the_logits_and_unwrap_gives_them_back(edit: Edit, backend: str) -> None:
    model = tiny_llama(attn_implementation=backend)
    before = logits(model)
    edited = logits(attn_hooks.wrap(model, edit))
    assert (edited - before).abs().max() > 1e-3
    assert torch.equal(logits(attn_hooks.unwrap(model)), before)


@pytest.mark.parametrize(
    "given",
    ["streaming", {"method": "streaming"}, {"method": "streaming", "window": 1024, "sinks": 4}, Streaming()],
    ids=["name", "mapping", "mapping with parameters", "config"],
)
def test_an_edit_may_be_given_in_each_form(given: object) -> None:
    model = tiny_llama()
    attn_hooks.wrap(model, given)
    assert attn_hooks.edits_in_force(model) == (Streaming(),)


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_a_recipe_brings_all_its_edits_and_stands_beside_others(recipe: Path, as_text: bool) -> None:
    model = tiny_llama()
    attn_hooks.wrap(model, Ablate(heads={0: [1]}), str(recipe) if as_text else recipe)
    assert attn_hooks.edits_in_force(model) == (
        Ablate(heads={0: [1]}),
        Streaming(),
        SinkScale(scale=3.0, layers=(1,)),
        Ablate(heads={2: [0, 7]}),
    )


def test_wrapping_again_replaces() -> None:
    model = tiny_llama()
    only_second = logits(attn_hooks.wrap(tiny_llama(), Streaming(sinks=1, window=3)))
    attn_hooks.wrap(model, Ablate(heads={1: [3]}))
    logits(model)
    attn_hooks.wrap(model, Streaming(sinks=1, window=3))
    assert attn_hooks.edits_in_force(model) == (Streaming(sinks=1, window=3),)
    assert torch.equal(logits(model), only_second)


def test_unwrapping_what_is_not_wrapped_is_no_error() -> None:
    model = tiny_llama()
    assert attn_hooks.unwrap(model) is model
    attn_hooks.wrap(model, Ablate(heads={1: [3]}))
    logits(model)
    assert attn_hooks.unwrap(attn_hooks.unwrap(model)) is model
    assert attn_hooks.edits_in_force(model) == ()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_without_an_edit_logits_are_bit_for_bit_the_models_own(side: str, backend: str, training: bool) -> None:
    inputs = {"input_ids": prompt()} if side == "none" else padded_batch(side)
    model = tiny_llama(attn_implementation=backend, attention_dropout=0.2).train(training)

    def run() -> Tensor:
        torch.manual_seed(5)
        return model(**inputs).logits

    before = run()
    attn_hooks.wrap(model)
    assert torch.equal(run(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_edit_layers_outside_the_edits_run_on_the_models_backend(backend: str) -> None:
    model = tiny_llama(attn_implementation=backend)
    states = model(prompt(), output_hidden_states=True).hidden_states
    attn_hooks.wrap(model, Ablate(heads={2: [1]}))
    edited = model(prompt(), output_hidden_states=True).hidden_states
    assert all(torch.equal(states[depth], edited[depth]) for depth in (0, 1, 2))
    assert not torch.equal(states[3], edited[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "static cache", "prompt lookup"],
)
def test_without_an_edit_generate_gives_the_models_own_tokens(options: dict[str, Any], backend: str) -> None:
    tokens = prompt(batch=1) if "prompt_lookup_num_tokens" in options else prompt()
    model = tiny_llama(attn_implementation=backend)
    before = generated(model, input_ids=tokens, **options)
    attn_hooks.wrap(model)
    assert torch.equal(generated(model, input_ids=tokens, **options), before)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 1}],
    ids=["no cache", "static cache", "prompt lookup", "greedy again"],
)
@pytest.mark.parametrize("name", ["ablate", "power", "sink_scale", "streaming", "head_affine"])
def test_an_edit_acts_alike_however_generate_runs(name: str, options: dict[str, Any]) -> None:
    model = tiny_llama()
    plain = generated(model, input_ids=prompt(1), new_tokens=8)
    attn_hooks.wrap(model, ACTING_EDITS[name])
    edited = generated(model, input_ids=prompt(1), new_tokens=8)
    assert not torch.equal(edited, plain)
    assert torch.equal(generated(model, input_ids=prompt(1), new_tokens=8, **options), edited)


@pytest.mark.parametrize("name", ["ablate", "act", "power", "sink_scale", "streaming", "head_affine"])
def test_embeddings_in_place_of_tokens(name: str) -> None:
    model = attn_hooks.wrap(tiny_llama(), ACTING_EDITS[name])
    embedded = model.get_input_embeddings()(prompt())
    assert torch.equal(logits(model), model(inputs_embeds=embedded).logits)


def test_a_bare_decoder_called_with_positional_arguments() -> None:
    batch = padded_batch("left")
    model = tiny_llama()
    expected = attn_hooks.wrap(copy.deepcopy(model), Streaming(sinks=1, window=3)).model(**batch).last_hidden_state
    decoder = attn_hooks.wrap(model.model, Streaming(sinks=1, window=3))
    given = decoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert torch.equal(given, expected)


def test_two_models_with_different_edits_do_not_see_each_other() -> None:
    first, second = tiny_llama(), tiny_llama()
    plain = logits(first)
    expected = logits(attn_hooks.wrap(tiny_llama(), Streaming(sinks=1, window=3)))
    attn_hooks.wrap(first, Ablate(heads={1: [3]}))
    assert torch.equal(logits(second), plain)
    attn_hooks.wrap(second, Streaming(sinks=1, window=3))
    ablated = logits(first)
    assert torch.equal(logits(second), expected)
    attn_hooks.unwrap(second)
    assert torch.equal(logits(first), ablated)
    assert torch.equal(logits(second), plain)


def test_two_models_that_share_one_config_object_do_not_see_each_other() -> None:
    config = tiny_config()
    first, second = tiny_llama(config), tiny_llama(config)
    assert first.config is second.config
    plain, content = logits(second), config.to_dict()
    attn_hooks.wrap(first, Ablate(heads={1: [3]}))
    ablated = logits(first)
    assert not torch.equal(ablated, plain)
    assert torch.equal(logits(second), plain)
    attn_hooks.wrap(second, SinkScale(scale=4.0))
    assert torch.equal(logits(first), ablated)
    attn_hooks.unwrap(first)
    assert torch.equal(logits(first), plain)
    assert not torch.equal(logits(second), plain)
    attn_hooks.unwrap(second)
    assert torch.equal(logits(second), plain)
    assert config.to_dict() == content
    assert config._attn_implementation == "sdpa"


def test_forwards_of_two_wrapped_models_may_alternate_token_by_token() -> None:
    models = [attn_hooks.wrap(tiny_llama(seed=seed), ACTING_EDITS["act"]) for seed in (0, 1)]
    alone = [generated(model, new_tokens=4) for model in models]
    caches: list[Any] = [None, None]
    tokens = [prompt(), prompt()]
    for _ in range(4):
        for place, model in enumerate(models):
            new = tokens[place] if caches[place] is None else tokens[place][:, -1:]
            output = model(new, past_key_values=caches[place], use_cache=True)
            caches[place] = output.past_key_values
            tokens[place] = torch.cat([tokens[place], output.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens[0], alone[0])
    assert torch.equal(tokens[1], alone[1])


def test_two_conversations_of_one_wrapped_model_may_alternate() -> None:
    model = attn_hooks.wrap(tiny_llama(), ACTING_EDITS["act"])
    prompts = [prompt(1, 12), prompt(1, 7, seed=3)]

    def steps(tokens: Tensor) -> Any:
        cache, new = None, tokens
        while True:
            output = model(new, past_key_values=cache, use_cache=True)
            cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
            yield output.logits[:, -1]

    alone = [[next(run) for _ in range(4)] for run in map(steps, prompts)]
    runs = [steps(tokens) for tokens in prompts]
    for step in range(4):
        for place, run in enumerate(runs):
            assert torch.equal(next(run), alone[place][step])


def test_a_copy_of_a_wrapped_model_is_independent() -> None:
    model = tiny_llama()
    plain = logits(model)
    attn_hooks.wrap(model, Ablate(heads={1: [3]}))
    ablated = logits(model)
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), ablated)

    attn_hooks.unwrap(duplicate)
    assert torch.equal(logits(duplicate), plain)
    assert torch.equal(logits(model), ablated)
    assert attn_hooks.edits_in_force(model) == (Ablate(heads={1: [3]}),)

    attn_hooks.wrap(duplicate, SinkScale(scale=4.0))
    counted = attn_hooks.report(model).edits[0].calls
    logits(duplicate)
    assert torch.equal(logits(attn_hooks.unwrap(model)), plain)
    assert attn_hooks.edits_in_force(duplicate) == (SinkScale(scale=4.0),)
    assert counted == {"prefill": 2}
    assert all(module.config is duplicate.config for module in _attention_modules(attn_hooks.unwrap(duplicate)))


def _attention_modules(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def test_a_copy_reports_its_own_calls_only() -> None:
    model = attn_hooks.wrap(tiny_llama(), Ablate(heads={1: [3]}))
    duplicate = copy.deepcopy(model)
    logits(duplicate)
    assert attn_hooks.report(model).edits[0].calls == {}
    assert attn_hooks.report(duplicate).edits[0].calls == {"prefill": 1}


def _in_float64(model: Any) -> Any:
    """All of it: transformers' RMSNorm computes in float32 whatever it is given."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, torch.nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon))
    return model.double()


@pytest.mark.parametrize("edit", ACTING_EDITS.values(), ids=ACTING_EDITS.keys())
def test_gradients_through_an_edited_forward_match_finite_differences(edit: Edit) -> None:
    model = attn_hooks.wrap(_in_float64(tiny_llama()).train(), edit)
    weight = model.model.layers[0].self_attn.k_proj.weight
    direction = torch.randn_like(weight) / weight.numel() ** 0.5

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(
            model(prompt()).logits[:, :-1].flatten(0, 1), prompt()[:, 1:].flatten()
        )

    loss().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    by_autograd = float((weight.grad * direction).sum())
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    # The central difference errs by O(step ** 2) and by rounding / step, both near 1e-10.
    assert float(above - below) / (2 * step) == pytest.approx(by_autograd, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_training_mode_changes_nothing_without_dropout(name: str) -> None:
    model = attn_hooks.wrap(tiny_llama(), ACTING_EDITS[name])
    assert torch.equal(logits(model), logits(model.train()))


def _gradients(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    model.zero_grad()
    loss = sum(model(**batch, use_cache=False).logits.logsumexp(-1).square().mean() for batch in batches)
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["act", "pasta", "sink_scale", "head_affine"])
@pytest.mark.parametrize("sides", [["left"], ["left", "right"]], ids=["one forward", "two forwards"])
def test_gradient_checkpointing_gives_the_same_gradients(sides: list[str], name: str, reentrant: bool) -> None:
    model = attn_hooks.wrap(tiny_llama().train(), ACTING_EDITS[name])
    batches = [padded_batch(side) for side in sides]
    expected = _gradients(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for given, wanted in zip(_gradients(model, batches), expected, strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_autocast(name: str) -> None:
    model = tiny_llama()
    expected = logits(attn_hooks.wrap(model, ACTING_EDITS[name]))
    with torch.autocast("cpu", torch.bfloat16):
        given = logits(model)
        attn_hooks.unwrap(model)
        error_of_the_plain_model = (logits(model) - _in_full_precision(model)).abs().max()
    assert (given - expected).abs().max() < 4 * error_of_the_plain_model


@pytest.mark.parametrize("name", ["act", "head_affine", "sink_scale"])
def test_a_wrapped_model_may_change_its_dtype(name: str) -> None:
    model = attn_hooks.wrap(tiny_llama(), ACTING_EDITS[name])
    logits(model)
    converted = logits(model.to(torch.bfloat16))
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted, logits(attn_hooks.wrap(tiny_llama().to(torch.bfloat16), ACTING_EDITS[name])))


def _in_full_precision(model: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return logits(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_maps_are_the_edited_ones(when: str) -> None:
    model = tiny_llama(attn_implementation="eager")
    if when == "before":
        model.config.output_attentions = True
    attn_hooks.wrap(model, Streaming(sinks=1, window=3))
    if when == "after":
        model.config.output_attentions = True
    maps = model(prompt()).attentions
    query, key = torch.arange(12)[:, None], torch.arange(12)[None, :]
    hidden = (key > query) | ((key >= 1) & (query - key >= 3))
    assert len(maps) == len(model.model.layers)
    for weights in maps:
        assert torch.all(weights[:, :, hidden] == 0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, 12))


def test_the_prompts_bos_is_what_the_config_names() -> None:
    assert prompt()[0, 0] == BOS == attn_hooks.inspect_model(tiny_llama()).bos_token_id


def test_two_threads_do_not_see_each_others_sequences() -> None:
    """Prompts of different padding through one wrapped model at once."""
    model = attn_hooks.wrap(tiny_llama(), Streaming(sinks=1, window=2))
    ids = torch.randint(3, 50, (2, 12))
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, :7] = 0

    def run(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits

    expected = [run(mask) for mask in masks]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, masks * 40))
    for index, logits_of_thread in enumerate(found):
        assert torch.equal(logits_of_thread, expected[index % 2])
