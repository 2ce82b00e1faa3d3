"""Conversations under the image methods: later turns on a kept cache, streamers, batches and beams, and two methods in one pass.

With ``later_tokens="turn"`` the last token of each turn and what is generated after it answer; the rest of a turn does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import attn_hooks
from attn_hooks import DAMRO, PAI, SPIN, VAR, VHR, AttnHooksError, Edit, EditError, Imbalanced, Opera
from tests.hooks import vlms
from tests.literal import Literal, literal_attention
from tests.methods import test_imbalanced, test_pai, test_spin, test_vhr
from tests.methods.test_image_families import CASES
from tests.models import llama

NEW, TURNS = 3, 3
# What each method makes of a later turn, where it has to be told.
ON_TURNS = {"pai": "turn", "spin": "turn", "imbalanced": "turn", "vhr": "turn", "var": "extend", "eah": "keep"}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def forwards(length: int, more: int) -> list[slice]:
    """The prompt, a generated token, a turn of several tokens that begins with another, and what is generated then."""
    stops = [length, length + 1, length + more - 1, length + more]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def run(model: Any, inputs: dict[str, Tensor], parts: list[slice], cache: DynamicCache) -> Tensor:
    """Logits ``(B, N, V)`` of ``parts``, one forward each."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for part in parts:
        given = {"position_ids": positions[:, part], "past_key_values": cache}
        if part.start == 0 and "pixel_values" in inputs:
            given["pixel_values"] = inputs["pixel_values"]
        logits.append(model(inputs["input_ids"][:, part], attention_mask=mask[:, : part.stop], **given).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    "edit", [PAI(gamma=1.0, alpha=0.6, later_tokens="turn"), SPIN(r=0.5, later_tokens="turn")], ids=str
)
def test_a_turn_answers_in_its_last_row(edit: Any) -> None:
    model = llama()
    method: Any = test_pai if isinstance(edit, PAI) else test_spin
    ids, mask = method.batch()
    parts = forwards(method.PROMPT, method.MORE)
    asked = set(range(parts[2].start, parts[2].stop - 1))
    last = [method.PROMPT - 1] * 3
    literal: Literal
    if isinstance(edit, PAI):
        literal = test_pai.literal_pai(edit, test_pai.IMAGES, last, asked)
    else:
        literal = test_spin.literal_spin(edit, test_spin.IMAGES, last, [], asked=asked)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with literal_attention(model, literal):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    with attn_hooks.editing(model, edit):
        found = run(model, {"input_ids": ids, "attention_mask": mask}, parts, DynamicCache(config=model.config))
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head_modulation", ["none", "image_mass"])
def test_a_turn_of_imbalanced(head_modulation: Any) -> None:
    edit = Imbalanced(gamma=1.0, head_modulation=head_modulation, later_tokens="turn")
    model, more = test_imbalanced.llava(), 4
    inputs = test_imbalanced.batch(more)
    prompt = inputs["input_ids"].shape[1] - more
    parts = forwards(prompt, more)
    local, summary = test_imbalanced.literal_streams(model, inputs["input_ids"][:, :prompt], edit.ratio)
    first_real = [int(row.argmax()) for row in inputs["attention_mask"]]
    asked = set(range(parts[2].start, parts[2].stop - 1))
    literal = test_imbalanced.literal_imbalanced(edit, local, summary, prompt - 1, first_real, asked)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with literal_attention(model.model.language_model, literal):
        expected = model(**inputs, position_ids=positions).logits
    with attn_hooks.editing(model, edit):
        found = run(model, inputs, parts, DynamicCache(config=model.config.text_config))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-8, atol=1e-8)


def conversation(more: int = 4) -> tuple[Any, dict[str, Any], list[slice]]:
    """A tiny LLaVA, its prompts with tokens of later turns, and the forwards of these."""
    case = vlms.CASES["llava"]
    inputs = case.inputs()
    turn = torch.randint(3, 80, (3, more), generator=torch.Generator().manual_seed(2))
    parts = forwards(inputs["input_ids"].shape[1], more)
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], turn], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(turn)], 1),
        "pixel_values": inputs["pixel_values"],
    }
    return case.model(), whole, parts


