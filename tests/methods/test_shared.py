"""What every method owes, on every kind of attention. Methods join in cases.py."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import attn_hooks
from attn_hooks import EditError, registry
from tests import models
from tests.methods.cases import CASES, NEED_A_VISION_TOWER, PROMPT, Case
from tests.models import FAMILIES, llama

prompts, left_padded = partial(models.prompts, image=True), partial(models.left_padded, image=True)
case_ids = [case.active.method for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=case_ids)
every_family = pytest.mark.parametrize("family", FAMILIES)
# Models on the eager backend are float32, since it takes its softmax in float32 whatever the model.
TOLERANCE = {
    family: {"rtol": 2e-5, "atol": 2e-5} if family in ("gemma2", "gpt_oss") else {"rtol": 1e-9, "atol": 1e-9}
    for family in FAMILIES
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def logits(model: PreTrainedModel, ids: Tensor, **inputs: object) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def test_every_shipped_method_has_a_case() -> None:
    assert sorted([*case_ids, *NEED_A_VISION_TOWER]) == sorted(registry.SHIPPED)


@every_family
@every_case
def test_neutral_parameters_are_the_identity(case: Case, family: str) -> None:
    if case.neutral is None:
        assert case.active.method == "ablate"  # silencing a head has no neutral setting
        return
    model = FAMILIES[family]()
    ids, mask = left_padded()
    before = logits(model, ids, attention_mask=mask)
    with attn_hooks.editing(model, case.neutral):
        after = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], **TOLERANCE[family])


@every_family
@every_case
def test_active_parameters_act_and_leave_no_trace(case: Case, family: str) -> None:
    model = FAMILIES[family]()
    ids = prompts()
    before = logits(model, ids)
    attn_hooks.wrap(model, case.active)
    assert (logits(model, ids) - before).abs().max() > 1e-6
    (done,) = attn_hooks.report(model).edits
    assert done.calls["prefill"] >= len(done.layers) > 0
    attn_hooks.unwrap(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
@every_case
def test_batch_equals_single(case: Case, family: str, side: str) -> None:
    """Padded rows give what each prompt gives alone."""
    model = attn_hooks.wrap(FAMILIES[family](), case.active)
    ids, mask = left_padded()
    if side == "right":
        lengths = mask.sum(1)
        ids = torch.stack([row.roll(int(length)) for row, length in zip(ids, lengths, strict=True)])
        mask = torch.stack([row.roll(int(length)) for row, length in zip(mask, lengths, strict=True)])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = logits(model, ids[row][real][None])
        torch.testing.assert_close(together[row][real], alone[0], **TOLERANCE[family])


def decode(model: PreTrainedModel, ids: Tensor, prompt: int, cache: object, **inputs: Tensor) -> Tensor:
    """Logits of every token from the prompt's last on, one forward a token."""
    mask = inputs.get("attention_mask")
    parts = []
    start = 0
    for stop in [prompt, *range(prompt + 1, ids.shape[1] + 1)]:
        extra = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            extra["position_ids"] = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
        parts.append(logits(model, ids[:, start:stop], past_key_values=cache, **extra)[:, -1])
        start = stop
    return torch.stack(parts, 1)


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@every_family
@every_case
def test_decode_step_equals_row_of_prefill(case: Case, family: str, cache_kind: str) -> None:
    """Past the sliding windows too. What is frozen on the prompt has its own test beside its method."""
    if case.frozen_on_prompt:
        assert type(case.active).keeps_state
        return
    model = attn_hooks.wrap(FAMILIES[family](), case.active)
    ids = prompts(2, PROMPT + 6)
    if cache_kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + 9)
    stepwise = decode(model, ids, PROMPT, cache)
    torch.testing.assert_close(stepwise, logits(model, ids)[:, PROMPT - 1 :], **TOLERANCE[family])


@every_family
@every_case
def test_caches_agree_with_left_padding(case: Case, family: str) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), case.active)
    ids, mask = left_padded((PROMPT, 9, 4))
    more = models.prompts(3, 5, seed=9)[:, 1:]
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    dynamic = decode(model, ids, PROMPT, DynamicCache(config=model.config), attention_mask=mask)
    static = decode(model, ids, PROMPT, StaticCache(config=model.config, max_cache_len=30), attention_mask=mask)
    torch.testing.assert_close(static, dynamic, **TOLERANCE[family])
    for row, length in enumerate((PROMPT, 9, 4)):
        alone = ids[row][mask[row].bool()][None]
        model_alone = model
        if "prompt_length" in type(case.active).model_fields:
            parameters = case.active.model_dump() | {"prompt_length": length}
            model_alone = attn_hooks.wrap(FAMILIES[family](), type(case.active)(**parameters))
        expected = decode(model_alone, alone, length, DynamicCache(config=model.config))
        torch.testing.assert_close(dynamic[row], expected[0], **TOLERANCE[family])


