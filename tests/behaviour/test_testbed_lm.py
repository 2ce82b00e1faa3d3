"""What edits do to the shipped, trained model, each against a control. Tiny samples: the recipes measure, this guards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import attn_hooks
from attn_eval import templates
from attn_hooks import PASTA, Ablate, Edit, PowerAttention, SinkScale, Streaming, find_spans

VALUES = ("7310482", "2956017", "8841263")
RETRIEVAL_HEADS = ((7, 3), (7, 4))  # models/testbed-lm/README.md, "Retrieval heads"
OTHER_HEADS = ((7, 0), (6, 2))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(attn_hooks.testbed_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(attn_hooks.testbed_path(), dtype=torch.float32).eval()


def prompt(value: str, before: int, after: int) -> str:
    """A pass key with so many noise sentences before and after it (about 22 tokens each)."""
    noise = templates.PASSKEY_NOISE
    line = templates.PASSKEY_LINE.format(value=value)
    text = "\n".join([noise] * before + [line] + [noise] * after)
    return templates.PASSKEY_INTRO + text + templates.PASSKEY_QUESTION + templates.PASSKEY_ANSWER


@torch.no_grad()
def found(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *edits: Edit, after: int = 14) -> int:
    """How many of three pass keys the model names, under ``edits``."""
    texts = [prompt(value, before, after) for value, before in zip(VALUES, (2, 5, 9), strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with attn_hooks.editing(model, *edits):
        written = model.generate(**batch, max_new_tokens=10, do_sample=False)
    answers = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :])
    return sum(value in answer for value, answer in zip(VALUES, answers, strict=True))


def test_the_model_retrieves(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert found(model, tokenizer) == 3


def test_ablating_the_retrieval_heads_ends_retrieval_and_other_heads_do_not(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert found(model, tokenizer, Ablate(heads=RETRIEVAL_HEADS)) == 0
    assert found(model, tokenizer, Ablate(heads=OTHER_HEADS)) == 3


def test_a_window_loses_what_is_out_of_its_reach_and_only_that(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The key stands about 350 tokens before the question, or about 50; the window is 128."""
    window = Streaming(sinks=4, window=128)
    assert found(model, tokenizer, window, after=14) == 0
    assert found(model, tokenizer, window, after=1) == 3
    assert found(model, tokenizer, Streaming(sinks=4, window=4096), after=14) == 3


def test_power_blocks_that_cover_everything_keep_retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert found(model, tokenizer, PowerAttention(block=64, window_blocks=64)) == 3


def test_scaling_a_sink_that_is_weak_costs_nothing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The card measures almost no weight on BOS, so halving it must not cost retrieval."""
    assert found(model, tokenizer, SinkScale(scale=0.5)) == 3


@torch.no_grad()
def test_pasta_moves_weight_to_the_highlighted_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two pass keys in one prompt: the answer's first digit turns to the highlighted one, whichever that is."""
    first, second = (templates.PASSKEY_LINE.format(value=value) for value in VALUES[:2])
    text = "\n".join([templates.PASSKEY_NOISE, first, templates.PASSKEY_NOISE, second, templates.PASSKEY_NOISE])
    text = templates.PASSKEY_INTRO + text + templates.PASSKEY_QUESTION + templates.PASSKEY_ANSWER
    batch = tokenizer(text, return_tensors="pt")
    space_and_digit = [tokenizer(f"is {value}", add_special_tokens=False).input_ids for value in VALUES[:2]]
    digits = [next(token for token in ids if tokenizer.decode([token]).strip().isdigit()) for ids in space_and_digit]
    preference = []
    for line in (first, second):
        spans = (find_spans(tokenizer, text, [line]),)
        with attn_hooks.editing(model, PASTA(spans=spans, alpha=0.01, heads=RETRIEVAL_HEADS)):
            written = model.generate(
                **batch, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        logits = torch.stack(written.logits)[:, 0].amax(0)
        preference.append(float(logits[digits[0]] - logits[digits[1]]))
    assert preference[0] > preference[1]
