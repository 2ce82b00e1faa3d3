"""bench.lofit: every arm is measured, and the model is the base again after each."""

from __future__ import annotations

import sys

import pytest

from bench import lofit


def test_a_smoke_run_measures_all_arms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lofit", "--smoke"])
    lofit.main()
    table = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [table.count(name) for name in lofit.adapters(2, 4)] == [2, 2, 2, 2]
    assert {"base", "edit", "merged", "PEFT adapter"} <= set(table)


def test_heads_are_3_percent_in_different_layers() -> None:
    heads = lofit.spread_heads(32, 32)
    assert len(heads) == len(set(heads)) == 31
    assert len({layer for layer, _ in heads}) == 31


def test_ratios_above_the_goal_are_bold() -> None:
    row = {"phase": "train", "arm": "lofit", "checkpointing": False, "step_ms": 9.5, "step_ratio": 0.95}
    assert "**0.95**" in lofit.tables([row])
    assert "**" not in lofit.tables([row | {"step_ratio": 0.85}])