@every_family
@every_case
def test_right_padding_before_decode_has_no_effect(case: Case, family: str) -> None:
    """The padding stays between the prompt and the new tokens; counted in tokens, it is not there."""
    ids = prompts(1, PROMPT + 6)
    padding = 7
    gap = torch.zeros(1, padding, dtype=torch.long)
    padded = torch.cat([ids[:, :PROMPT], gap, ids[:, PROMPT:]], 1)
    mask = torch.cat([torch.ones(1, PROMPT), torch.zeros(1, padding), torch.ones(1, 6)], 1).long()
    model = FAMILIES[family]()
    if any(layer.sliding_window for layer in attn_hooks.inspect_model(model).layers):
        # The model's own windows count padding as tokens, so even unedited the gap has an effect.
        assert family != "llama"
        return
    parameters = case.active.model_dump()
    if "prompt_length" in parameters:
        parameters["prompt_length"] = PROMPT + padding
    expected = decode(attn_hooks.wrap(model, case.active), ids, PROMPT, DynamicCache(config=model.config))
    attn_hooks.wrap(model, type(case.active)(**parameters))
    cache = DynamicCache(config=model.config)
    decoded = decode(model, padded, PROMPT + padding, cache, attention_mask=mask)
    torch.testing.assert_close(decoded[:, 1:], expected[:, 1:], **TOLERANCE[family])


@every_family
@every_case
def test_prompt_in_chunks_equals_one_forward_or_is_refused(case: Case, family: str) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), case.active)
    ids = prompts(2, PROMPT)
    cache = DynamicCache(config=model.config)
    first = logits(model, ids[:, :5], past_key_values=cache)
    if not case.chunks:
        with pytest.raises(EditError, match=f"{case.active.method} is not defined for several new tokens"):
            logits(model, ids[:, 5:], past_key_values=cache)
        return
    rest = logits(model, ids[:, 5:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), logits(model, ids), **TOLERANCE[family])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@every_case
def test_beam_search_scores_are_those_of_the_sequences(case: Case, family: str) -> None:
    """The score of each beam is what its tokens get when decoded alone: no beam ran with another's state."""
    model = attn_hooks.wrap(FAMILIES[family](), case.active)
    ids, mask = left_padded((PROMPT, 8))
    found = model.generate(
        ids,
        attention_mask=mask,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        length_penalty=0.0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for beam, sequence in enumerate(found.sequences):
        row = beam // 3
        full = sequence[None]
        full_mask = torch.cat([mask[row], torch.ones(5, dtype=torch.long)])[None]
        steps = decode(model, full, PROMPT, DynamicCache(config=model.config), attention_mask=full_mask)
        chosen = steps[0, :-1].log_softmax(-1).gather(-1, sequence[PROMPT:, None]).sum()
        torch.testing.assert_close(chosen, found.sequences_scores[beam].to(chosen), rtol=1e-5, atol=1e-5)


@every_case
def test_assisted_generation_equals_greedy_or_is_refused(case: Case) -> None:
    model = attn_hooks.wrap(llama(), case.active)
    assistant = llama(num_hidden_layers=1)
    ids = prompts(1, PROMPT)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if not case.chunks:
        with pytest.raises(EditError, match="several new tokens"):
            model.generate(ids, assistant_model=assistant, **settings)
        return
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), model.generate(ids, **settings))


@every_case
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    model = attn_hooks.wrap(llama(), case.active)
    ids = prompts()
    expected = logits(model, ids)
    attn_hooks.save_edits(model, tmp_path)
    other = attn_hooks.wrap(llama(), *attn_hooks.load_edits(tmp_path))
    assert torch.equal(logits(other, ids), expected)


@every_case
def test_two_models_do_not_see_each_other(case: Case) -> None:
    """Even when they share one config object."""
    edited = llama()
    plain = type(edited)(edited.config).eval().to(torch.float64)
    plain.load_state_dict(edited.state_dict())
    ids = prompts()
    before = logits(plain, ids)
    attn_hooks.wrap(edited, case.active)
    assert torch.equal(logits(plain, ids), before)
    attn_hooks.wrap(plain, "sink_scale")
    with_edit = logits(edited, ids)
    attn_hooks.unwrap(plain)
    assert torch.equal(logits(edited, ids), with_edit)
    assert torch.equal(logits(plain, ids), before)


@pytest.mark.parametrize(("first", "second"), list(combinations(CASES, 2)), ids=lambda case: case.active.method)
def test_two_methods_compose_or_are_refused_by_name(first: Case, second: Case) -> None:
    """Composed in either listing order they give the same, and not what one of them gives."""
    model, ids = llama(), prompts()
    if first.active.writes == second.active.writes == "visibility":
        with pytest.raises(EditError, match=f"{first.active.method} and {second.active.method} cannot stand together"):
            attn_hooks.wrap(model, first.active, second.active)
        return
    with attn_hooks.editing(model, first.active):
        alone = logits(model, ids)
    with attn_hooks.editing(model, first.active, second.active):
        both = logits(model, ids)
    with attn_hooks.editing(model, second.active, first.active):
        reversed_listing = logits(model, ids)
    assert (both - alone).abs().max() > 1e-6
    if first.active.writes != second.active.writes:
        torch.testing.assert_close(reversed_listing, both, **TOLERANCE["llama"])


@every_case
def test_gradients_reach_the_weights(case: Case) -> None:
    with torch.enable_grad(), warnings.catch_warnings():
        model = attn_hooks.wrap(llama().train(), case.active)
        logits(model, prompts()).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
