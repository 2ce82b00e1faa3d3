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
    Ask,
    Place,
    Study,
    _one,
    _run,
    choose,
    joined,
    label,
    main,
    measure,
    one_row_a_line,
    paired,
    refuse_another_run,
    refuse_other_answers,
    render,
    verdict,
    with_beams,
)

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "testbed-vlm-h200.json"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(attn_hooks.testbed_path("testbed-vlm"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
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
    first = {"meta": meta, "unedited": {"test": {"a": 1}}, "tune": rows, "test": rows, "errors": []}
    out = tmp_path / "out.json"
    assert joined(out, first) == first
    out.write_text(one_row_a_line(first), encoding="utf-8")
    assert json.loads(out.read_text(encoding="utf-8")) == first
    again = {**first, "tune": [{"method": "pai", "x": 3}], "test": [{"method": "pai", "x": 3}]}
    assert joined(out, again)["test"] == [{"method": "vcd", "x": 2}, {"method": "pai", "x": 3}]
    beams = [{"method": "pai", "beams": 5}]
    with_five = {**again, "unedited": {"test": {"a": 1}, "test-beams-5": {"a": 2}}, "tune": beams, "test": beams}
    assert joined(out, with_five)["tune"] == [*rows, *beams]
    assert joined(out, with_five)["unedited"] == with_five["unedited"]
    with pytest.raises(SystemExit, match=r"answers otherwise \(test\)"):
        joined(out, {**first, "unedited": {"test": {"a": 2}}})
    refuse_another_run(out, {"dtype": 1})
    with pytest.raises(SystemExit, match=r"in another way \(dtype 1 there and 2 here\)"):
        refuse_another_run(out, {"dtype": 2})
    refuse_another_run(tmp_path / "none.json", {"dtype": 2})
    with pytest.raises(SystemExit, match="is a folder"):
        refuse_another_run(tmp_path, {"dtype": 2})
    with pytest.raises(SystemExit, match="can't be written"):
        refuse_another_run(out / "below a file.json", {"dtype": 2})
    refuse_other_answers(tmp_path / "none.json", {"test": {"a": 2}})
    for content, message in (("[]", "no file of this program"), ("{", "can't be read")):
        out.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            refuse_another_run(out, {"dtype": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "nowhere.json"], "there is no file nowhere.json"),
        (["run", "--model", "nowhere"], "holds no config.json"),
        (["run", "--methods", "opra"], "no study of opra"),
        (["run", "--scenes", "0"], "--scenes takes 1 to 250"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["truth", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def a_place(folder: Path) -> Place:
    return Place(Path(attn_hooks.testbed_path("testbed-vlm")), folder, "float32", 2, 2)


def test_beams_are_on_both_sides_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("attn_eval.run_recipe", lambda *given, **named: calls.append((given, named)) or {"metrics": []})
    for ask in (Ask(), Ask(beams=5), Ask("opera", {"alpha": 2.0}, 5), Ask("opera", {"alpha": 2.0})):
        measure(a_place(tmp_path), "tune", ask)
    assert [given[0].generation.num_beams for given, _ in calls] == [1, 5, 5, 1]
    folders = [given[1] for given, _ in calls]
    assert len(set(folders)) == 4
    assert [named["baseline"] for _, named in calls] == [None, None, folders[1], folders[0]]
    assert calls[2][0][0].edits == ({"method": "opera", "alpha": 2.0},)


def test_a_model_that_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    place = Place(Path(attn_hooks.testbed_path("testbed-lm")), tmp_path, "float32", 2, 2)
    said = _one(place, "tune", Ask())
    assert "Traceback" not in said and "images" in said

    def runs(split: str, asks: list[Ask]) -> list[Any]:
        return [None for _ in asks]

    runs.errors = [{"error": said}]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="testbed-lm can't be measured without edits"):
        _run(place, [Study("var", {})], runs, tmp_path / "out.json")  # type: ignore[arg-type]


def test_a_study_with_beams_is_tuned_and_shown_against_beams(tmp_path: Path) -> None:
    """A fake measurement in which beams alone cost recall: a setting is held to the recall that the model has with beams."""
    found = {"pope/all/accuracy": 0.9, "chair/all/f1": 0.9}
    by_alpha = {
        1.0: {"chair/all/chair_s": 0.3, "chair/all/recall": 0.8},
        10.0: {"chair/all/chair_s": 0.2, "chair/all/recall": 0.79},
    }
    asked: list[tuple[str, Ask]] = []

    def runs(split: str, asks: list[Ask]) -> list[Any]:
        asked.extend((split, ask) for ask in asks)
        metrics = []
        for ask in asks:
            plain = found | {"chair/all/chair_s": 0.4, "chair/all/recall": 0.8 if ask.beams == 5 else 0.95}
            edited = plain if ask.method is None else found | by_alpha[ask.settings.get("alpha", 1.0)]
            metrics.append([
                {"task": task, "length": part, "metric": name, "baseline": value, "edited": edited[f"{task}/{part}/{name}"],
                 "difference": 0.0, "interval": (0.0, 0.0)}
                for (task, part, name), value in ((key.split("/"), value) for key, value in plain.items())
            ])  # fmt: skip
        return metrics

    runs.errors = []  # type: ignore[attr-defined]
    study = Study("opera", {"alpha": (1.0, 10.0)}, beams=5)
    results = _run(a_place(tmp_path), [study], runs, tmp_path / "out.json")  # type: ignore[arg-type]
    assert set(results["unedited"]) == {"tune", "tune-beams-5", "test", "test-beams-5"}
    assert {ask.beams for _, ask in asked if ask.method} == {5}
    assert {row["purpose"]: row["settings"] for row in results["test"]} == {
        "default": {}, "pope": {"alpha": 1.0}, "chair": {"alpha": 10.0}
    }  # fmt: skip
    assert all(row["beams"] == 5 for part in ("tune", "test") for row in results[part])


def test_rows_with_beams_stand_behind_the_model_with_beams() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    (greedy,) = (row for row in found["test"] if row["method"] == "vcd" and row["purpose"] == "default")
    unedited = found["unedited"] | {"test-beams-5": found["unedited"]["test"] | {"chair/all/chair_s": 0.111}}
    lines = render({**found, "unedited": unedited, "test": [{**greedy, "beams": 5}, greedy]}).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" no edit ", " "], [" `vcd` ", " defaults (default) "],
        [" no edit ", " beams of 5 "], [" `vcd` ", " beams of 5; defaults (default) "],
    ]  # fmt: skip
    assert "| 11.1 |" in lines[4]


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
    measured = {with_beams(row["method"], row.get("beams", 1)) for row in found["test"]}
    assert measured == {study.name for study in STUDIES}
    assert found["meta"]["scenes"]["test"] >= 500
    page = (RESULTS.parents[2] / "docs" / "testbed.md").read_text(encoding="utf-8")
    assert render(found) in page
