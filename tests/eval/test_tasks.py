"""Each task: lengths, determinism, answers that stand where the row says, an oracle's 1 and a babbler's 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.prompting import LengthError, PromptEncoder
from attn_eval.rows import Row, data_sha256, read_rows, write_rows
from attn_eval.tasks import GenerationTask, build_task, task_class, task_names
from tests.eval import oracles

LENGTHS = {"common_words": 3000, "variable_tracking": 4096}
DEFAULT_LENGTH = 2048
GENERATION_TASKS = [name for name in task_names() if issubclass(task_class(name), GenerationTask)]
WITH_A_TEXT = {"needle_grid", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
SNAPSHOTS = Path(__file__).parent / "snapshots"


def make_task(name: str, haystack_file: str, **parameters: Any) -> GenerationTask:
    settings: dict[str, Any] = {"task": name, "lengths": [LENGTHS.get(name, DEFAULT_LENGTH)], **parameters}
    if name in WITH_A_TEXT:
        settings.setdefault("source", haystack_file)
    if name == "variable_tracking":
        settings.setdefault("example_tokens", 1600)
    if name == "needle_grid":
        settings.setdefault("depths", [0, 50, 100])
    task = build_task(settings)
    assert isinstance(task, GenerationTask)
    return task


def make_rows(task: GenerationTask, tokenizer: Any, samples: int = 3, seed: int = 42) -> list[Row]:
    return task.generate(tokenizer, task.lengths[0], samples, seed)


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_a_reader_of_the_prompt_scores_one_and_a_babbler_zero(name: str, haystack_file: str, tokenizer: Any) -> None:
    task = make_task(name, haystack_file)
    for row in make_rows(task, tokenizer):
        assert task.score(row, oracles.oracle(row)) == 1.0
        for babble in ("", "\x00\n", "I could not find it.", "0", "the the the"):
            assert task.score(row, babble) == 0.0


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_rows_fill_the_length_and_never_pass_it(name: str, haystack_file: str, tokenizer: Any) -> None:
    task = make_task(name, haystack_file)
    # A unit is at most a line of noise or needle, or a word of the aggregation tasks with all its repetitions.
    slack = {"common_words": 200, "frequent_words": 600}.get(name, 130)
    for row in make_rows(task, tokenizer):
        counted = PromptEncoder(tokenizer).count(row.input, row.answer_prefix) + row.new_tokens
        assert row.length_actual == counted
        assert row.length_target - slack <= row.length_actual <= row.length_target


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_a_sample_is_the_same_for_any_number_of_samples(name: str, haystack_file: str, tokenizer: Any) -> None:
    task = make_task(name, haystack_file)
    many = {row.id: row for row in make_rows(task, tokenizer, samples=3)}
    for row in make_rows(task, tokenizer, samples=1):
        assert row == many[row.id]
    assert make_rows(task, tokenizer, seed=1) != make_rows(task, tokenizer, seed=2)


# The answers of the others are spread over the whole list.
@pytest.mark.parametrize("name", [name for name in GENERATION_TASKS if name not in ("common_words", "frequent_words")])
def test_answer_positions_point_at_the_answers(name: str, haystack_file: str, tokenizer: Any) -> None:
    for row in make_rows(make_task(name, haystack_file), tokenizer):
        ids = PromptEncoder(tokenizer).encode(row.input, row.answer_prefix)
        assert len(row.answer_positions) == len(row.outputs)
        for position, output in zip(row.answer_positions, row.outputs, strict=True):
            assert tokenizer.decode(ids[position : position + len(output)]) == output


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_a_length_that_is_too_short_names_the_shortest_feasible(name: str, haystack_file: str, tokenizer: Any) -> None:
    task = make_task(name, haystack_file)
    with pytest.raises(LengthError, match=r"shortest feasible length is (\d+)") as caught:
        task.generate(tokenizer, 160, 1, 0)
    shortest = int(str(caught.value).rsplit(" ", 1)[1])
    assert task.generate(tokenizer, shortest + 200, 1, 0)


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_the_prompt_is_the_frozen_one(name: str, haystack_file: str, tokenizer: Any) -> None:
    """A prompt that changes raises its task's version and says why; then delete the file to have it written anew."""
    task = make_task(name, haystack_file)
    row = make_rows(task, tokenizer, samples=1)[0]
    text = f"version {task.version}\noutputs {' | '.join(row.outputs)}\n---\n{row.input}{row.answer_prefix}\n"
    path = SNAPSHOTS / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} did not exist and was written: look at it and commit it")
    assert path.read_text(encoding="utf-8") == text


