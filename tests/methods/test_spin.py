"""SPIN against a literal reading of its sheet: which heads look at the image, in which rows, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import SPIN, AttentionCall, AttnHooksError, EditError
from attn_hooks.methods.spin import RANKING
from attn_kernels import Ranking
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import FAMILIES, IMAGE, left_padded, llama, prompts

PROMPT, MORE, WINDOW = 14, 4, 6
LENGTHS = (PROMPT, 9, 6)
IMAGES = [[2, 3, 4, 8, 11], [], [9, 10]]  # key positions with left padding


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def batch() -> tuple[Tensor, Tensor]:
    """Left-padded prompts with several images, none and one, and four more tokens."""
    ids, mask = left_padded(LENGTHS)
    for row, places in enumerate(IMAGES):
        ids[row, places] = IMAGE
    return torch.cat([ids, prompts(3, MORE + 1, seed=3)[:, 1:]], 1), torch.cat([mask, torch.ones(3, MORE).long()], 1)


def literal_spin(
    edit: SPIN,
    images: list[list[int]],
    last: list[int],
    silenced: list[tuple[int, ...]],
    window: int | None = None,
    asked: Set[int] = frozenset(),
) -> Literal:
    """``last``: the place of each prompt's last token; ``asked``: rows after it that answer nothing. ``silenced`` gets the heads
    of each edited row."""
    gains: dict[int, Tensor] = {}

    def logits(s: Tensor, layer: int) -> Tensor:
        number = s.shape[1]
        gains[layer] = torch.ones(s.shape[:3], dtype=torch.float64)
        for b, places in enumerate(images):
            for i in sorted(set(range(last[b], s.shape[2])) - asked):
                seen = [j for j in places if j <= i and (window is None or j > i - window)]
                if not seen or (edit.layers is not None and layer not in edit.layers):
                    continue
                score = [sum(float(s[b, h, i, j]) for j in seen) for h in range(number)]
                order = sorted(range(number), key=lambda h: -score[h])
                others = order[max(1, int(edit.r * number)) :]
                silenced.append(tuple(sorted(others)))
                gains[layer][b, others, i] = edit.eps
        return s

    return Literal(logits=logits, output=lambda z, layer: z * gains[layer][..., None])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("edit", [SPIN(r=0.5, eps=0.1), SPIN(r=0.8, eps=0.0, layers=(1, 4)), SPIN(r=0.1)], ids=str)
def test_prefill_and_decode_are_the_sheet(edit: SPIN, family: str) -> None:
    """With softcap and sliding windows, too; another row may silence other heads."""
    model = FAMILIES[family]()
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if family == "gemma2" else {"rtol": 1e-9, "atol": 1e-9}
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    windows = {layer.index: layer.sliding_window for layer in attn_hooks.inspect_model(model).layers}
    silenced: list[tuple[int, ...]] = []
    literals = {w: literal_spin(edit, IMAGES, [PROMPT - 1] * 3, silenced, w) for w in set(windows.values())}
    literal = Literal(
        logits=lambda s, layer: literals[windows[layer]].logits(s, layer),
        output=lambda z, layer: literals[windows[layer]].output(z, layer),
    )
    with literal_attention(model, literal):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    assert len(set(silenced)) > 1
    real = mask[:, :PROMPT].bool()
    with attn_hooks.editing(model, edit):
        prefill = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=positions[:, :PROMPT]).logits
        stepwise = decode(model, ids, PROMPT, DynamicCache(config=model.config), attention_mask=mask)
    torch.testing.assert_close(prefill[real], expected[:, :PROMPT][real], **tolerance)
    torch.testing.assert_close(stepwise, expected[:, PROMPT - 1 :], **tolerance)


@pytest.mark.parametrize("beams", [1, 3])
def test_decode_without_padding_is_the_sheet(beams: int) -> None:
    """Where no mask, window or softcap acts on single keys, scores come from the sum of the image's keys."""
    model, edit = llama(), SPIN(r=0.5, eps=0.1)
    ids = batch()[0][:1].repeat(beams, 1)
    # Beams go on with tokens of their own, and from others of their prompt.
    more = torch.randint(3, 60, (beams, MORE), generator=torch.Generator().manual_seed(5))
    rows = torch.arange(beams).flip(0)
    ids = torch.cat([ids[:, :PROMPT], more], 1)
    after = torch.cat([ids[rows, : PROMPT + 2], ids[:, PROMPT + 2 :]], 1)
    silenced: list[tuple[int, ...]] = []
    with literal_attention(model, literal_spin(edit, IMAGES[:1] * beams, [PROMPT - 1] * beams, silenced)):
        expected = model(after).logits[:, PROMPT - 1 :]
    assert len(set(silenced)) > 1
    cache = DynamicCache(config=model.config)
    with attn_hooks.editing(model, edit):
        steps = [model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1:]]
        for place in range(PROMPT, ids.shape[1]):
            if place == PROMPT + 2:
                cache.reorder_cache(rows)
            steps.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], expected[:, 3:], rtol=1e-9, atol=1e-9)


