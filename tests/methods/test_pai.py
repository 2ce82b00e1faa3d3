"""PAI against its equation: which rows answer, with padding on either side, in decode, in chunks."""

from __future__ import annotations

from collections.abc import Set

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attn_hooks
from attn_hooks import PAI, EditError
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import IMAGE, left_padded, llama, prompts

PROMPT, MORE = 14, 4
LENGTHS = (PROMPT, 9, 6)
IMAGES = [[2, 3, 4, 8], [], [9, 10]]  # key positions with left padding


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def batch() -> tuple[Tensor, Tensor]:
    """Left-padded prompts with two images, none and one, and four more tokens."""
    ids, mask = left_padded(LENGTHS)
    for row, places in enumerate(IMAGES):
        ids[row, places] = IMAGE
    return torch.cat([ids, prompts(3, MORE + 1, seed=3)[:, 1:]], 1), torch.cat([mask, torch.ones(3, MORE).long()], 1)


def literal_pai(edit: PAI, images: list[list[int]], last: list[int], asked: Set[int] = frozenset()) -> Literal:
    """``last``: the place of each prompt's last token; ``asked``: rows after it that answer nothing."""

    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, places in enumerate(images):
            for h in range(s.shape[1]):
                if layer < 2 or (edit.heads is not None and (layer, h) not in edit.heads):
                    continue
                for i in sorted(set(range(last[b], s.shape[2])) - asked):
                    for j in places:
                        edited[b, h, i, j] = s[b, h, i, j] + edit.alpha * abs(float(s[b, h, i, j]))
        return edited

    return Literal(logits=logits)


@pytest.mark.parametrize(
    "edit", [PAI(gamma=1.0, alpha=0.6), PAI(gamma=1.0, alpha=0.5, heads=((2, 1), (4, 3)))], ids=str
)
def test_prefill_and_decode_are_the_equation(edit: PAI) -> None:
    model = llama()
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with literal_attention(model, literal_pai(edit, IMAGES, [PROMPT - 1] * 3)):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    real = mask[:, :PROMPT].bool()
    with attn_hooks.editing(model, edit):
        prefill = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=positions[:, :PROMPT]).logits
        stepwise = decode(model, ids, PROMPT, DynamicCache(config=model.config), attention_mask=mask)
    torch.testing.assert_close(prefill[real], expected[:, :PROMPT][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stepwise, expected[:, PROMPT - 1 :], rtol=1e-9, atol=1e-9)


def test_right_padding_moves_the_last_row() -> None:
    model = llama()
    ids, mask = batch()
    ids, mask = ids[:, :PROMPT], mask[:, :PROMPT]
    shifts = [PROMPT - length for length in LENGTHS]
    ids = torch.stack([row.roll(-shift) for row, shift in zip(ids, shifts, strict=True)])
    mask = torch.stack([row.roll(-shift) for row, shift in zip(mask, shifts, strict=True)])
    images = [[place - shift for place in places] for places, shift in zip(IMAGES, shifts, strict=True)]
    edit = PAI(gamma=1.0, alpha=0.6)
    with literal_attention(model, literal_pai(edit, images, [length - 1 for length in LENGTHS])):
        expected = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", [[5], [5, 7, 13], [1, 10, 13, 14]], ids=str)
def test_a_prompt_in_parts_needs_its_length_and_is_then_the_same(cuts: list[int]) -> None:
    """Whatever the parts: only the prompt's last row is edited, and all after it. An image may come in any but alone."""
    model = llama()
    ids, mask = batch()
    edit = PAI(gamma=1.0, alpha=0.6, prompt_length=PROMPT)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attn_hooks.editing(model, edit):
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for stop in [*cuts, PROMPT + 1, ids.shape[1]]:
            at = slice(start, stop)
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, at], "past_key_values": cache}
            parts.append(model(ids[:, at], **given).logits)
            start = stop
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)
    unedited = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(whole[0, : PROMPT - 1], unedited[0, : PROMPT - 1], rtol=1e-9, atol=1e-9)
    assert (whole[0, PROMPT - 1 :] - unedited[0, PROMPT - 1 :]).abs().amax(-1).min() > 1e-6


def test_right_padded_prompts_in_parts_that_end_apart_are_refused() -> None:
    model = attn_hooks.wrap(llama(), PAI(gamma=1.0, prompt_length=8))
    ids = prompts(2, 8, image=True)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    with pytest.raises(EditError, match="ended in an earlier forward"):
        model(ids[:, 5:], attention_mask=mask, past_key_values=cache)


def test_assisted_generation_is_greedy() -> None:
    model, assistant = (
        attn_hooks.wrap(llama(), PAI(gamma=1.0, alpha=0.6, prompt_length=PROMPT)),
        llama(num_hidden_layers=1),
    )
    ids = prompts(1, PROMPT, image=True)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), model.generate(ids, **settings))


def test_decode_compiles_in_one_graph() -> None:
    model, ids = attn_hooks.wrap(llama(), PAI(gamma=1.0, alpha=0.6)), prompts(2, PROMPT + 3, image=True)
    eager = decode(model, ids, PROMPT, StaticCache(config=model.config, max_cache_len=32))
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    model(ids[:, :PROMPT], past_key_values=cache)
    for place in range(PROMPT, PROMPT + 3):
        logits = step(ids[:, place : place + 1], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, eager[:, place - PROMPT + 1], rtol=1e-9, atol=1e-9)


def test_prompts_without_image_and_foreign_caches_are_refused() -> None:
    model, ids = llama(), prompts(image=True)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    attn_hooks.wrap(model, "pai")
    with pytest.raises(EditError, match="no-prefill"):
        model(ids[:, 8:9], past_key_values=cache)
    with pytest.raises(EditError, match="no-image-in-prompt"):
        model(prompts())
    with pytest.raises(EditError, match="needs-image"):
        attn_hooks.wrap(llama(image_token_id=None), "pai")
