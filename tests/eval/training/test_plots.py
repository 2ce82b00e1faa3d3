"""The command's plots, and what is said without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from attn_eval.errors import EvaluationError
from attn_eval.training.plots import draw_losses, draw_ranking


def test_a_higher_score_is_brighter_and_layers_may_differ_in_heads(tmp_path: Path) -> None:
    pictures = []
    for scores in ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)):
        path = tmp_path / "heads.png"
        draw_ranking([(0, 0, scores[0]), (0, 1, scores[1]), (2, 0, scores[2])], "heads", path)
        pictures.append(imread(path))
    assert pictures[0].shape == pictures[1].shape
    # Rows of pixels that differ: those of both layers, not those of the title and of the axes.
    differ = (pictures[0] != pictures[1]).any(axis=(1, 2))
    assert 0.2 < differ.mean() < 0.9


def test_both_losses_are_drawn(tmp_path: Path) -> None:
    log = [{"epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "eval_loss": 2.5}, {"epoch": 2.0, "loss": 1.0}, {"epoch": 2.0}]
    draw_losses(log, "losses", tmp_path / "both.png")
    draw_losses([entry for entry in log if "eval_loss" not in entry], "losses", tmp_path / "one.png")
    assert (imread(tmp_path / "both.png") != imread(tmp_path / "one.png")).any()


def test_without_matplotlib_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvaluationError, match=r"pip install 'attn-hooks\[eval\]'"):
        draw_losses([], "losses", tmp_path / "losses.png")
