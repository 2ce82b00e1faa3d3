"""A whole run on a tiny model with the real engine: files, pairing, resume after a kill, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import attn_hooks
from attn_eval import generation, runner
from attn_eval.comparison import compare_results, left_out
from attn_eval.environment import describe_environment
from attn_eval.errors import EvaluationError
from attn_eval.generation import Answer, generate_answers, plan_batches
from attn_eval.prompting import PromptEncoder
from attn_eval.recipe import GenerationSettings, Recipe
from attn_eval.report import table_markdown
from attn_eval.rows import Row, read_rows
from attn_eval.run_log import RunLog, forget_run, load_results
from attn_eval.runner import run_recipe
from tests.eval import oracles

QUIET = Console(quiet=True)


@pytest.fixture
def recipe(model_folder: Path, haystack_file: str) -> Recipe:
    tasks: list[dict[str, Any]] = [
        {"task": "needle_grid", "lengths": [512, 768], "depths": [0, 100], "samples": 2, "source": haystack_file},
        {"task": "passkey", "lengths": [640], "samples": 3},
        {"task": "perplexity", "lengths": [256], "samples": 2, "source": haystack_file},
    ]
    tasks[0]["new_tokens"] = 6
    return Recipe(
        name="tiny/streaming",
        description="A run in seconds.",
        model=str(model_folder),
        dtype="float32",
        device="cpu",
        edits=({"method": "streaming", "sinks": 1, "window": 32},),
        tasks=tuple(tasks),
        batch_size=2,
    )


def with_answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """Replace the model's answers by ``answer(row, edited)``; returns the list that the asked ids go to."""
    asked: list[str] = []

    def answers(model: Any, encoder: Any, rows: list[Row], settings: Any, seed: int) -> list[Answer]:
        edited = bool(attn_hooks.edits_in_force(model))
        model(input_ids=torch.tensor([encoder.encode(rows[0].input)]))
        asked.extend(row.id for row in rows)
        return [Answer(answer(row, edited), 3, 0.1, 0.2) for row in rows]

    monkeypatch.setattr(runner, "generate_answers", answers)
    return asked