def test_grid_puts_the_needle_at_the_end_of_a_sentence(haystack_file: str, tokenizer: Any) -> None:
    task = make_task("needle_grid", haystack_file, depths=[0, 30, 60, 100])
    for row in make_rows(task, tokenizer, samples=1):
        context = row.input.split("\n", 1)[1].rsplit("\n", 1)[0]
        before, after = context.split("One of the special magic numbers")
        measured = 100 * len(before) / (len(before) + len(after.split(". ", 1)[-1]))
        assert row.depth is not None
        if row.depth == 0:
            assert before == ""
        elif row.depth == 100:
            assert after.endswith(f"is: {row.outputs[0]}.")
        else:
            assert before.endswith(". ")
        assert row.depth - 6 <= measured <= row.depth + 1


def test_variable_tracking_with_fewer_hops_and_no_example(haystack_file: str, tokenizer: Any) -> None:
    task = make_task("variable_tracking", haystack_file, hops=2, example_tokens=0)
    row = make_rows(task, tokenizer, samples=1)[0]
    assert len(row.outputs) == 3
    assert row.input.count("VAR ") == 5
    assert row.answer_prefix.startswith(" The 3 variables that hold the value ")
    assert task.score(row, " ".join(row.outputs[:2])) == pytest.approx(2 / 3)


def test_multikey_takes_more_keys(haystack_file: str, tokenizer: Any) -> None:
    row = make_rows(make_task("niah_multikey_1", haystack_file, keys=8), tokenizer, samples=1)[0]
    assert row.input.count("One of the special magic numbers for") == 8
    assert len(row.outputs) == 1


def test_frequent_words_have_no_tie_at_the_answer(haystack_file: str, tokenizer: Any) -> None:
    for length in (1024, 1500, 2048, 3000):
        task = make_task("frequent_words", haystack_file, lengths=[length])
        for row in task.generate(tokenizer, length, 2, 7):
            words = row.input.split("\n")[1].split(" ")
            counts = sorted((words.count(word) for word in set(words) - {"..."}), reverse=True)
            assert counts[2] > counts[3]
            assert sorted(words.count(word) for word in row.outputs) == sorted(counts[:3])


def test_parameters_that_can_not_be_are_refused() -> None:
    with pytest.raises(EvaluationError, match="did you mean 'niah_single_1'"):
        build_task({"task": "niah_singel_1", "lengths": [100]})
    with pytest.raises(EvaluationError, match="every task needs its name"):
        build_task({"lengths": [100]})
    with pytest.raises(ValueError, match="queries"):
        build_task({"task": "niah_multiquery", "lengths": [100], "queries": 5})


def test_rows_survive_the_file(haystack_file: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = make_rows(make_task("niah_multivalue", haystack_file), tokenizer)
    path = tmp_path / "rows.jsonl"
    write_rows(rows, path)
    assert read_rows(path) == rows
    assert data_sha256(row.to_json() for row in read_rows(path)) == data_sha256(row.to_json() for row in rows)
    path.write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(EvaluationError, match="line 1"):
        read_rows(path)
    with pytest.raises(EvaluationError, match="no file of rows"):
        read_rows(tmp_path / "absent.jsonl")
