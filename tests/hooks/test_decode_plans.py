"""A decode step that reuses what the step before made gives what a step gives that asks every edit again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import attn_hooks
from attn_hooks import ACT, PASTA, Ablate, AttentionCall, Edit, HeadAffine, SinkScale
from attn_kernels import LogitMap, Primitive
from tests.models import FAMILIES, left_padded, llama, prompts

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 5, 4, 8
GAIN = torch.linspace(0.5, 2.0, NUM_LAYERS * NUM_HEADS).reshape(NUM_LAYERS, NUM_HEADS)
LENGTHS = (14, 9, 4)
EDITS: dict[str, tuple[Edit, ...]] = {
    "pasta": (PASTA(spans=(((1, 3),), ((2, 5),), ((0, 2),)), alpha=0.05, prompt_length=14),),
    "act": (ACT(beta=0.1, alpha=1.1, later_tokens="keep"),),
    "sink_scale": (SinkScale(scale=4.0),),
    # These two are the same in every call; beside an edit that is not they are made anew with it.
    "head_affine": (HeadAffine(gain=GAIN), SinkScale(scale=4.0)),
    "ablate": (Ablate(heads=((1, 2), (3, 0))), ACT(beta=0.1, alpha=1.1, later_tokens="keep")),
}
every_edit = pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
every_family = pytest.mark.parametrize("family", ["llama", "mistral"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Asked(Counter[str]):
    """How often each method was asked for its primitives in decode."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    counts = Asked()
    for method in {type(edit) for edits in EDITS.values() for edit in edits}:
        monkeypatch.setattr(method, "primitives", counted(method.primitives, counts))
    return counts


def counted(primitives: Callable[..., list[Primitive]], counts: Asked) -> Callable[..., list[Primitive]]:
    def count(edit: Edit, call: AttentionCall) -> list[Primitive]:
        counts[edit.method] += call.phase == "decode"
        return primitives(edit, call)

    return count