def test_a_turn_of_vhr_keeps_the_prompts_heads() -> None:
    edit = VHR(layers=test_vhr.LAYERS, alpha=3.0, later_tokens="turn")
    model, inputs, parts = conversation()
    _, _, gains = test_vhr.literal_vhr(vlms.CASES["llava"], model, edit)
    asked = set(range(parts[2].start, parts[2].stop - 1))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with test_vhr.scaled(model, gains, parts[0].stop - 1, {}, asked):
        expected = model(**inputs, position_ids=positions, use_cache=False).logits
    with attn_hooks.editing(model, edit):
        found = run(model, inputs, parts, DynamicCache(config=model.config.text_config))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_what_is_refused_of_a_turn() -> None:
    with pytest.raises(AttnHooksError, match="with prompt_length all tokens behind it count as generated"):
        PAI(prompt_length=4, later_tokens="turn")
    with pytest.raises(AttnHooksError, match="with prompt_length all tokens behind it count as generated"):
        Imbalanced(prompt_length=4, later_tokens="turn")
    model, inputs, parts = conversation()
    for edit in (PAI(gamma=1.0, layers=(0,)), SPIN(), VHR(layers=(0,)), Imbalanced(gamma=1.0, layers=(0,))):
        with attn_hooks.editing(model, edit), pytest.raises(EditError, match="later_tokens='turn' for a conversation"):
            run(model, inputs, parts, DynamicCache(config=model.config.text_config))
    picture = [vlms.image(vlms.SQUARE, 0)] * 3
    with attn_hooks.editing(model, VHR(layers=(0,), later_tokens="turn")):
        cache = DynamicCache(config=model.config.text_config)
        run(model, inputs, parts[:1], cache)
        with pytest.raises(EditError, match="first turn, which must hold its images"):
            model(
                input_ids=vlms.batch_of(picture)["input_ids"],
                pixel_values=inputs["pixel_values"],
                past_key_values=cache,
            )


# All ten methods, through generate().


def edited(method: str) -> tuple[Any, dict[str, Any]]:
    """A tiny LLaVA of 4 query heads over 2 key-value heads with the method on it, and its three prompts."""
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    edit: Edit = CASES[method].active(model, inputs)
    if method in ON_TURNS:
        edit = type(edit)(**(dict(edit) | {"later_tokens": ON_TURNS[method]}))
    return attn_hooks.wrap(model, edit), inputs


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """A prompt of the batch without its padding and the others' images."""
    real = inputs["attention_mask"][row].bool()
    images = {0: slice(0, 2), 2: slice(2, 3)}[row]
    one = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    return one | {"pixel_values": inputs["pixel_values"][images]}


def generated(model: Any, inputs: dict[str, Any], **how: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **how,
    )


every_method = pytest.mark.parametrize("method", CASES)


@every_method
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_each_prompt_alone(method: str, beams: int) -> None:
    model, inputs = edited(method)
    together = generated(model, inputs, num_beams=beams).sequences
    for row in (0, 2):
        by_itself = generated(model, alone(inputs, row), num_beams=beams).sequences
        assert torch.equal(together[row, -NEW:], by_itself[0, -NEW:])


