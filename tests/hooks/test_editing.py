"""``editing``: edits for the length of a block, on top of those in force."""

from __future__ import annotations

import warnings

import pytest
import torch

import attn_hooks
from attn_hooks import Ablate, EditNeverActedWarning, HeadAffine, SinkScale, Streaming
from tests.hooks import snapshot
from tests.hooks.tiny import ACTING_EDITS, NUM_HEADS, NUM_LAYERS, logits, prompt, tiny_llama

FIRST, SECOND, THIRD = Ablate(heads={1: [3]}), SinkScale(scale=4.0), Streaming(sinks=1, window=3)


def test_the_block_gets_the_model_and_leaves_no_trace() -> None:
    model = tiny_llama()
    before, plain = snapshot.take(model), logits(model)
    with attn_hooks.editing(model, FIRST) as inside:
        assert inside is model
        assert not torch.equal(logits(model), plain)
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), plain)


def test_blocks_nest_and_each_adds_to_what_is_in_force() -> None:
    model = attn_hooks.wrap(tiny_llama(), FIRST)
    expected = {
        edits: logits(attn_hooks.wrap(tiny_llama(), *edits))
        for edits in [(FIRST,), (FIRST, SECOND), (FIRST, SECOND, THIRD)]
    }
    with attn_hooks.editing(model, SECOND):
        with attn_hooks.editing(model, THIRD):
            assert attn_hooks.edits_in_force(model) == (FIRST, SECOND, THIRD)
            assert torch.equal(logits(model), expected[FIRST, SECOND, THIRD])
        assert attn_hooks.edits_in_force(model) == (FIRST, SECOND)
        assert torch.equal(logits(model), expected[FIRST, SECOND])
    assert attn_hooks.edits_in_force(model) == (FIRST,)
    assert torch.equal(logits(model), expected[FIRST,])


@pytest.mark.parametrize("outer", [(), (FIRST,)], ids=["unwrapped", "wrapped"])
@pytest.mark.parametrize("problem", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_restores(problem: type[BaseException], outer: tuple[Ablate, ...]) -> None:
    model = tiny_llama()
    if outer:
        attn_hooks.wrap(model, *outer)
    before, expected = snapshot.take(model), logits(model)
    with pytest.raises(problem), attn_hooks.editing(model, SECOND):
        raise problem
    assert attn_hooks.edits_in_force(model) == outer
    assert torch.equal(logits(model), expected)
    if not outer:
        assert snapshot.changes(before, model) == []


def test_an_exception_in_the_forward_inside_restores() -> None:
    model = tiny_llama()
    before, plain = snapshot.take(model), logits(model)
    with pytest.raises(IndexError), attn_hooks.editing(model, SECOND):
        logits(model, torch.full((1, 3), 10_000))
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("inside", ["wrap", "unwrap"])
@pytest.mark.filterwarnings("ignore::attn_hooks.EditNeverActedWarning")
def test_wrap_or_unwrap_inside_a_block_ends_with_the_block(inside: str) -> None:
    model = attn_hooks.wrap(tiny_llama(), FIRST)
    expected = logits(model)
    with attn_hooks.editing(model, SECOND):
        if inside == "wrap":
            attn_hooks.wrap(model, THIRD)
            assert attn_hooks.edits_in_force(model) == (THIRD,)
        else:
            attn_hooks.unwrap(model)
            assert attn_hooks.edits_in_force(model) == ()
        logits(model)
    assert attn_hooks.edits_in_force(model) == (FIRST,)
    assert torch.equal(logits(model), expected)


def test_one_block_may_be_entered_again_and_again() -> None:
    model = tiny_llama()
    before, outputs = snapshot.take(model), []
    for _ in range(3):
        with attn_hooks.editing(model, FIRST, SECOND):
            outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert snapshot.changes(before, model) == []


def test_as_a_decorator() -> None:
    model = tiny_llama()
    plain = logits(model)

    @attn_hooks.editing(model, FIRST)
    def run() -> torch.Tensor:
        return logits(model)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), plain)
    assert torch.equal(logits(model), plain)