def test_a_run_writes_its_files_and_says_what_it_ran(recipe: Recipe, tmp_path: Path) -> None:
    results = run_recipe(recipe, tmp_path, console=QUIET, save_data=True)
    assert load_results(tmp_path) == json.loads(json.dumps(results))
    assert results["runs"] == ["baseline", "edited"]
    assert len(results["samples"]) == 8 + 3 + 2
    for sample in results["samples"]:
        assert {"baseline", "edited", "length", "task", "label"} <= set(sample)
    assert {report["task"] for report in results["edit_reports"]} == {"needle_grid", "passkey", "perplexity"}
    assert all(edit["calls"] for report in results["edit_reports"] for edit in report["report"]["edits"])
    assert results["environment"]["packages"]["torch"] == torch.__version__
    assert results["tasks"]["needle_grid"]["haystack"]["sha256"]
    nats = next(metric for metric in results["metrics"] if metric["metric"] == "nats_per_token")
    assert nats["difference"] != 0.0
    assert nats["interval"][0] <= nats["difference"] <= nats["interval"][1]
    assert (tmp_path / "heatmap_needle_grid.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_rows(tmp_path / "data" / "passkey.jsonl")) == 3
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "streaming(sinks=1, window=32)" in page
    assert page == table_markdown(results)


def test_an_oracle_scores_one_and_an_edit_that_breaks_it_is_seen(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_answers(monkeypatch, lambda row, edited: "" if edited and row.task == "passkey" else oracles.oracle(row))
    results = run_recipe(recipe, tmp_path, console=QUIET)
    scores = {(m["task"], m["length"]): m for m in results["metrics"] if m["metric"] == "score"}
    assert scores["needle_grid", "all"]["baseline"] == scores["needle_grid", "all"]["edited"] == 1.0
    broken = scores["passkey", 640]
    assert (broken["baseline"], broken["edited"], broken["right_to_wrong"], broken["mcnemar_p"]) == (1.0, 0.0, 3, 0.25)
    assert broken["interval"] == (-1.0, -1.0)
    assert scores["average", "all"]["difference"] == pytest.approx(-0.5)


def test_a_killed_run_goes_on_where_it_was(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(row: Row, edited: bool) -> str:
        if edited:
            raise KeyboardInterrupt
        return oracles.oracle(row)

    with_answers(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, console=QUIET)
    log = tmp_path / "samples.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 8
    # As if the kill had come in the middle of a line, and in the middle of a batch.
    log.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20], encoding="utf-8")

    asked = with_answers(monkeypatch, lambda row, edited: oracles.oracle(row))
    results = run_recipe(recipe, tmp_path, console=QUIET)
    assert len(asked) == 2 + 8 + 3 + 3
    assert results["timing"]["samples_of_earlier_calls"] == 7
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert len({(record["run"], record["id"]) for record in records}) == len(records) == 2 * (8 + 3 + 2)

    again = with_answers(monkeypatch, lambda row, edited: pytest.fail("everything is done"))
    assert run_recipe(recipe, tmp_path, console=QUIET)["metrics"] == results["metrics"]
    assert again == []


def test_another_recipe_is_not_mixed_into_a_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_answers(monkeypatch, lambda row, edited: oracles.oracle(row))
    run_recipe(recipe, tmp_path, console=QUIET)
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(EvaluationError, match="differs in its baseline recipe and data and recipe"):
        run_recipe(other, tmp_path, console=QUIET)
    with pytest.raises(EvaluationError, match="sample limit"):
        run_recipe(recipe, tmp_path, limit=1, console=QUIET)
    forget_run(tmp_path)
    run_recipe(other, tmp_path, console=QUIET)


def test_a_sweep_asks_the_baseline_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_answers(monkeypatch, lambda row, edited: oracles.oracle(row))
    whole = run_recipe(recipe, tmp_path / "whole", console=QUIET)
    run_recipe(recipe.model_copy(update={"edits": ()}), tmp_path / "none", console=QUIET)
    with_answers(monkeypatch, lambda row, edited: oracles.oracle(row) if edited else pytest.fail("asked again"))
    results = run_recipe(recipe, tmp_path / "edited", baseline=tmp_path / "none", console=QUIET)
    assert results["metrics"] == whole["metrics"]
    assert results["notes"] == [
        *whole["notes"],
        f"the answers without edits, and their times, are those of {tmp_path / 'none'}",
    ]

    made = json.loads((tmp_path / "none" / "results.json").read_text(encoding="utf-8"))
    made["environment"] |= {
        "gpu": "another",
        "packages": made["environment"]["packages"] | {"torch": "1.0", "nltk": "0"},
    }
    (tmp_path / "none" / "results.json").write_text(json.dumps(made), encoding="utf-8")
    elsewhere = run_recipe(recipe, tmp_path / "elsewhere", baseline=tmp_path / "none", console=QUIET)
    here = describe_environment()
    assert elsewhere["notes"][-1] == (
        f"{tmp_path / 'none'} was made elsewhere (gpu another and {here['gpu'] or 'none'}, "
        f"torch 1.0 and {here['packages']['torch']} here): differences are not the edits' alone"
    )
    (tmp_path / "none" / "results.json").unlink()
    unfinished = run_recipe(recipe, tmp_path / "unfinished", baseline=tmp_path / "none", console=QUIET)
    assert "is no finished run" in unfinished["notes"][-1]

    with pytest.raises(EvaluationError, match=r"no run.json .* give --baseline"):
        run_recipe(recipe, tmp_path / "other", baseline=tmp_path, console=QUIET)
    other = recipe.model_copy(update={"batch_size": recipe.batch_size + 1})
    with pytest.raises(EvaluationError, match="differs in its baseline recipe, so its baseline is not"):
        run_recipe(other, tmp_path / "third", baseline=tmp_path / "none", console=QUIET)
    assert not (tmp_path / "other").exists() and not (tmp_path / "third").exists()


def test_two_runs_are_compared_pair_by_pair_where_the_data_agree(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_answers(monkeypatch, lambda row, edited: oracles.oracle(row))
    first = run_recipe(recipe, tmp_path / "first", console=QUIET)
    with_answers(monkeypatch, lambda row, edited: "" if edited and row.id.endswith("-0") else oracles.oracle(row))
    narrow = recipe.model_copy(update={"edits": ({"method": "streaming", "sinks": 1, "window": 8},)})
    second = run_recipe(narrow, tmp_path / "second", console=QUIET)
    entries = {(e["task"], e["length"], e["metric"]): e for e in compare_results(first, second)}
    grid = entries["needle_grid", 512, "score"]
    assert grid["paired"] and (grid["samples"], grid["right_to_wrong"]) == (4, 2)
    assert entries["average", "all", "score"]["samples"] == 11
    assert entries["perplexity", 256, "nats_per_token"]["paired"]
    assert entries["perplexity", 256, "nats_per_token"]["interval"][0] != 0.0
    assert not entries["perplexity", 256, "perplexity"]["paired"]
    assert left_out(first, second) == []

    reseeded = run_recipe(recipe.model_copy(update={"seed": 1, "edits": ()}), tmp_path / "third", console=QUIET)
    entries = {(e["task"], e["length"], e["metric"]): e for e in compare_results(first, reseeded)}
    assert not entries["passkey", 640, "score"]["paired"]
    assert "passkey: the data differ, so no paired statistics" in left_out(first, reseeded)


def test_a_baseline_alone_is_a_run_too(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_answers(monkeypatch, lambda row, edited: oracles.oracle(row))
    results = run_recipe(recipe.model_copy(update={"edits": ()}), tmp_path, console=QUIET)
    assert results["runs"] == ["baseline"]
    assert results["edit_reports"] == []
    assert "edited" not in results["metrics"][0]


def test_an_edit_that_never_acts_is_said(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runner,
        "generate_answers",
        lambda model, encoder, rows, settings, seed: [Answer("", 0, 0.0, 0.0) for _ in rows],
    )
    passkey_only = recipe.model_copy(update={"tasks": recipe.tasks[1:2]})
    results = run_recipe(passkey_only, tmp_path, console=QUIET)
    assert results["notes"] == ["passkey: the edit streaming never acted, so both runs are the baseline"]


def test_an_edit_that_does_not_fit_the_model_stops_the_run_before_any_file(recipe: Recipe, tmp_path: Path) -> None:
    misfit = recipe.model_copy(update={"edits": ({"method": "streaming", "layers": [7]},)})
    with pytest.raises(attn_hooks.AttnHooksError, match="layer"):
        run_recipe(misfit, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_batches_do_not_change_greedy_answers(model: Any, tokenizer: Any) -> None:
    rows = [make_row(f"r{index}", "abc " * (index + 1), 5) for index in range(3)]
    encoder, settings = PromptEncoder(tokenizer), GenerationSettings()
    together = generate_answers(model, encoder, rows, settings, seed=0)
    alone = [generate_answers(model, encoder, [row], settings, seed=0)[0] for row in rows]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert all(answer.prefill_seconds > 0 for answer in together)


def test_the_models_own_sampling_defaults_do_not_colour_a_greedy_run(model: Any, tokenizer: Any, recwarn: Any) -> None:
    row, encoder = make_row("r", "abc", 4), PromptEncoder(tokenizer)
    plain = generate_answers(model, encoder, [row], GenerationSettings(), seed=0)
    before = model.generation_config
    try:
        model.generation_config = type(before)(
            **{**before.to_dict(), "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.5}
        )
        assert generate_answers(model, encoder, [row], GenerationSettings(), seed=0)[0].text == plain[0].text
    finally:
        model.generation_config = before


def test_sampling_is_seeded_by_the_rows(model: Any, tokenizer: Any) -> None:
    row, encoder = make_row("r", "abc", 12), PromptEncoder(tokenizer)
    settings = GenerationSettings(do_sample=True, temperature=1.5)
    texts = [generate_answers(model, encoder, [row], settings, seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_batches_hold_rows_of_one_kind_longest_first() -> None:
    rows = [make_row(f"r{index}", "x" * index, new_tokens) for index, new_tokens in enumerate([5, 9, 5, 9, 5])]
    batches = plan_batches(rows, 2)
    assert [[row.id for row in batch] for batch in batches] == [["r3", "r1"], ["r4", "r2"], ["r0"]]
    assert generation.plan_batches(list(reversed(rows)), 2) == batches


def make_row(name: str, text: str, new_tokens: int) -> Row:
    return Row(
        id=name,
        task="passkey",
        length_target=100,
        length_actual=len(text) + new_tokens,
        depth=None,
        answer_positions=(),
        input=text,
        answer_prefix="",
        outputs=("1",),
        new_tokens=new_tokens,
    )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(EvaluationError, match="can't be written"):
        RunLog(tmp_path / "file" / "results", {})