class Heard(BaseStreamer):  # type: ignore[misc]
    """What a streamer is given, one entry a call."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@every_method
def test_a_streamer_hears_the_tokens_one_by_one(method: str) -> None:
    model, inputs = edited(method)
    one, heard = alone(inputs, 0), Heard()
    expected = generated(model, one).sequences[0, -NEW:].tolist()
    generated(model, one, streamer=heard)
    assert heard.ended
    assert heard.tokens[1:] == [[token] for token in expected]


def turns(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Generated tokens ``(B, TURNS, NEW)`` and logits ``(B, TURNS * NEW, V)`` of a conversation on one cache."""
    given, cache, tokens, logits = dict(inputs), None, [], []
    for turn in range(TURNS):
        kept = {} if cache is None else {"past_key_values": cache}
        answer = generated(model, given, **kept)
        cache = answer.past_key_values
        tokens.append(answer.sequences[:, -NEW:])
        logits += list(answer.logits)
        asked = torch.full((len(answer.sequences), 4), 7 + turn)
        told = torch.cat([answer.sequences, asked], 1)
        mask = given["attention_mask"]
        mask = torch.cat([mask, torch.ones(len(mask), told.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        given = {"input_ids": told, "attention_mask": mask}
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@every_method
def test_a_conversation_on_one_cache_knows_no_neighbours(method: str) -> None:
    model, inputs = edited(method)
    together, logits = turns(model, inputs)
    for row in (0, 2):
        tokens, own = turns(model, alone(inputs, row))
        assert torch.equal(tokens[0], together[row])
        torch.testing.assert_close(own[0], logits[row], rtol=1e-4, atol=1e-5)
    attn_hooks.unwrap(model)
    _, unedited = turns(model, inputs)
    assert not torch.allclose(unedited[[0, 2], -1], logits[[0, 2], -1], rtol=0, atol=1e-6)


def test_var_and_vhr_in_one_pass_are_one_after_the_other() -> None:
    """VHR's heads are those of a model under VAR: with the image, for without it there is no image to give weight to."""
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    var, vhr = CASES["var"].active(model, inputs), VHR(layers=test_vhr.LAYERS, alpha=3.0)
    assert isinstance(var, VAR)
    text = vlms.batch_of([[token for token in row if token[1] is None] for row in case.rows])
    has_image = [any(number is not None for _, number in row) for row in case.rows]
    last = inputs["input_ids"].shape[1] - 1
    gains: dict[int, Tensor] = {}

    def under(given: dict[str, Any], row: int, edits: Any) -> tuple[dict[int, Tensor], Tensor]:
        seen: dict[int, Tensor] = {}
        with edits, test_vhr.scaled(model, gains, row, seen):
            return seen, model(**given, use_cache=False).logits

    for layer in test_vhr.LAYERS:
        with_image, _ = under(inputs, last, attn_hooks.editing(model, var))
        without, _ = under(text, text["input_ids"].shape[1] - 1, nullcontext())
        gains[layer] = torch.tensor(
            [
                test_vhr.literal_gain(with_image[layer][row, -1], without[layer][row, -1], vhr.alpha, vhr.outlier)
                if has_image[row]
                else [1.0] * with_image[layer].shape[2]
                for row in range(3)
            ]
        )
    _, expected = under(inputs, last, attn_hooks.editing(model, var))
    _, var_alone = under(inputs, last + 1, attn_hooks.editing(model, var))
    with attn_hooks.editing(model, var, vhr):
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, -1], var_alone[:, -1], atol=1e-4)


@pytest.mark.parametrize("method", ["eah", "imbalanced", "pai", "spin", "var"])
def test_beside_damro_the_reason_is_its_second_stream(method: str) -> None:
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    both = DAMRO(beta=0.0, tokens=3), CASES[method].active(model, inputs)
    told = pytest.raises(
        AttnHooksError, match=f"damro and {method} cannot stand together: its second stream sees a few"
    )
    with attn_hooks.editing(model, *both), told:
        model(**inputs)


def test_candidates_are_no_turn() -> None:
    model = vlms.CASES["llava"].model()
    for edit in (PAI(gamma=1.0, layers=(0,), later_tokens="turn"), SPIN(later_tokens="turn"), VHR(later_tokens="turn")):
        for both in ((edit, Opera()), (Opera(), edit)):
            with pytest.raises(AttnHooksError, match="opera tries several tokens in one forward"):
                attn_hooks.wrap(model, *both)


@pytest.mark.parametrize("method", ["agla", "damro", "opera", "vcd", "vhr"])
def test_embeddings_do_not_tell_an_image(method: str) -> None:
    """Features merged beforehand: the prompt has an image, and nothing says where."""
    model, inputs = edited(method)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(AttnHooksError, match="was given embeddings") as refused:
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    assert refused.value.code == ("no-companions" if method == "vhr" else "stream-no-tokens")
