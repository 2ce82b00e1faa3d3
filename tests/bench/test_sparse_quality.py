"""bench.sparse_quality: its settings fit, its rows are the answers' and its front holds what nothing beats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import attn_hooks
from attn_eval.errors import EvaluationError
from attn_eval.tasks import build_task
from attn_hooks.recall import recall_of
from bench import sparse_quality
from bench.sparse_quality import BUDGETS, DENSE, METHODS, TASKS, pareto, quality_table, rows_of, settings_of


def test_settings_fit_the_model_and_budgets_grow() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(attn_hooks.testbed_path())
    settings = settings_of(METHODS)
    assert len({setting.name for setting in settings}) == len(settings) == 3 * len(METHODS)
    ids = torch.randint(3, 4000, (1, 1500))
    measured = recall_of(model, [setting.edit for setting in settings], rows=16, input_ids=ids)
    densities = [measured.of(number).total().density for number in range(len(settings))]
    for first in range(0, len(settings), 3):
        assert [setting.budget for setting in settings[first : first + 3]] == list(BUDGETS)
        assert densities[first : first + 3] == sorted(densities[first : first + 3]), settings[first].method
    for label, about in TASKS.items():
        assert build_task({**about, "label": label, "lengths": [2048]}).name == label
    with pytest.raises(EvaluationError, match="no budgets for act"):
        settings_of(["act"])


def sample(label: str, length: int, dense: float, edited: float) -> dict[str, Any]:
    return {"label": label, "length": length, "baseline": {"score": dense}, "edited": {"score": edited}}


def test_accuracy_weighs_tasks_alike_and_lengths_stand_apart() -> None:
    (setting, *_) = settings_of(["streaming"])
    samples = [sample("a", 512, 1, 1), sample("a", 512, 1, 1), sample("a", 512, 1, 0), sample("a", 512, 1, 0)]
    samples += [sample("b", 512, 1, 1), sample("b", 512, 0, 1), sample("a", 1024, 0.5, 0.25)]
    kept = {(setting.name, length): {"density": 0.1, "recall": 0.9} for length in (512, 1024)}
    short, long = rows_of(setting, {"samples": samples}, kept)
    assert (short["length"], long["length"]) == (512, 1024)
    assert short["by_task"] == {"a": 0.5, "b": 1.0}
    assert short["accuracy"] == 0.75
    assert short["difference"] == pytest.approx(0.75 - (1 + 0.5) / 2)
    assert (short["right_to_wrong"], short["wrong_to_right"]) == (2, 1)
    assert short["density"] == 0.1
    assert long["accuracy"] == 0.25
    assert long["interval"] is None


def row(density: float, accuracy: float, method: str = "m", **other: Any) -> dict[str, Any]:
    measures = {"recall": 1.0, "recall_p5": 1.0, "recall_last": 1.0, "output_error": 0.0, "length": 512}
    return {"method": method, "edit": method, "density": density, "accuracy": accuracy, **measures, **other}


def test_the_front_holds_what_nothing_beats() -> None:
    rows = [row(1.0, 1.0), row(0.5, 1.0), row(0.4, 0.7), row(0.45, 0.7), row(0.2, 0.7), row(0.1, 0.2), row(0.15, 0.1)]
    assert [(one["density"], one["accuracy"]) for one in pareto(rows)] == [(0.1, 0.2), (0.2, 0.7), (0.5, 1.0)]
    twins = [row(0.5, 1.0), row(0.5, 1.0)]
    assert len(pareto(twins)) == 2
    told = {"difference": -0.3, "interval": [-0.4, -0.2], "right_to_wrong": 3, "wrong_to_right": 0}
    table = quality_table([row(1.0, 1.0, DENSE), row(0.2, 0.7, **told), row(0.9, 0.5, "worse", **told)])
    assert "| **100.0** |" in table
    assert "| **70.0** | -30.0 (-40.0 to -20.0) | 3/0 |" in table
    assert "| 50.0 | -30.0" in table


def test_a_study_goes_on_and_keeps_other_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "out.json"
    asked: list[str] = []
    answers = sparse_quality.Study.answers

    def counted(study: Any, setting: Any) -> Any:
        asked.append(setting.name)
        return answers(study, setting)

    monkeypatch.setattr(sparse_quality.Study, "answers", counted)

    def call(*arguments: str) -> None:
        given = ("--lengths", "300", "--tasks", "passkey", "--work", str(tmp_path / "work"), "--out", str(out))
        monkeypatch.setattr(sys, "argv", ["sparse_quality", *given, *arguments])
        sparse_quality.main()

    call("--samples", "2", "--methods", "streaming")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert asked == [DENSE, "streaming-small", "streaming-middle", "streaming-large"]
    assert [one["method"] for one in found["rows"]] == [DENSE, *["streaming"] * 3]
    # A window of 512 sees all of 300 tokens.
    assert all(one["density"] == one["recall"] == 1.0 and one["difference"] == 0 for one in found["rows"][1:])
    assert found["meta"]["seed"] == sparse_quality.SEED
    assert found["meta"]["samples"] == 2
    assert found["meta"]["torch"] == torch.__version__
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n| 300 |") == 4
    call("--samples", "2", "--methods", "power")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [one["method"] for one in found["rows"]] == ["streaming"] * 3 + [DENSE] + ["power"] * 3
    with pytest.raises(SystemExit, match="rows of other samples"):
        call("--samples", "3", "--methods", "power")
    call("--table", str(out))
    assert capsys.readouterr().out.count("\n| 300 |") >= 7
