"""attn-hooks find-sinks and score-heads: the tables, the files, and one line for what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.eval.test_cli import call, llava_next_folder

__all__ = ["llava_next_folder"]


@pytest.fixture
def folder_with_sinks(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with four more layers and a massive activation at its BOS token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, num_hidden_layers=4)
    first = tokenizer("Summer")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[first, 5] = 1000.0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_find_sinks_prints_the_dims_for_var(folder_with_sinks: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments = ("find-sinks", folder_with_sinks, "--tau", "5", "--device", "cpu")
    code, out, error = call(capsys, monkeypatch, *arguments, "--json")
    assert code == 0, error
    described = json.loads(out)
    assert described["dims"] == [5]
    (found,) = described["found"]
    assert (found["dim"], found["tells_sinks"], found["layers"], found["position"]) == (5, True, [2, 3], 0)
    code, out, _ = call(capsys, monkeypatch, *arguments)
    assert code == 0
    assert "for var: dims=(5,)" in out
    code, out, _ = call(capsys, monkeypatch, "find-sinks", folder_with_sinks, "--device", "cpu", "--tau", "1e6")
    assert code == 0
    assert "no dimension tells sinks at tau 1e+06" in out


def test_what_cannot_be_measured_is_one_line(model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for arguments, words in (
        ((tmp_path / "nowhere",), "no model"),
        ((model_folder,), "no-layers"),
        ((model_folder, "--dtype", "float3"), "can't be loaded"),
        ((model_folder, "--image", tmp_path / "none.png"), "takes no image"),
    ):
        code, out, error = call(capsys, monkeypatch, "find-sinks", *arguments, "--device", "cpu")
        assert (code, out) == (2, ""), arguments
        assert words in error
        assert error.count("\n") == 1


def test_score_heads_writes_what_it_prints(llava_next_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(llava_next_folder))
    model.save_pretrained(llava_next_folder)
    results = llava_next_folder / "results"
    arguments = (
        "score-heads",
        llava_next_folder,
        "--prompt",
        "<bos>See <image> there.",
        "--device",
        "cpu",
        "-o",
        results,
    )
    picture = llava_next_folder / "picture.png"
    code, out, error = call(capsys, monkeypatch, *arguments, "--image", picture, "--json")
    assert code == 0, error
    described = json.loads(out)
    assert described == json.loads((results / "head_scores.json").read_text(encoding="utf-8"))
    assert (results / "head_scores.png").read_bytes().startswith(b"\x89PNG")
    for measure in described["measures"].values():
        scores = {(r["layer"], r["head"]): r["score"] for r in measure["ranked"]}
        assert scores == {(x, y): s for x, row in enumerate(measure["by_layer"]) for y, s in enumerate(row)}
        assert all(score > 0 for score in scores.values())
    assert described["image_tokens"] == 52
    code, out, _ = call(capsys, monkeypatch, *arguments, "--image", picture, "--top", "1")
    assert code == 0
    best = described["measures"]["image_mass"]["ranked"][0]
    assert f"{best['score']:.4f}" in out
    assert "52 of " in out
    code, out, error = call(capsys, monkeypatch, *arguments, "--image", llava_next_folder / "none.png")
    assert (code, out) == (2, "")
    assert "no image can be read" in error
    code, out, error = call(capsys, monkeypatch, *arguments[:-1], picture, "--image", picture)
    assert (code, out) == (2, "")
    assert "is a file" in error
