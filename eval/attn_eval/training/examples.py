"""What a model is trained on and measured with: prompts with a completion, with a preferred one, with choices."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from attn_eval.errors import EvaluationError, nearest
from attn_eval.tasks.images import read_dataset, read_records

Drawn = TypeVar("Drawn")

SPLITS = ("train", "validation", "test")
# Of ten parts of all texts there can be.
PARTS_OF_SPLIT = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}


@dataclass(frozen=True)
class Completion:
    """A prompt with its continuation.

    Attributes:
        id: unique in its data set.
        prompt: given to the model.
        completion: follows the prompt as it stands, with its leading space or newline, if any.
        answers: what counts as right; compared without case and outer spaces.
    """

    id: str
    prompt: str
    completion: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Preference:
    """A prompt with the continuation that is wanted and one that is not."""

    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Choices:
    """A question with its true and its false answers; MC1 and MC2 are measured with it.

    Attributes:
        best: the index in ``correct`` of the answer that MC1 asks for.
    """

    id: str
    question: str
    best: int
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


@dataclass(frozen=True)
class DataSplits:
    """Training and validation examples of one kind; test examples of that kind, or questions with choices.

    Attributes:
        source: where they come from, for the results.
        stop: what ends an answer: the model's text is read up to it.
    """

    train: Sequence[Completion] | Sequence[Preference]
    validation: Sequence[Completion] | Sequence[Preference]
    test: Sequence[Completion] | Sequence[Preference] | Sequence[Choices]
    source: str
    stop: str = "\n"

    def limited(self, count: int) -> DataSplits:
        """The first ``count`` of each part."""
        return replace(self, train=self.train[:count], validation=self.validation[:count], test=self.test[:count])


def completions_of(records: Sequence[dict[str, Any]], where: str, names: dict[str, str]) -> list[Completion]:
    """Rows of prompt and completion.

    Args:
        records: as read.
        where: names the file in an error.
        names: the columns that stand for ``prompt`` and ``completion`` and, where there are more right answers than
            the completion, ``answers``, a list.

    Raises:
        EvaluationError: there is no row, one lacks a column or holds no text there.
    """
    prompt, completion = names.get("prompt", "prompt"), names.get("completion", "completion")
    answers = names.get("answers")
    need_columns(records, where, [prompt, completion, *([answers] if answers else [])])
    examples = []
    for number, record in enumerate(records, start=1):
        text = [_text(record, column, where, number) for column in (prompt, completion)]
        given = record[answers] if answers else [text[1]]
        if not isinstance(given, list | tuple) or not given or not all(isinstance(answer, str) for answer in given):
            raise EvaluationError(f"{where}, entry {number}: {answers!r} must be a list of texts, given {given!r}")
        examples.append(Completion(str(record.get("id", number)), text[0], text[1], tuple(given)))
    return examples


def preferences_of(records: Sequence[dict[str, Any]], where: str, names: dict[str, str]) -> list[Preference]:
    """Rows of prompt, chosen and rejected; ``names`` gives their columns.

    Raises:
        EvaluationError: there is no row, or one lacks a column or holds no text there.
    """
    columns = [names.get(name, name) for name in ("prompt", "chosen", "rejected")]
    need_columns(records, where, columns)
    return [
        Preference(str(record.get("id", number)), *(_text(record, column, where, number) for column in columns))
        for number, record in enumerate(records, start=1)
    ]


def need_columns(records: Sequence[dict[str, Any]], where: str, columns: Sequence[str]) -> None:
    """Raises ``EvaluationError`` unless there are records and each has these columns."""
    if not records:
        raise EvaluationError(f"{where} holds no example: the set is empty")
    for number, record in enumerate(records, start=1):
        lacking = [column for column in columns if not isinstance(record, dict) or column not in record]
        if lacking:
            found = list(record) if isinstance(record, dict) else []
            raise EvaluationError(
                f"{where}, entry {number}, has no column {' and none '.join(map(repr, lacking))}; "
                f"{nearest(lacking[0], found)} Name it under data.columns"
            )


def read_rows_of(source: str, split: str | None = None, config: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file (JSON lines or one JSON list) or, through ``datasets``, of a data set of the hub or a folder.

    Args:
        source: a file that is there, otherwise what ``datasets.load_dataset`` takes.
        split, config: which part of a data set.

    Raises:
        EvaluationError: it can't be read, or a data set is given without its split.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in (".json", ".jsonl"):
        return read_records(path, "the data")
    if split is None:
        raise EvaluationError(f"{source!r} is no file here; for a data set of the hub name its split too: NAME:SPLIT")
    return [dict(row) for row in read_dataset(source, config, split)]


def drawn(examples: Sequence[Drawn], count: int | None, seed: int) -> list[Drawn]:
    """``count`` of the examples as LoFiT's code draws them: Python's ``sample`` on the seed; all in order for None.

    Raises:
        EvaluationError: there are not so many.
    """
    if count is None:
        return list(examples)
    if count > len(examples):
        raise EvaluationError(f"{count} training examples are asked for, and the set has {len(examples)}")
    return random.Random(seed).sample(list(examples), count)


def belongs_to(text: str, split: str) -> bool:
    """Whether a generated text is of that split: each text of one alone, whatever the sizes and the seed.

    Raises:
        EvaluationError: no such split.
    """
    if split not in SPLITS:
        raise EvaluationError(f"no split {split!r} of generated data; allowed: {', '.join(SPLITS)}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 in PARTS_OF_SPLIT[split]


def _text(record: dict[str, Any], column: str, where: str, number: int) -> str:
    value = record[column]
    if not isinstance(value, str) or not value:
        raise EvaluationError(f"{where}, entry {number}: {column!r} must be a text, given {value!r}")
    return value
