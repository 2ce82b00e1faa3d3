"""The comparison's table, counted by hand, and a run of it that is gone on with."""

from __future__ import annotations

import json
import operator
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import lofit_truth
from bench.lofit_truth import (
    BASE,
    GRIDS,
    OTHER,
    SELECTED,
    SELECTIONS,
    Job,
    Settings,
    Study,
    chosen_setting,
    rows_of,
    table_of,
)


def test_rows_are_means_over_seeds_and_paired_differences() -> None:
    done = {
        Job(0, BASE).key: {"scores": [0.0, 0.0, 1.0, 0.0], "trained_numbers": 0, "steps": 0},
        Job(1, BASE).key: {"scores": [0.0, 1.0, 0.0, 1.0], "trained_numbers": 0, "steps": 0},
        Job(0, "red", (0.1, 0)).key: {"scores": [1.0, 0.0, 1.0, 1.0], "trained_numbers": 128, "steps": 3},
        Job(1, "red", (0.1, 0)).key: {"scores": [0.0, 1.0, 1.0, 1.0], "trained_numbers": 128, "steps": 3},
        Job(0, "lora 1", (0.01, 0)).key: {"scores": [1.0, 1.0, 1.0, 1.0], "trained_numbers": 10240, "steps": 3},
    }
    base, red = rows_of(done, [0, 1], {BASE: (0.0, 0), "red": (0.1, 0), "lora 1": (0.01, 0)})
    assert base["accuracy"] == pytest.approx((0.25 + 0.5) / 2)
    assert red["by_seed"] == [0.75, 0.75]
    assert red["difference"] == pytest.approx(0.375)
    low, high = red["interval"]
    assert 0.0 <= low < 0.375 < high <= 1.0
    assert "| red | 0.1 | 128 | 3 | 75.0 | 75.0, 75.0 | +37.5 |" in table_of([base, red])


def test_the_setting_is_the_best_of_the_tuning_seed() -> None:
    low, middle = GRIDS["red"][:2]
    done = {Job(7, "red", setting).key: {"scores": [0.0, 1.0]} for setting in GRIDS["red"]}
    done[Job(7, "red", middle).key] = {"scores": [1.0, 1.0]}
    assert chosen_setting(done, "red", 7) == middle
    done[Job(7, "red", middle).key] = {"scores": [0.0, 0.0]}
    assert chosen_setting(done, "red", 7) == low
    del done[Job(7, "red", middle).key]
    assert chosen_setting(done, "red", 7) is None


def test_a_look_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "truth.json"
    sizes = ["--seeds", "0", "--train", "4", "--test", "2", "--epochs", "1", "--out", str(out)]
    monkeypatch.setattr(lofit_truth, "GRIDS", {BASE: ((0.0, 0),), "iti": ((5.0, 0),), "lora 1": ((1e-3, 0),)})
    monkeypatch.setattr(sys, "argv", ["lofit_truth", *sizes, "--arms", "lora 1; iti"])
    lofit_truth.main()
    shown = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == [BASE, "lora 1", "iti"]
    jobs = json.loads(out.read_text(encoding="utf-8"))["jobs"]
    assert len(jobs) == 2 * 3
    assert out.with_suffix(".png").stat().st_size > 0
    monkeypatch.setattr(lofit_truth, "run_job", lambda *_, **__: pytest.fail("run again"))
    lofit_truth.main()
    assert capsys.readouterr().out == shown
    monkeypatch.setattr(sys, "argv", ["lofit_truth", *sizes, "--arms", "lora 3"])
    with pytest.raises(SystemExit):
        lofit_truth.main()
    assert "no such arm: 'lora 3'" in capsys.readouterr().err


def test_out_of_time_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "truth.json"
    asked: list[Job] = []

    def answered(job: Job, settings: Settings, rankings: dict[str, list[tuple[int, int]]]) -> dict[str, Any]:
        asked.append(job)
        if job.arm is None:
            return {"heads": [(job.setting[1], 0), (1, 1)]}
        if job.arm in (SELECTED, OTHER):
            task = "two_hop" if job.arm == SELECTED else "kinship"
            assert rankings[Job(job.seed, None, job.setting, task).key] == [(job.setting[1], 0), (1, 1)]
        best = job.setting == (3e-2, 2)
        return {"scores": [float(best)] * settings.test, "trained_numbers": 64, "steps": 1}

    monkeypatch.setattr(lofit_truth, "run_job", answered)
    command = ["lofit_truth", "--arms", f"{SELECTED}; {OTHER}", "--out", str(out), "--test", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--budget-seconds", "0"])
    lofit_truth.main()
    assert asked == []
    assert f"out of time for base, {SELECTED}, {OTHER}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", command)
    lofit_truth.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["arm"], row["accuracy"], row.get("selection")) for row in rows] == [
        (BASE, 0.0, None),
        (SELECTED, 1.0, list(SELECTIONS[2])),
        (OTHER, 1.0, list(SELECTIONS[2])),
    ]
    assert "stage 1: 0.03, L1 0.0005" in capsys.readouterr().out
    assert len(asked) == len(set(asked)) == 2 * 4 + (1 + 2 * 16) + 3 * 2 + 3 * 3


def test_processes_begin_nothing_when_the_time_is_out(tmp_path: Path) -> None:
    class OutAfterTheFirst:
        asked = 0

        @property
        def left(self) -> float:
            self.asked += 1
            return 1.0 if self.asked == 1 else 0.0

    budget: Any = OutAfterTheFirst()
    settings = Settings(train=1, test=1, epochs=1, heads=1, tuning_seed=100, device="cpu")
    study = Study(settings, tmp_path / "truth.json", 2, budget, {})
    jobs = [Job(seed, BASE) for seed in range(1000)]
    work: Any = operator.attrgetter("seed")
    found = list(study._results(work, jobs))
    assert 0 < len(found) < len(jobs)
    assert all(seed == job.seed for job, seed in found)
