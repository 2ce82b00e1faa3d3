"""The study of interventions on testbed-vlm: what it chooses, and what it says of what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

import attn_hooks
from testbed.vlm.truth import (
    STUDIES,
    choose,
    joined,
    label,
    one_row_a_line,
    paired,
    refuse_another_run,
    render,
    verdict,
)

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "testbed-vlm-h200.json"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(attn_hooks.testbed_path("testbed-vlm"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.method)
def test_every_setting_of_the_grid_fits_the_model(study: Any, model: Any) -> None:
    grid = study.grid()
    assert len({label(settings) for settings in grid}) == len(grid) >= 3
    for settings in [dict(study.base), *grid]:
        needed = {"dims": (0,)} if study.method == "var" else {}
        attn_hooks.explain(model, attn_hooks.build_edit({"method": study.method, **settings, **needed}))


def figures(accuracy: float, chair_s: float, recall: float, f1: float) -> dict[str, float]:
    return {
        "pope/all/accuracy": accuracy, "chair/all/chair_s": chair_s, "chair/all/recall": recall, "chair/all/f1": f1
    }  # fmt: skip


def test_shorter_captions_are_not_chosen_for_having_fewer_errors() -> None:
    unedited = figures(0.8, 0.3, 0.9, 0.9)
    tuned = [
        ({"a": 1}, figures(0.7, 0.05, 0.4, 0.5)),
        ({"a": 2}, figures(0.9, 0.25, 0.885, 0.9)),
        ({"a": 3}, figures(0.85, 0.2, 0.89, 0.91)),
    ]
    assert choose(tuned, unedited) == {"pope": {"a": 2}, "chair": {"a": 3}}
    # None keeps the recall: the best of both, F1.
    assert choose([*tuned[:1], ({"a": 4}, figures(0.6, 0.1, 0.5, 0.6))], unedited)["chair"] == {"a": 4}
    # Captions that name nothing have no F1.
    silent = {name: value for name, value in tuned[0][1].items() if name != "chair/all/f1"}
    assert choose([({"a": 5}, silent), tuned[0]], unedited)["chair"] == {"a": 1}


def metric(difference: float | None, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"difference": difference, "interval": interval}


@pytest.mark.parametrize(
    ("wrong", "recall", "said"),
    [
        ((-0.2, -0.1), (-0.01, 0.01), "fewer captions make objects up"),
        ((-0.2, -0.1), (-0.3, -0.2), "fewer captions make objects up, but fewer objects are named"),
        ((0.1, 0.2), (-0.3, -0.2), "more captions make objects up"),
        ((-0.1, 0.1), (-0.3, -0.2), "fewer objects are named"),
        ((-0.1, 0.1), (-0.1, 0.1), "captions the same"),
    ],
)
def test_a_verdict_says_what_the_intervals_say(wrong: Any, recall: Any, said: str) -> None:
    found = {
        "pope/all/accuracy": metric(0.1, (0.05, 0.15)),
        "chair/all/chair_s": metric(-0.1, wrong),
        "chair/all/recall": metric(0.0, recall),
    }
    assert verdict(found) == f"POPE better; {said}"


def test_a_file_keeps_other_methods_and_refuses_other_measurements(tmp_path: Path) -> None:
    meta = dict.fromkeys(("model", "dtype", "batch_size", "scenes", "seeds", "recall_kept"), 1)
    rows = [{"method": "pai", "x": 1}, {"method": "vcd", "x": 2}]
    first = {"meta": meta, "unedited": {}, "tune": rows, "test": rows, "errors": []}
    out = tmp_path / "out.json"
    assert joined(out, first) == first
    out.write_text(one_row_a_line(first), encoding="utf-8")
    assert json.loads(out.read_text(encoding="utf-8")) == first
    again = {**first, "tune": [{"method": "pai", "x": 3}], "test": [{"method": "pai", "x": 3}]}
    assert joined(out, again)["test"] == [{"method": "vcd", "x": 2}, {"method": "pai", "x": 3}]
    with pytest.raises(SystemExit, match="answers otherwise"):
        joined(out, {**first, "unedited": {"test": 2}})
    refuse_another_run(out, {"dtype": 1})
    with pytest.raises(SystemExit, match=r"in another way \(dtype 1 there and 2 here\)"):
        refuse_another_run(out, {"dtype": 2})
    refuse_another_run(tmp_path / "none.json", {"dtype": 2})


def test_a_chosen_setting_that_is_the_default_has_no_row_of_its_own() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    vcd = next(row for row in found["test"] if row["method"] == "vcd" and row["purpose"] == "default")
    again = {**vcd, "purpose": "chair", "settings": {"alpha": 1.0, "step": 500}}
    lines = render({**found, "test": [vcd, again]}).splitlines()
    assert len(lines) == 4
    assert "| defaults (default, chair) |" in lines[-1]


def test_figures_that_are_undefined_stay_so() -> None:
    entry = {"task": "chair", "length": "all", "metric": "precision", "baseline": 0.98765, "edited": None}
    found = paired([{**entry, "difference": None, "interval": None}])
    assert found == {"chair/all/precision": {"baseline": 0.9877, "edited": None, "difference": None, "interval": None}}


def test_the_committed_run_is_whole_and_is_what_the_docs_show() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert not found["errors"]
    assert {row["method"] for row in found["test"]} == {study.method for study in STUDIES}
    assert found["meta"]["scenes"]["test"] >= 500
    page = (RESULTS.parents[2] / "docs" / "testbed.md").read_text(encoding="utf-8")
    assert render(found) in page