def test_a_cache_cropped_within_the_image_has_the_sum_of_what_is_left() -> None:
    model, edit = llama(), SPIN(r=0.5, eps=0.1)
    ids = batch()[0][:1]
    left = 5
    found = []
    with attn_hooks.editing(model, edit):
        for steps in (2, 0):
            cache = DynamicCache(config=model.config)
            model(ids[:, :PROMPT], past_key_values=cache)
            for place in range(PROMPT, PROMPT + steps):
                model(ids[:, place : place + 1], past_key_values=cache)
            cache.crop(left - PROMPT - steps)
            found.append(
                [model(ids[:, [place]], past_key_values=cache).logits for place in range(PROMPT, PROMPT + MORE)]
            )
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_mask_that_hides_the_image_after_some_steps() -> None:
    """The eager backend has a mask in every step, so that nothing is kept of the steps before; its softmax is in float32."""
    ids, hidden, found = batch()[0][:1], [2, 3, 4, 8], []
    for backend in ("sdpa", "eager"):
        model = llama()
        model.set_attn_implementation(backend)
        cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
        with attn_hooks.editing(model, SPIN(r=0.5, eps=0.1)):
            model(ids[:, :PROMPT], past_key_values=cache)
            for place in range(PROMPT, PROMPT + MORE):
                mask[:, hidden] = place < PROMPT + 2
                given = {"attention_mask": mask[:, : place + 1], "position_ids": torch.tensor([[place]])}
                found.append(model(ids[:, [place]], past_key_values=cache, **given).logits)
    torch.testing.assert_close(found[:MORE], found[MORE:], rtol=1e-6, atol=1e-6)


def test_autocast_leaves_the_sum_of_the_image_as_it_is() -> None:
    """In 16 bits it would be rounded, and could overflow."""
    rankings: list[Ranking] = []
    for enabled in (False, True):
        model, cache = llama(torch.float32, num_hidden_layers=1), DynamicCache()
        with attn_hooks.editing(model, SPIN(r=0.5)):
            model(batch()[0][:1, :PROMPT], past_key_values=cache)
            with torch.autocast("cpu", torch.bfloat16, enabled):
                model(torch.tensor([[5]]), past_key_values=cache)
        states = [state for sequence in cache.attn_hooks_states.values() for state in sequence.of_method.values()]
        rankings.extend(state[RANKING] for state in states)
    torch.testing.assert_close(rankings[1].along, rankings[0].along)


def test_right_padding_moves_the_last_row() -> None:
    model = llama()
    ids, mask = (part[:, :PROMPT] for part in batch())
    shifts = [PROMPT - length for length in LENGTHS]
    ids = torch.stack([row.roll(-shift) for row, shift in zip(ids, shifts, strict=True)])
    mask = torch.stack([row.roll(-shift) for row, shift in zip(mask, shifts, strict=True)])
    images = [[place - shift for place in places] for places, shift in zip(IMAGES, shifts, strict=True)]
    edit = SPIN(r=0.5)
    with literal_attention(model, literal_spin(edit, images, [length - 1 for length in LENGTHS], [])):
        expected = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


def test_a_part_of_the_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank of tensor parallelism has it."""
    calls: list[AttentionCall] = []
    primitives = SPIN.primitives

    def kept(self: SPIN, call: AttentionCall) -> list[Any]:
        calls.append(call)
        return primitives(self, call)

    monkeypatch.setattr(SPIN, "primitives", kept)
    with attn_hooks.editing(llama(), SPIN()) as model:
        model(prompts(image=True))
    with pytest.raises(AttnHooksError, match="compares all 4 heads of a layer, and this rank holds 2"):
        primitives(SPIN(), replace(calls[0], heads=range(2)))


def test_several_new_tokens_and_prompts_without_image_are_refused() -> None:
    model, ids = attn_hooks.wrap(llama(), "spin"), prompts(image=True)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    with pytest.raises(EditError, match="heads are chosen for one row at a time"):
        model(ids[:, 8:], past_key_values=cache)
    with pytest.raises(EditError, match="no-image-in-prompt"):
        model(prompts())
