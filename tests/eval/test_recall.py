"""attn-hooks recall: its tables, its files, and one line for what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.recall import MEASURES, parse_edit
from tests.eval.test_cli import call


def test_it_writes_what_it_prints(model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    results = tmp_path / "results"
    arguments = ("recall", model_folder, "--edit", "streaming sinks=2 window=20", "--edit", "xattention block=16")
    options = ("--length", "300", "--rows", "50", "--device", "cpu", "-o", results)
    code, out, error = call(capsys, monkeypatch, *arguments, *options, "--json")
    assert code == 0, error
    described = json.loads(out)
    assert described == json.loads((results / "recall.json").read_text(encoding="utf-8"))
    assert (results / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert (described["tokens"], described["rows"], described["layers"]) == (300, 50, [0, 1])
    streaming, xattention = described["edits"]
    assert streaming["parameters"]["window"] == 20
    assert xattention["parameters"]["block"] == 16
    for about in (streaming, xattention):
        for name in ("recall", "density"):
            heads = [value for layer in about["by_head"][name] for value in layer]
            assert len(heads) == 8
            assert sum(heads) / 8 == pytest.approx(about["total"][name])
            of_layers = [layer[name] for layer in about["by_layer"]]
            assert sum(of_layers) / 2 == pytest.approx(about["total"][name])
    # Of row i a window of 20 and 2 sinks show min(i + 1, 22) keys.
    rows = [round(place * 299 / 49) for place in range(50)]
    seen = sum(min(row + 1, 22) for row in rows) / sum(row + 1 for row in rows)
    assert streaming["total"]["density"] == pytest.approx(seen, abs=1e-3)
    code, out, _ = call(capsys, monkeypatch, *arguments, *options)
    assert code == 0
    assert out.count("lowest head") == 2
    for about in (streaming, xattention):
        assert all(f"{about['total'][name]:.3f}" in out for name in MEASURES)
    assert "streaming(sinks=2, window=20)" in out


def test_a_prompt_of_ones_own(model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Forty bytes of text are forty of tokens.", encoding="utf-8")
    for option, given in (("--prompt", text.read_text(encoding="utf-8")), ("--prompt-file", text)):
        arguments = ("recall", model_folder, "--edit", "power", option, given, "--device", "cpu", "-o", tmp_path)
        code, out, error = call(capsys, monkeypatch, *arguments, "--json")
        assert code == 0, error
        assert json.loads(out)["tokens"] == 40
        assert json.loads(out)["rows"] == 40


def test_an_edit_is_read_as_in_a_recipe() -> None:
    assert parse_edit("power") == {"method": "power"}
    assert parse_edit("xattention threshold=0.8 layers=[0,1] later_tokens=dense") == {
        "method": "xattention",
        "threshold": 0.8,
        "layers": [0, 1],
        "later_tokens": "dense",
    }
    for wrong in ("", "power block", "power block=[", "power 'block"):
        with pytest.raises(EvaluationError, match="--edit"):
            parse_edit(wrong)


def test_what_cannot_be_measured_is_one_line(model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for arguments, words in (
        ((tmp_path / "nowhere", "--edit", "power"), "no model"),
        ((model_folder,), "Missing option '--edit'"),
        ((model_folder, "--edit", "powr"), "Did you mean power"),
        ((model_folder, "--edit", "power blok=3"), "blok"),
        ((model_folder, "--edit", "sink_scale"), "no-pattern"),
        ((model_folder, "--edit", "power", "--length", "3000"), "2048 positions"),
        ((model_folder, "--edit", "power", "--length", "10000000"), "--prompt-file"),
        ((model_folder, "--edit", "power", "--prompt", ""), "holds no text"),
        ((model_folder, "--edit", "power", "--prompt", "x", "--prompt-file", "y"), "not both"),
        ((model_folder, "--edit", "power", "--prompt-file", tmp_path / "none.txt"), "can't be read"),
        ((model_folder, "--edit", "power", "-o", model_folder / "config.json"), "is a file"),
    ):
        code, out, error = call(capsys, monkeypatch, "recall", *arguments, "--device", "cpu")
        assert (code, out) == (2, ""), arguments
        assert words in error, error
        assert error.count("\n") == 1
    assert set(MEASURES) == {"recall", "recall_p5", "density", "output_error"}