def test_blocks_on_two_models_may_interleave() -> None:
    first, second = tiny_llama(), tiny_llama(seed=1)
    plain = logits(first), logits(second)
    with attn_hooks.editing(first, FIRST), attn_hooks.editing(second, SECOND):
        assert attn_hooks.edits_in_force(first) == (FIRST,)
        assert attn_hooks.edits_in_force(second) == (SECOND,)
        assert not torch.equal(logits(first), plain[0])
        assert not torch.equal(logits(second), plain[1])
    assert torch.equal(logits(first), plain[0])
    assert torch.equal(logits(second), plain[1])


def test_a_cache_filled_outside_a_block_goes_on_inside_and_after() -> None:
    """A neutral edit in mid-generation must not disturb what the outer edit does in and after the block."""
    tokens, new = prompt(1, 9), prompt(1, 6, seed=7)
    model = attn_hooks.wrap(tiny_llama(), SECOND)
    whole = logits(model, torch.cat([tokens, new], dim=1))
    cache = model(tokens, use_cache=True).past_key_values
    steps = []
    with attn_hooks.editing(model, SinkScale(scale=1.0)):
        steps += [model(new[:, step : step + 1], past_key_values=cache).logits for step in range(3)]
    steps += [model(new[:, step : step + 1], past_key_values=cache).logits for step in range(3, 6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, -6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("close", ["unwrap", "wrap again", "editing"])
@pytest.mark.parametrize("name", ACTING_EDITS)
def test_an_edit_that_never_acted_warns_when_its_scope_closes(name: str, close: str) -> None:
    model = tiny_llama()
    with pytest.warns(EditNeverActedWarning, match=rf"{name}\(.*LlamaForCausalLM"):
        if close == "editing":
            with attn_hooks.editing(model, ACTING_EDITS[name]):
                pass
        else:
            attn_hooks.wrap(model, ACTING_EDITS[name])
            attn_hooks.unwrap(model) if close == "unwrap" else attn_hooks.wrap(model)


def test_the_warning_points_at_the_users_line() -> None:
    model = attn_hooks.wrap(tiny_llama(), FIRST)
    with pytest.warns(EditNeverActedWarning) as of_unwrap:
        attn_hooks.unwrap(model)
    with pytest.warns(EditNeverActedWarning) as of_block, attn_hooks.editing(model, FIRST):
        pass
    attn_hooks.wrap(model, FIRST)
    with pytest.warns(EditNeverActedWarning) as of_wrap:
        attn_hooks.wrap(model)
    assert [caught[0].filename for caught in (of_unwrap, of_wrap, of_block)] == [__file__] * 3


def test_only_the_idle_one_of_two_edits_warns() -> None:
    neutral = HeadAffine(gain=torch.ones(NUM_LAYERS, NUM_HEADS))
    model = attn_hooks.wrap(tiny_llama(), FIRST, neutral)
    logits(model)
    with pytest.warns(EditNeverActedWarning) as caught:
        attn_hooks.unwrap(model)
    assert len(caught) == 1
    assert "head_affine" in str(caught[0].message)


def test_an_edit_that_acted_does_not_warn() -> None:
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditNeverActedWarning)
        attn_hooks.wrap(model, FIRST)
        logits(model)
        with attn_hooks.editing(model, SECOND):
            logits(model)
        attn_hooks.unwrap(model)


def test_an_outer_edit_that_acted_inside_a_block_only_does_not_warn() -> None:
    model = attn_hooks.wrap(tiny_llama(), FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditNeverActedWarning)
        with attn_hooks.editing(model, SECOND):
            logits(model)
        attn_hooks.unwrap(model)


def test_an_outer_edit_that_is_idle_inside_a_block_does_not_warn_at_its_end() -> None:
    model = attn_hooks.wrap(tiny_llama(), FIRST)
    logits(model)
    with pytest.warns(EditNeverActedWarning) as caught, attn_hooks.editing(model, SECOND):
        pass
    assert len(caught) == 1
    assert "sink_scale" in str(caught[0].message)
