"""The three commands on a tiny model: what they write, that they go on, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import attn_hooks
from attn_eval import cli
from attn_eval.errors import EvaluationError
from attn_eval.run_log import SAMPLES
from attn_eval.training.running import WEIGHTS, read_ranking
from attn_eval.training.stages import StoppingTrainer
from tests.eval.training.test_stages import make_loss_nan_after

Command = Callable[..., int]


@pytest.fixture
def settings(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"{number} is", "completion": f" {number % 3}"} for number in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    return {
        "name": "tiny",
        "model": str(model_folder),
        "dtype": "float32",
        "data": {"set": "completion", **files, "validation": files["test"]},
        "selection": {"learning_rate": 0.05, "epochs": 1},
        "tuning": {"learning_rate": 0.05, "epochs": 1},
        "num_heads": 2,
        "new_tokens": 2,
        "seed": 3,
    }


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Command:
    """``command("select", key=value, ...)``: the exit code with these changes of the recipe."""

    def call(*arguments: str, **changes: Any) -> int:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
        given = [arguments[0], str(path), "-o", str(tmp_path / "run"), *arguments[1:]]
        monkeypatch.setattr(sys, "argv", ["attn-hooks", "lofit", *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return call


def test_select_train_and_eval(
    command: Command, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert [command(stage) for stage in ("select", "train")] == [0, 0]
    capsys.readouterr()
    assert command("eval", "--json") == 0
    shown = json.loads(capsys.readouterr().out)

    ranking = json.loads((run / "select" / "heads.json").read_text())["heads"]
    assert sorted((layer, head) for layer, head, _ in ranking) == [(x, y) for x in range(2) for y in range(4)]
    scores = [score for _, _, score in ranking]
    assert scores == sorted(scores, reverse=True)

    results = json.loads((run / "eval" / "results.json").read_text())
    assert shown["metrics"] == results["metrics"]
    adapter = results["adapter"]
    assert adapter["heads"] == [[layer, head] for layer, head, _ in ranking[:2]]
    assert adapter["trained_numbers"] == 16
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert adapter["share_of_parameters"] == pytest.approx(16 / model.num_parameters())
    assert results["seeds"] == {"data": 3, "training": 3, "bootstrap": 3}
    assert results["data"]["sizes"] == {"train": 6, "validation": 6, "test": 6}
    assert {"torch", "transformers", "peft"} <= set(results["environment"]["packages"])
    assert [sample["id"] for sample in results["samples"]] == ["1", "2", "3", "4", "5", "6"]
    table = (run / "eval" / "table.md").read_text()
    assert "16 numbers" in table
    assert "| completion | test | score | 6 |" in table

    assert all((run / name).is_file() for name in ("select/heads.png", "select/losses.png", "train/losses.png"))

    # What was saved is an adapter of PEFT, and an edit.
    ids = torch.tensor([[5, 6, 7]])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), run / "train" / "adapter")(
        ids
    )
    edited = attn_hooks.wrap(model, f"lofit:{run / 'train' / 'adapter'}")(ids)
    torch.testing.assert_close(edited.logits, expected.logits)


def test_what_was_trained_stays_where_nothing_can_be_drawn(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command("select") == 0
    assert "no plots without matplotlib: pip install 'attn-hooks[eval]'" in capsys.readouterr().out
    select = tmp_path / "run" / "select"
    assert ((select / "heads.json").is_file(), (select / "heads.png").exists()) == (True, False)


def test_what_is_done_is_not_done_again_and_an_evaluation_goes_on(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert [command(stage) for stage in ("select", "train", "eval")] == [0, 0, 0]
    weights = run / "train" / "adapter" / WEIGHTS
    before = weights.stat().st_mtime_ns
    results = json.loads((run / "eval" / "results.json").read_text())
    lines = (run / "eval" / SAMPLES).read_text().splitlines(keepends=True)
    assert len(lines) == 12
    (run / "eval" / SAMPLES).write_text("".join(lines[:4]) + lines[4][:9], encoding="utf-8")
    assert [command(stage) for stage in ("select", "train", "eval")] == [0, 0, 0]
    assert weights.stat().st_mtime_ns == before
    again = json.loads((run / "eval" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert again["samples"] == results["samples"]


def test_a_changed_recipe_needs_overwrite_and_forgets_the_stages_behind(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [command("select"), command("train")] == [0, 0]
    # A change of the second stage leaves the first as it is.
    assert command("select", num_heads=1) == 0
    assert command("train", num_heads=1) == 2
    assert "differs in its heads and recipe" in capsys.readouterr().err
    assert command("train", "--overwrite", num_heads=1) == 0
    assert json.loads((tmp_path / "run" / "train" / "training.json").read_text())["trained_numbers"] == 8
    assert command("select", "--overwrite", seed=4) == 0
    assert command("eval", seed=4) == 2
    assert "run 'attn-hooks lofit train' first" in capsys.readouterr().err


def test_heads_of_the_recipe_and_of_files(command: Command, tmp_path: Path) -> None:
    trained = tmp_path / "run" / "train" / "training.json"
    assert command("train", heads=[[1, 3]]) == 0
    assert json.loads(trained.read_text())["heads_from"] == "the recipe"
    np.save(tmp_path / "top.npy", np.array([(1, 2), (0, 0), (1, 0)]))
    assert command("train", "--overwrite", heads=str(tmp_path / "top.npy")) == 0
    assert json.loads(trained.read_text())["heads"] == [[1, 2], [0, 0]]
    assert command("train", "--overwrite", heads=str(tmp_path / "top.npy"), num_heads=None) == 0
    # 3 % of 8 heads are one at least.
    assert json.loads(trained.read_text())["heads"] == [[1, 2]]


@pytest.mark.parametrize("method", ["offset", "random"])
def test_other_rankings(method: str, command: Command, tmp_path: Path) -> None:
    assert command("select", selection={"method": method, "learning_rate": 0.05, "epochs": 1}) == 0
    ranking = json.loads((tmp_path / "run" / "select" / "heads.json").read_text())["heads"]
    assert len({(layer, head) for layer, head, _ in ranking}) == 8
    assert all((score == 0) == (method == "random") for _, _, score in ranking)


@pytest.mark.parametrize("wrong", [" no", None])
def test_probes_need_wrong_answers(
    wrong: str | None, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"completion": " yes"} if wrong is None else {"chosen": " yes", "rejected": wrong}
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"{number} is", **other}) for number in range(10)), encoding="utf-8"
    )
    data = {"set": "completion" if wrong is None else "preference", "train": str(path), "test": str(path)}
    code = command("select", data=data, selection={"method": "probes", "learning_rate": 0.05})
    if wrong is None:
        assert code == 2
        assert "probes need wrong answers" in capsys.readouterr().err
    else:
        assert code == 0
        ranking = json.loads((tmp_path / "run" / "select" / "heads.json").read_text())["heads"]
        assert [score for *_, score in ranking] == sorted((score for *_, score in ranking), reverse=True)
        assert 0 <= ranking[-1][2] <= ranking[0][2] <= 1


def test_a_preference_file_is_trained_by_dpo_and_measured(command: Command, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} is", "chosen": " yes", "rejected": " no"} for number in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"set": "preference", "train": str(path), "test": str(path)}
    tuning = {"learning_rate": 0.3, "epochs": 8}
    assert [command(stage, data=data, heads=[[0, 1], [1, 1]], tuning=tuning) for stage in ("train", "eval")] == [0, 0]
    (metric,) = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["metrics"]
    assert metric["edited"] >= metric["baseline"]


def test_truthfulqa_is_measured_by_mc1_and_mc2(command: Command, tmp_path: Path) -> None:
    header = "Question,Best Answer,Correct Answers,Incorrect Answers\n"
    path = tmp_path / "TruthfulQA.csv"
    path.write_text(header + "".join(f"Is {n} odd?,Yes,Yes; It is,No; Never\n" for n in range(8)), encoding="utf-8")
    data = {"set": "truthfulqa", "source": str(path), "fold": 1, "instruction": False}
    assert [command(stage, "--limit", "2", data=data, heads=[[0, 1]]) for stage in ("train", "eval")] == [0, 0]
    metrics = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["metrics"]
    assert [metric["metric"] for metric in metrics] == ["mc1", "mc2"]
    assert 0.0 < metrics[1]["baseline"] < 1.0
    assert metrics[1]["samples"] == 2


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("train", {}, "run 'attn-hooks lofit select' first"),
        ("eval", {}, "run 'attn-hooks lofit train' first"),
        ("train", {"heads": "nothing.json"}, "no ranking of heads at nothing.json"),
        ("train", {"heads": [[5, 0]]}, "layer 5"),
        ("select", {"data": {"set": "completion", "train": "no.jsonl", "test": "no.jsonl"}}, "no.jsonl can't be read"),
        ("select", {"data": {"set": "clutr", "folder": "x"}}, "clutr"),
        ("select", {"data": {"set": "clutrr", "foldr": "x"}}, "did you mean 'folder'"),
        ("select", {"selection": {"learning_rate": 0.1, "lambda": 1}}, "no key 'selection.lambda'"),
        ("select", {"tuning": {"learning_rate": 0.1, "batch_size": 8, "accumulation": 3}}, "not a multiple"),
    ],
)
def test_mistakes_are_one_line(
    stage: str, change: dict[str, Any], message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(stage, **change) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attn-hooks:")]
    assert message in line


def test_a_missing_column_and_an_empty_set_are_one_line(
    command: Command, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"promt": "a", "completion": "b"}', encoding="utf-8")
    assert command("select") == 2
    assert "entry 1, has no column 'prompt'; did you mean 'promt'" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text("", encoding="utf-8")
    assert command("select") == 2
    assert "holds no example: the set is empty" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_in_one_line(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loss_nan_after(1, StoppingTrainer, monkeypatch)
    assert command("train", heads=[[0, 0]], tuning={"learning_rate": 0.1, "epochs": 3, "batch_size": 2}) == 2
    assert "so training stopped" in capsys.readouterr().err


def test_files_that_are_no_ranking(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"heads": [1, 2]}', encoding="utf-8")
    with pytest.raises(EvaluationError, match="is no ranking of heads as 'select' writes it"):
        read_ranking(path, "mend it")
