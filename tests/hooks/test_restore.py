"""After ``unwrap`` nothing is left: weights, config, hooks, attributes and outputs are what they were."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import attn_hooks
from attn_hooks import PASTA, Ablate, AttnHooksError, Edit, HeadAffine, SinkScale, Streaming
from tests.hooks import snapshot
from tests.hooks.tiny import ACTING_EDITS, generated, logits, padded_batch, prompt, tiny_config, tiny_llama


def _forward(model: Any) -> None:
    logits(model)


def _generate(model: Any) -> None:
    generated(model, new_tokens=2)


def _forward_that_fails(model: Any) -> None:
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))


def _nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize("use", [_nothing, _forward, _generate, _forward_that_fails])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("edit", [*ACTING_EDITS.values(), None], ids=[*ACTING_EDITS, "no edit"])
@pytest.mark.filterwarnings("ignore::attn_hooks.EditNeverActedWarning")
def test_unwrap_leaves_no_trace(edit: Edit | None, backend: str, use: Callable[[Any], None]) -> None:
    model = tiny_llama(attn_implementation=backend)
    before = snapshot.take(model)
    attn_hooks.wrap(model, *([edit] if edit else []))
    use(model)
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []


def test_the_snapshot_sees_what_a_wrap_changes() -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    attn_hooks.wrap(model, Ablate(heads={1: [3]}))
    text = "\n".join(snapshot.changes(before, model))
    assert "model.layers.1.self_attn.config" in text
    assert "_forward_pre_hooks" in text
    model.model.norm.weight.data.add_(1)
    assert "weights of model.norm.weight" in snapshot.changes(before, model)


def test_hooks_and_attributes_of_others_survive() -> None:
    model = tiny_llama()
    seen: list[str] = []
    handle = model.model.register_forward_hook(lambda *_: seen.append("mine"))
    model.model.layers[0].self_attn.my_attribute = "mine"
    before = snapshot.take(model)
    attn_hooks.wrap(model, ACTING_EDITS["streaming"])
    logits(model)
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []
    assert seen == ["mine"]
    handle.remove()


def test_a_hook_added_while_wrapped_survives_the_unwrap() -> None:
    model = attn_hooks.wrap(tiny_llama(), ACTING_EDITS["streaming"])
    seen: list[str] = []
    model.model.register_forward_hook(lambda *_: seen.append("mine"))
    logits(model)
    logits(attn_hooks.unwrap(model))
    assert seen == ["mine", "mine"]


def test_repeated_wraps_leave_no_trace() -> None:
    model = tiny_llama()
    before, plain = snapshot.take(model), logits(model)
    for edit in ACTING_EDITS.values():
        attn_hooks.wrap(model, edit)
        logits(model)
        with attn_hooks.editing(model, Ablate(heads={3: [0]})):
            generated(model, new_tokens=2)
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), plain)


def test_an_implementation_chosen_while_wrapped_is_kept_after() -> None:
    model = attn_hooks.wrap(tiny_llama(attn_implementation="sdpa"), ACTING_EDITS["streaming"])
    logits(model)
    model.set_attn_implementation("eager")
    attn_hooks.unwrap(model)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    assert torch.equal(logits(model), logits(tiny_llama(attn_implementation="eager")))


def test_an_implementation_chosen_while_wrapped_keeps_the_edit_in_force() -> None:
    model = attn_hooks.wrap(tiny_llama(attn_implementation="sdpa"), ACTING_EDITS["streaming"])
    batch = padded_batch("left")
    edited = logits(model, **batch)
    model.set_attn_implementation("eager")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **batch)[real], edited[real])


FAILING: dict[str, tuple[object, ...]] = {
    "unknown method": ("no_such_method",),
    "second edit does not fit": (Streaming(), Ablate(heads={1: [999]})),
    "edits that cannot stand together": ("streaming", "power"),
    "missing recipe": ("nowhere.yaml",),
    "wrong shape": (HeadAffine(gain=torch.ones(2, 2)),),
    "no image": (PASTA(spans="image"),),
    "not an edit": (3,),
}


@pytest.mark.parametrize("edits", FAILING.values(), ids=FAILING.keys())
@pytest.mark.parametrize("entry", [attn_hooks.wrap, attn_hooks.explain], ids=["wrap", "explain"])
def test_a_wrap_that_fails_leaves_the_model_as_it_was(entry: Any, edits: tuple[object, ...]) -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    with pytest.raises(AttnHooksError):
        entry(model, *edits)
    assert snapshot.changes(before, model) == []


@pytest.mark.parametrize("edits", FAILING.values(), ids=FAILING.keys())
@pytest.mark.parametrize("how", ["wrap", "editing"])
def test_a_wrap_that_fails_leaves_earlier_edits_in_force(edits: tuple[object, ...], how: str) -> None:
    model = attn_hooks.wrap(tiny_llama(), Ablate(heads={1: [3]}))
    edited, before = logits(model), snapshot.take(model)
    with pytest.raises(AttnHooksError):
        if how == "wrap":
            attn_hooks.wrap(model, *edits)
        else:
            attn_hooks.editing(model, *edits).__enter__()
    assert snapshot.changes(before, model) == []
    assert attn_hooks.edits_in_force(model) == (Ablate(heads={1: [3]}),)
    assert torch.equal(logits(model), edited)
    assert attn_hooks.report(model).edits[0].calls == {"prefill": 2}


def test_explain_and_inspect_change_nothing() -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    attn_hooks.explain(
        model,
        *(edit for name, edit in ACTING_EDITS.items() if name == "streaming" or not edit.by_pattern),
    )
    attn_hooks.inspect_model(model).refusals()
    assert snapshot.changes(before, model) == []
    attn_hooks.wrap(model, ACTING_EDITS["streaming"])
    logits(model)
    before = snapshot.take(model)
    attn_hooks.explain(model)
    str(attn_hooks.report(model))
    assert snapshot.changes(before, model) == []


def _part(model: Any) -> Any:
    return model.model


def _whole_with_the_same_decoder(model: Any) -> Any:
    other = tiny_llama(seed=1)
    other.model = model.model
    return other


def _open_block(model: Any, edit: Edit) -> None:
    attn_hooks.editing(model, edit).__enter__()


@pytest.mark.parametrize("call", [attn_hooks.wrap, _open_block, lambda model, _: attn_hooks.unwrap(model)])
@pytest.mark.parametrize("relative", [_part, _whole_with_the_same_decoder])
def test_what_shares_attention_with_a_wrapped_model_is_refused(
    relative: Callable[[Any], Any], call: Callable[[Any, Edit], Any]
) -> None:
    """Two wraps of one attention would undo each other in the wrong order; an unwrap that finds nothing would mislead."""
    model = tiny_llama()
    other = relative(model)
    plain, before = logits(model), snapshot.take(model)
    attn_hooks.wrap(model, Ablate(heads={1: [3]}))
    edited, wrapped = logits(model), snapshot.take(model)
    with pytest.raises(AttnHooksError) as caught:
        call(other, SinkScale(scale=4.0))
    assert caught.value.code == "wrapped-elsewhere"
    assert type(other).__name__ in str(caught.value)
    assert snapshot.changes(wrapped, model) == []
    assert torch.equal(logits(model), edited)
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []
    attn_hooks.wrap(other, Ablate(heads={1: [3]}))
    assert torch.equal(logits(model), edited)
    attn_hooks.unwrap(other)
    assert torch.equal(logits(model), plain)


def test_the_whole_around_a_wrapped_part_is_refused() -> None:
    model = tiny_llama()
    before = snapshot.take(model)
    attn_hooks.wrap(model.model, Ablate(heads={1: [3]}))
    for call in (lambda: attn_hooks.wrap(model, "streaming"), lambda: attn_hooks.unwrap(model)):
        with pytest.raises(AttnHooksError) as caught:
            call()
        assert caught.value.code == "wrapped-elsewhere"
    logits(model)
    attn_hooks.unwrap(model.model)
    assert snapshot.changes(before, model) == []


def test_nothing_holds_a_model_after_unwrap() -> None:
    model: nn.Module | None = tiny_llama(tiny_config(num_hidden_layers=3))
    attn_hooks.wrap(model, ACTING_EDITS["streaming"])
    output = model(prompt(), use_cache=True)
    attn_hooks.unwrap(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert output.past_key_values is not None
    assert watched() is None


def test_a_wrapped_model_can_be_collected() -> None:
    model: nn.Module | None = attn_hooks.wrap(tiny_llama(), ACTING_EDITS["streaming"])
    logits(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
