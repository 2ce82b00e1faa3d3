"""One question to a model, how a set of them is written to a file, and the hash that names the set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from attn_eval.errors import EvaluationError


@dataclass(frozen=True)
class Row:
    """One generated question with its answers.

    Attributes:
        id: unique in a run: ``label-length[-depth]-index``.
        task: the registry's name of the task, e.g. ``niah_single_1``.
        length_target: tokens asked for, the new tokens included.
        length_actual: tokens of the prompt with its answer prefix, plus ``new_tokens``; never above the target.
        depth: where the (first) answer stands, in percent of the context, 0 to 100; None where a task has no place.
        answer_positions: 0-based token indices in the prompt at which the answers begin, for an analysis of what
            attention a method keeps on them; empty where the answer is spread over the text.
        input: the prompt without the answer prefix.
        answer_prefix: what the answer begins with; the model goes on from here.
        outputs: the reference answers.
        new_tokens: how many tokens the model may write.
    """

    id: str
    task: str
    length_target: int
    length_actual: int
    depth: float | None
    answer_positions: tuple[int, ...]
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    new_tokens: int

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the form that is hashed and stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The inverse of `to_json`."""
        fields = json.loads(line)
        for name in ("answer_positions", "outputs"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


def data_sha256(lines: Iterable[str]) -> str:
    """The sha256 of a data set given as its JSON lines, in order. Two runs with one hash saw the same data."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8"))
        digest.update(b"\n")
    return digest.hexdigest()


class Sample(Protocol):
    """What has a form to hash and to store."""

    def to_json(self) -> str: ...


def write_rows(rows: Sequence[Sample], path: Path) -> None:
    """Write rows as JSON lines, so that data made once can be scored, or given to another harness, later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        EvaluationError: the file is missing, or a line is no row; the message names the line.
    """
    if not path.is_file():
        raise EvaluationError(f"no file of rows at {path}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(f"{path}, line {number}, is no row of a task: {error}") from error
    return rows
