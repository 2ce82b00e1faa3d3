"""OPERA's penalty against a literal reading of its sheet: every candidate in a forward of its own, no cache, all weights kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import PAI, VCD, AttnHooksError, Opera
from tests.hooks import vlms

CASE = vlms.CASES["llava"]
NEW = 6


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def models() -> tuple[Any, Any]:
    """One to be edited, and its copy that gives all weights. Neither chooses the image's token, which would be an image."""
    model = CASE.model().double().eval()
    model.lm_head.weight.data[vlms.IMAGE] = 0.0
    literal = copy.deepcopy(model)
    literal.set_attn_implementation("eager")
    return model, literal


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def row_of(inputs: dict[str, Any], row: int) -> tuple[dict[str, Any], Tensor]:
    """One prompt without its padding, and which of its keys are image tokens."""
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][real][None]
    images = [sum(number is not None for _, number in tokens) > 0 for tokens in CASE.rows]
    numbers = [len({number for _, number in tokens if number is not None}) for tokens in CASE.rows]
    first = sum(numbers[:row])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images[row]:
        given["pixel_values"] = inputs["pixel_values"][first : first + numbers[row]]
    return given, ids[0] == vlms.IMAGE


def forward(model: Any, given: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Last logits ``(V,)`` and the last layer's weights ``(H, T, T)``."""
    ids = torch.cat([given["input_ids"], tokens[None]], 1)
    output = model(
        **{**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False, output_attentions=True
    )
    return output.logits[0, -1], output.attentions[-1][0]


def literal_step(model: Any, given: dict[str, Any], tokens: Tensor, edit: Opera, image: Tensor) -> Tensor:
    """The penalised logits ``(V,)`` after a prompt and the response ``tokens``."""
    start = given["input_ids"].shape[1]
    logits, _ = forward(model, given, tokens)
    result = torch.full_like(logits, -torch.inf)
    candidates = logits.topk(edit.candidates).indices.tolist()
    penalties = []
    for candidate in candidates:
        _, attention = forward(model, given, torch.cat([tokens, torch.tensor([candidate])]))
        weights = attention.max(0).values
        weights = weights / weights.sum(-1, keepdim=True)
        if edit.faithful == "code" and len(tokens) < 10:
            penalties.append(-float(weights[-1, : len(image)][image].sum()))
            continue
        total = weights.shape[0]
        phi = [
            1e-7 * float(torch.stack([edit.sigma * weights[i, j] for i in range(j, total)]).prod())
            for j in range(start, total)
        ]
        penalties.append(max(phi))
    for candidate, penalty in zip(candidates, penalties, strict=True):
        result[candidate] = logits[candidate] - edit.alpha * (penalty - min(penalties))
    return result


# With sigma as published, six tokens have penalties near 0.
STRONG = Opera(sigma=600.0)


@pytest.mark.parametrize(
    "edit", [STRONG, Opera(sigma=600.0, candidates=3), Opera(faithful="code", alpha=30.0)], ids=str
)
def test_greedy_tokens_and_logits_are_the_sheet(edit: Opera) -> None:
    """A padded batch; the prompt without an image is left alone."""
    (model, literal), inputs = models(), doubled(CASE.inputs())
    with attn_hooks.editing(model, edit):
        made = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    moved = 0.0
    for row in range(len(inputs["input_ids"])):
        given, image = row_of(inputs, row)
        tokens = made.sequences[row, inputs["input_ids"].shape[1] :]
        for step in range(NEW):
            if image.any():
                expected = literal_step(literal, given, tokens[:step], edit, image)
                plain = forward(literal, given, tokens[:step])[0]
                seen = expected.isfinite()
                moved = max(moved, float((expected - plain)[seen].abs().max()))
            else:
                expected = forward(literal, given, tokens[:step])[0]
            torch.testing.assert_close(made.logits[step][row].double(), expected, rtol=1e-4, atol=1e-5)
    assert moved > 1e-2


def test_it_follows_beams() -> None:
    """Rows of a batch go on from one another; each is penalised by its own response."""
    (model, literal), inputs = models(), doubled(CASE.inputs())
    given, image = row_of(inputs, 0)
    # So large that what a row wrote before shows.
    rows, edit = torch.tensor([2, 0, 1]), Opera(sigma=3e3)
    batch = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in given.items()}
    tokens = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(3))
    tokens[tokens == vlms.IMAGE] = 5
    cache = DynamicCache(config=model.config.get_text_config())
    mask = batch["attention_mask"]
    with attn_hooks.editing(model, edit):
        model(**batch, past_key_values=cache)
        for step in range(4):
            if step == 2:
                cache.reorder_cache(rows)
                written = tokens[rows, :2]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            found = model(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits
    responses = torch.cat([written, tokens[:, 2:]], 1)
    for row in range(3):
        expected = literal_step(literal, given, responses[row], edit, image)
        torch.testing.assert_close(found[row, -1].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "internvl", "llava_onevision"])
def test_generation_with_beams_and_samples(family: str) -> None:
    model, inputs = vlms.CASES[family].model(), vlms.CASES[family].inputs()
    with attn_hooks.editing(model, Opera()):
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        sampled = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert beams.shape[0] == len(inputs["input_ids"]) and sampled.shape[0] == 2 * beams.shape[0]


def test_greedy_without_a_penalty_is_the_model() -> None:
    model, inputs = CASE.model(), CASE.inputs()
    before = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with attn_hooks.editing(model, Opera(alpha=0.0)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), before)


def test_long_responses_stay_numbers() -> None:
    model, inputs = CASE.model(), CASE.inputs()
    with attn_hooks.editing(model, Opera(sigma=1e6)):
        made = model.generate(
            **inputs, max_new_tokens=150, min_new_tokens=150, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert not torch.stack(made.logits).isnan().any()


def test_what_is_refused() -> None:
    for family, reason in (("qwen2_vl", "three positions"), ("gemma3", "sliding window")):
        with pytest.raises(AttnHooksError, match=f"opera tries all candidates .*{reason}") as refused:
            attn_hooks.wrap(vlms.CASES[family].model(), Opera())
        assert refused.value.code == "candidates"
    with pytest.raises(AttnHooksError, match="opera needs the logits"):
        attn_hooks.wrap(vlms.CASES["instructblip"].model(), Opera())
    with pytest.raises(AttnHooksError, match="both make the next token"):
        attn_hooks.wrap(CASE.model(), Opera(), VCD())
    # Its attention part goes with it.
    model, given = CASE.model(), CASE.inputs()
    chunk = pytest.raises(AttnHooksError, match="pai is not defined for several new tokens")
    with attn_hooks.editing(model, PAI(gamma=1.0, layers=(0,)), Opera()), chunk:
        model.generate(**given, max_new_tokens=2)
