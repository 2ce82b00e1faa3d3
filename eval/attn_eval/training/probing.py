"""Head outputs of the training texts, right and wrong, which ITI's probes tell apart (arXiv 2306.03341)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_eval.errors import EvaluationError
from attn_eval.training.encoding import OpenPromptEncoder, encode_pair, pad_token, padded
from attn_eval.training.examples import Completion, Preference
from attn_hooks.probes import HeadOutputs


def head_outputs_of(
    model: Any, tokenizer: Any, examples: Sequence[Completion] | Sequence[Preference], batch_size: int
) -> tuple[HeadOutputs, list[int], list[int]]:
    """Head outputs at the last token of each prompt with its completion and with a wrong one; labels 1 and 0; example numbers.

    The wrong completion is the one that is rejected; of prompts with a single completion the next example's that differs.

    Raises:
        EvaluationError: all examples have the same completion.
    """
    encoder, rows, labels, groups = OpenPromptEncoder(tokenizer), [], [], []
    listed: Sequence[Any] = examples
    for number, example in enumerate(listed):
        if isinstance(example, Preference):
            right, wrong = example.chosen, example.rejected
        else:
            right, wrong = example.completion, _another(listed, number)
        for label, text in ((1, right), (0, wrong)):
            pair = encode_pair(encoder, example.prompt, text, end=False)
            rows.append({"input_ids": pair.ids, "labels": pair.labels})
            labels.append(label)
            groups.append(number)
    pad = pad_token(tokenizer)
    batches = [padded(rows[first : first + batch_size], pad) for first in range(0, len(rows), batch_size)]
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    return HeadOutputs.collect(model, inputs), labels, groups


def _another(examples: Sequence[Any], number: int) -> str:
    own = examples[number].completion
    for step in range(1, len(examples)):
        other: str = examples[(number + step) % len(examples)].completion
        if other != own:
            return other
    raise EvaluationError(
        "probes need wrong answers, and all training examples have the same: choose another selection.method"
    )
