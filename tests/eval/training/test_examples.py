"""Files of prompts and completions, and of preferences: what is read, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.training.examples import (
    Completion,
    Preference,
    completions_of,
    drawn,
    preferences_of,
    read_rows_of,
)


def test_completions_with_named_columns_and_further_answers() -> None:
    rows = [{"id": "a", "q": "2 + 2 =", "a": " 4", "all": ["4", "four"]}]
    names = {"prompt": "q", "completion": "a", "answers": "all"}
    assert completions_of(rows, "f", names) == [Completion("a", "2 + 2 =", " 4", ("4", "four"))]
    assert completions_of([{"prompt": "p", "completion": " c"}], "f", {}) == [Completion("1", "p", " c", (" c",))]


def test_preferences() -> None:
    rows = [{"prompt": "p", "good": "g", "rejected": "r"}]
    assert preferences_of(rows, "f", {"chosen": "good"}) == [Preference("1", "p", "g", "r")]


@pytest.mark.parametrize("listed", [True, False])
def test_a_json_list_and_json_lines_are_the_same(listed: bool, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
    path = tmp_path / ("rows.json" if listed else "rows.jsonl")
    path.write_text(json.dumps(rows) if listed else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_rows_of(str(path)) == rows


def test_a_folder_is_read_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    assert read_rows_of(str(tmp_path), "train") == [{"prompt": "p", "completion": "c"}]
    with pytest.raises(EvaluationError, match="name its split too"):
        read_rows_of(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([], {}, "f holds no example: the set is empty"),
        ([{"promt": "p", "completion": "c"}], {}, "f, entry 1, has no column 'prompt'; did you mean 'promt'"),
        ([{"prompt": "p", "completion": 3}], {}, "f, entry 1: 'completion' must be a text, given 3"),
        ([{"prompt": "", "completion": "c"}], {}, "f, entry 1: 'prompt' must be a text, given ''"),
        (
            [{"prompt": "p", "completion": "c", "all": "c"}],
            {"answers": "all"},
            "'all' must be a list of texts, given 'c'",
        ),
    ],
)
def test_rows_that_are_no_completions(rows: list[Any], names: dict[str, str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        completions_of(rows, "f", names)


def test_a_preference_without_its_rejected_answer() -> None:
    with pytest.raises(EvaluationError, match="f, entry 1, has no column 'rejected'"):
        preferences_of([{"prompt": "p", "chosen": "c"}], "f", {})


def test_examples_are_drawn_as_the_published_code_draws_them() -> None:
    # random.seed(42); random.sample(range(3151), 3)
    assert drawn(range(3151), 3, 42) == [2619, 456, 102]
    assert drawn([1, 2], None, 42) == [1, 2]
    with pytest.raises(EvaluationError, match="3 training examples are asked for, and the set has 2"):
        drawn([1, 2], 3, 42)
