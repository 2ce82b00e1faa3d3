"""The comparison's table, counted by hand, and a run of it that is gone on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import lofit_truth
from bench.lofit_truth import BASE, GRIDS, Job, chosen_setting, rows_of, table_of


def test_rows_are_means_over_seeds_and_paired_differences() -> None:
    done = {
        Job(0, BASE).key: {"scores": [0.0, 0.0, 1.0, 0.0], "trained_numbers": 0},
        Job(1, BASE).key: {"scores": [0.0, 1.0, 0.0, 1.0], "trained_numbers": 0},
        Job(0, "red", 0.1).key: {"scores": [1.0, 0.0, 1.0, 1.0], "trained_numbers": 128},
        Job(1, "red", 0.1).key: {"scores": [0.0, 1.0, 1.0, 1.0], "trained_numbers": 128},
        Job(0, "lora 1", 0.01).key: {"scores": [1.0, 1.0, 1.0, 1.0], "trained_numbers": 10240},
    }
    base, red = rows_of(done, [0, 1], {BASE: 0.0, "red": 0.1, "lora 1": 0.01})
    assert base["accuracy"] == pytest.approx((0.25 + 0.5) / 2)
    assert red["by_seed"] == [0.75, 0.75]
    assert red["difference"] == pytest.approx(0.375)
    low, high = red["interval"]
    assert 0.0 <= low < 0.375 < high <= 1.0
    assert "| red | 0.1 | 128 | 75.0 | 75.0, 75.0 | +37.5 |" in table_of([base, red])


def test_the_setting_is_the_best_of_the_tuning_seed() -> None:
    low, middle = GRIDS["red"][:2]
    done = {Job(7, "red", setting).key: {"scores": [0.0, 1.0]} for setting in GRIDS["red"]}
    done[Job(7, "red", middle).key] = {"scores": [1.0, 1.0]}
    assert chosen_setting(done, "red", 7) == middle
    done[Job(7, "red", middle).key] = {"scores": [0.0, 0.0]}
    assert chosen_setting(done, "red", 7) == low


def test_a_look_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "truth.json"
    sizes = ["--seeds", "0", "--train", "4", "--test", "2", "--epochs", "1", "--out", str(out)]
    monkeypatch.setattr(lofit_truth, "GRIDS", {BASE: (0.0,), "iti": (5.0,), "lora 1": (1e-3,)})
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
