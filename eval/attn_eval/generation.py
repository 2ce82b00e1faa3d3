"""Answers in left-padded batches, with the time of prefill and of decode told apart."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from attn_eval.image_prompts import ImagePrompts
from attn_eval.prompting import PromptEncoder
from attn_eval.recipe import GenerationSettings
from attn_eval.rows import Row
from attn_eval.tasks.images import Question


@dataclass(frozen=True)
class Answer:
    """What the model wrote to a row.

    Attributes:
        text: the new text, special tokens left out.
        new_tokens: tokens written, the end-of-sequence token included.
        prompt_tokens: tokens that the model was given, padding left out, those of images included.
        capped: whether the answer was cut at the limit of new tokens.
        first_token: log-probability of each choice as the first token, where choices were given.
        prefill_seconds, decode_seconds: this row's even share of its batch's time up to, and after, the first token.
    """

    text: str
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int = 0
    capped: bool = False
    first_token: tuple[float, ...] | None = None


class StepClock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None
        self.start = self.now()

    def now(self) -> float:
        """Seconds, when all work queued on a GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = self.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def plan_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Rows in batches of equal length and equal number of new tokens as far as they go, the longest first.

    The plan depends on nothing but the rows and the batch size, so that a run that goes on after a kill pads the
    rows that it still has to do as the first one would have.
    """
    ordered = sorted(rows, key=lambda row: (row.new_tokens, row.length_actual, row.id), reverse=True)
    batches: list[list[Row]] = []
    for row in ordered:
        if not batches or len(batches[-1]) == batch_size or batches[-1][0].new_tokens != row.new_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def generate_answers(
    model: Any, encoder: PromptEncoder, rows: Sequence[Row], settings: GenerationSettings, seed: int
) -> list[Answer]:
    """The model's answers to one batch, in the order of the rows.

    Args:
        model: a causal language model; edits that are in force on it act.
        encoder: makes the rows' tokens.
        rows: all with one ``new_tokens``.
        settings: greedy, sampled or with beams.
        seed: with the rows' ids it seeds the sampling, so that a batch draws the same in any order of batches.
    """
    prompts = [encoder.encode(row.input, row.answer_prefix) for row in rows]
    width = max(map(len, prompts))
    tokenizer = encoder.tokenizer
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)

    torch.manual_seed(_batch_seed(seed, [row.id for row in rows]))
    return _generate(model, tokenizer, {"input_ids": ids, "attention_mask": mask}, settings, rows[0].new_tokens, pad)


def answer_questions(
    model: Any,
    prompts: ImagePrompts,
    questions: Sequence[Question],
    images: Sequence[Any],
    settings: GenerationSettings,
    seed: int,
    choices: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """The model's answers to questions about images, in their order.

    Args:
        model: a vision-language model; edits that are in force on it act.
        prompts: makes the model's inputs.
        questions: all with one ``new_tokens``.
        images: one a question, RGB.
        settings: greedy, sampled or with beams.
        seed: with the questions' ids it seeds the sampling.
        choices: token ids that stand for each choice; with them, the answers tell how likely each is as the first
            token.

    Raises:
        EvaluationError: the processor refuses a prompt.
    """
    inputs = prompts.encode([question.prompt for question in questions], images)
    moved = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    torch.manual_seed(_batch_seed(seed, [question.id for question in questions]))
    pad = prompts.tokenizer.pad_token_id
    return _generate(model, prompts.tokenizer, moved, settings, questions[0].new_tokens, pad, choices)


def plan_questions(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Questions in batches of one number of new tokens, images of one size together, the largest first.

    As `plan_batches`, it depends on the questions and the batch size alone.
    """

    def size(question: Question) -> tuple[int, int, int, int, str]:
        picture = question.picture
        width, height = (picture.width, picture.height) if picture else (0, 0)
        return question.new_tokens, height, width, len(question.prompt), question.id

    batches: list[list[Question]] = []
    for question in sorted(questions, key=size, reverse=True):
        if not batches or len(batches[-1]) == batch_size or batches[-1][0].new_tokens != question.new_tokens:
            batches.append([])
        batches[-1].append(question)
    return batches


def _generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    settings: GenerationSettings,
    new_tokens: int,
    pad: int,
    choices: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    rows, width = inputs["input_ids"].shape
    clock = StepClock(model.device)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            generation_config=_generation_config(model, settings, new_tokens, pad, logits=choices is not None),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    end = clock.now()
    first = clock.first or end

    stops = _stop_tokens(model)
    # The beams of a prompt are alike before the first token.
    likely = None if choices is None else _log_probabilities(output.logits[0][:: settings.num_beams], choices)
    answers = []
    for row, tokens in enumerate(output.sequences[:, width:].tolist()):
        length = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
        answers.append(
            Answer(
                text=tokenizer.decode(tokens[:length], skip_special_tokens=True),
                new_tokens=length,
                prefill_seconds=(first - clock.start) / rows,
                decode_seconds=(end - first) / rows,
                prompt_tokens=int(inputs["attention_mask"][row].sum()),
                capped=length == new_tokens and tokens[length - 1] not in stops,
                first_token=None if likely is None else tuple(likely[row]),
            )
        )
    return answers


def _log_probabilities(logits: torch.Tensor, choices: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of each choice, over all tokens that stand for it: ``(rows, choices)``."""
    logits = logits.float()
    each = torch.stack([logits[:, list(ids)].logsumexp(-1) for ids in choices], dim=1)
    return (each - logits.logsumexp(-1, keepdim=True)).tolist()


def _generation_config(
    model: Any, settings: GenerationSettings, new_tokens: int, pad: int, *, logits: bool
) -> GenerationConfig:
    """The model's own stop tokens and nothing else of its defaults: its temperature must not colour a greedy run."""
    sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    # transformers fills what is None from the model's defaults; these values are the ones without effect.
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0 if settings.do_sample else 50}
    return GenerationConfig(
        do_sample=settings.do_sample,
        num_beams=settings.num_beams,
        length_penalty=1.0,
        early_stopping=False,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(_stop_tokens(model)) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=logits,
        **{name: neutral[name] if value is None else value for name, value in sampling.items()},
    )


def _stop_tokens(model: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    if stop is None:
        return set()
    return set(stop) if isinstance(stop, list) else {stop}


def _batch_seed(seed: int, ids: Sequence[str]) -> int:
    digest = hashlib.sha256(f"{seed}/{'/'.join(ids)}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
