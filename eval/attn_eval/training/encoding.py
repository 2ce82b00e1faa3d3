"""Examples as tokens, and batches of them, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_eval.prompting import PromptEncoder
from attn_eval.training.examples import Completion, Preference

IGNORED = -100


class OpenPromptEncoder(PromptEncoder):
    """A prompt's tokens without the end-of-sequence token that some tokenizers put behind every text."""

    def encode(self, prompt: str, answer_prefix: str = "") -> list[int]:
        ids = super().encode(prompt, answer_prefix)
        end = self.tokenizer.eos_token_id
        while ids and ids[-1] == end:
            ids.pop()
        return ids


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt and of what follows it."""

    prompt: list[int]
    continuation: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.continuation

    @property
    def labels(self) -> list[int]:
        """The continuation alone is learned."""
        return [IGNORED] * len(self.prompt) + self.continuation


def encode_pair(encoder: OpenPromptEncoder, prompt: str, continuation: str, *, end: bool) -> Encoded:
    """The prompt's tokens as they are when the model is asked, and the continuation's.

    Both are read as one text where that leaves the prompt's tokens as they are; where a token would span the border,
    the continuation is read by itself, so that what is learned and what is asked for agree.

    Args:
        encoder: of the model.
        prompt, continuation: texts.
        end: put the end-of-sequence token behind it, if the tokenizer has one.
    """
    asked = encoder.encode(prompt)
    whole = encoder.encode(prompt + continuation)
    joined = whole[: len(asked)] == asked
    following = (
        whole[len(asked) :] if joined else encoder.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    )
    stop = encoder.tokenizer.eos_token_id
    return Encoded(asked, [*following, stop] if end and stop is not None else list(following))


def completion_features(encoder: OpenPromptEncoder, examples: Sequence[Completion]) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each example."""
    encoded = [encode_pair(encoder, example.prompt, example.completion, end=True) for example in examples]
    return [{"input_ids": pair.ids, "labels": pair.labels} for pair in encoded]


def preference_features(encoder: OpenPromptEncoder, examples: Sequence[Preference]) -> list[dict[str, Any]]:
    """For each example ``chosen`` and ``rejected``, each with ``input_ids`` and ``labels``."""
    features = []
    for example in examples:
        pairs = [encode_pair(encoder, example.prompt, text, end=True) for text in (example.chosen, example.rejected)]
        chosen, rejected = ({"input_ids": pair.ids, "labels": pair.labels} for pair in pairs)
        features.append({"chosen": chosen, "rejected": rejected})
    return features


def padded(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, longest)``, int64, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", pad), "attention_mask": mask, "labels": filled("labels", IGNORED)}


@dataclass(frozen=True)
class CompletionCollator:
    """Batches of `completion_features`."""

    pad: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(features, self.pad)


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches of `preference_features`: all chosen rows, then all rejected ones; ``reference`` (2 * batch,) where the
    features have the reference's log-probabilities."""

    pad: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded([feature[side] for side in ("chosen", "rejected") for feature in features], self.pad)
        if "reference" in features[0]:
            reference = [feature["reference"][side] for side in (0, 1) for feature in features]
            batch["reference"] = torch.tensor(reference)
        return batch


def sequence_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over a row's labels of their log-probabilities, in float32.

    Args:
        logits: ``(rows, length, vocabulary)``.
        labels: ``(rows, length)``; -100 is left out.

    Returns:
        ``(rows,)``.
    """
    following = labels[:, 1:]
    learned = following != IGNORED
    scores = logits[:, :-1].float()
    chosen = scores.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((chosen - scores.logsumexp(-1)) * learned).sum(-1)


def pad_token(tokenizer: Any) -> int:
    """The tokenizer's padding token, or another one: padded positions are masked and never learned."""
    return next(int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