def same_without_reuse(run: Callable[[], Tensor], edits: tuple[Edit, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` gives the same numbers whether steps reuse what earlier ones made or not."""
    reused = run()
    with monkeypatch.context() as patch:
        for edit in edits:
            patch.setattr(type(edit), "fixed_in_decode", False)
            patch.setattr(type(edit), "constant", False)
        asked_again = run()
    assert torch.equal(reused, asked_again)


def feed(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache, *lengths: int) -> Tensor:
    """Logits of the next tokens of ``ids``, in forwards of these lengths."""
    found = []
    for length in lengths:
        start = cache.get_seq_length()
        stop = start + length
        positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
        given: dict[str, Any] = {"attention_mask": mask[:, :stop], "position_ids": positions}
        found.append(model(ids[:, start:stop], past_key_values=cache, **given).logits)
    return torch.cat(found, dim=1)


def padded_tokens(more: int) -> tuple[Tensor, Tensor]:
    """Three prompts padded on the left to 14 tokens, and ``more`` tokens after each."""
    ids, mask = left_padded(LENGTHS)
    later = prompts(len(LENGTHS), more, seed=9)
    return torch.cat([ids, later], 1), torch.cat([mask, torch.ones_like(later)], 1)


@every_family
@every_edit
def test_greedy_tokens_of_a_padded_batch(
    edits: tuple[Edit, ...], family: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), *edits)
    ids, mask = left_padded(LENGTHS)

    def run() -> Tensor:
        asked.clear()
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)

    same_without_reuse(run, edits, monkeypatch)
    without_reuse = asked.copy()
    run()
    # Mistral's cache has dropped keys from the first step on, and every step asks.
    (changing,) = (edit.method for edit in edits if not edit.constant)
    assert (asked[changing] < without_reuse[changing]) == (family == "llama")


@every_family
@every_edit
def test_after_a_cropped_cache(edits: tuple[Edit, ...], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's cache keeps all keys here, since one that drops keys cannot be cropped."""
    model = attn_hooks.wrap(FAMILIES[family](), *edits)
    ids, mask = padded_tokens(8)

    def run() -> Tensor:
        cache = DynamicCache()
        first = feed(model, ids, mask, cache, 14, 1, 1, 1, 1)
        cache.crop(-3)
        again = feed(model, ids.flip(0), mask, cache, 1, 1, 1)
        return torch.cat([first, again], dim=1)

    same_without_reuse(run, edits, monkeypatch)


@every_family
@every_edit
def test_after_reordering_of_beams(edits: tuple[Edit, ...], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), *edits)
    ids, mask = left_padded(LENGTHS)

    def run() -> Tensor:
        options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "do_sample": False}
        return model.generate(ids, attention_mask=mask, **options)

    same_without_reuse(run, edits, monkeypatch)


@every_family
@every_edit
def test_with_a_second_prompt_on_the_same_cache(
    edits: tuple[Edit, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), *edits)
    ids, mask = padded_tokens(10)
    # Padding inside the second prompt, too.
    mask[1, 17:19] = 0

    def run() -> Tensor:
        cache = DynamicCache(config=model.config)
        return feed(model, ids, mask, cache, 14, 1, 1, 4, 1, 1, 1)

    same_without_reuse(run, edits, monkeypatch)


@pytest.mark.parametrize(
    "edits",
    [
        (SinkScale(scale=6.0, sinks=4),),
        (PASTA(spans=(((1, 4),),), alpha=0.05, prompt_length=6),),
        (PASTA(spans=(((1, 4),),), alpha=0.05, prompt_length=6), HeadAffine(gain=GAIN)),
    ],
    ids=lambda edits: edits[0].method,
)
def test_groups_that_grow_in_decode(edits: tuple[Edit, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of two tokens, then one token at a time: later tokens belong to the sinks, or to the prompt."""
    model = attn_hooks.wrap(llama(), *edits)
    ids, mask = prompts(2, 10), torch.ones(2, 10, dtype=torch.long)

    def run() -> Tensor:
        return feed(model, ids, mask, DynamicCache(), 2, *[1] * 8)

    same_without_reuse(run, edits, monkeypatch)
    torch.testing.assert_close(run(), feed(model, ids, mask, DynamicCache(), 2, 8), rtol=1e-9, atol=1e-9)


def test_sinks_that_a_padded_sample_gets_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = (SinkScale(scale=6.0, sinks=7),)
    model = attn_hooks.wrap(llama(), *edits)
    ids, mask = padded_tokens(8)
    same_without_reuse(lambda: feed(model, ids, mask, DynamicCache(), 14, *[1] * 8), edits, monkeypatch)


class LastKeys(Edit):
    """Lifts the most recent keys, which are others at every step."""

    method: ClassVar[str] = "last_keys"
    source: ClassVar[str] = "tests"
    reads: ClassVar[frozenset] = frozenset({"query", "key"})
    writes: ClassVar[str] = "logits"
    scope: ClassVar[str] = "per-row"

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        return [LogitMap(call.keys_at(call.inputs.key_index[None] >= call.layout.length - 2), bias=3.0)]


def test_an_edit_that_is_not_fixed_is_asked_at_every_step(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LastKeys, "primitives", counted(LastKeys.primitives, asked))
    model = attn_hooks.wrap(llama(), LastKeys(), SinkScale(scale=4.0, layers=(0,)))
    ids, mask = padded_tokens(6)
    feed(model, ids, mask, DynamicCache(), 14, *[1] * 6)
    assert asked["last_keys"] == 6 * NUM_LAYERS
    # Beside it a fixed edit is asked again, too.
    assert asked["sink_scale"] == 6


def test_a_fixed_edit_is_asked_at_the_first_step_only(asked: Asked) -> None:
    model = attn_hooks.wrap(llama(), *EDITS["act"])
    ids, mask = padded_tokens(8)
    cache = DynamicCache()
    num_layers = len(EDITS["act"][0].layers_in(attn_hooks.inspect_model(model)))
    feed(model, ids, mask, cache, 14, 1, 1, 1)
    assert asked["act"] == num_layers
    feed(model, ids, mask, cache, 2, 1, 1)
    assert asked["act"] == 2 * num_layers
