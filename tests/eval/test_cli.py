"""The command line: what it shows, and one line with exit code 2 for every mistake of a user's."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import attn_hooks
from attn_eval import cli
from tests.eval.benchmarks import pope_files, write_lines


@pytest.fixture
def recipe_file(model_folder: Path, haystack_file: str, tmp_path: Path) -> Path:
    content = {
        "name": "tiny",
        "model": str(model_folder),
        "dtype": "float32",
        "device": "cpu",
        "edits": [{"method": "streaming", "window": 32}],
        "tasks": [
            {"task": "passkey", "lengths": [400], "samples": 3, "new_tokens": 4},
            {"task": "needle_grid", "lengths": [512], "depths": [0, 100], "samples": 1, "new_tokens": 4},
        ],
    }
    content["tasks"][1]["source"] = haystack_file  # type: ignore[index]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``attn-hooks ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["attn-hooks", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_teaches_and_needs_no_pytorch() -> None:
    script = (
        "import sys\nfrom attn_eval import cli\nsys.argv = ['attn-hooks', '--help']\n"
        "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("methods", "info", "run", "compare", "score", "testbed-lm/demo"):
        assert word in done.stdout


def test_methods_as_table_and_as_json(capsys: Any, monkeypatch: Any) -> None:
    code, out, _ = call(capsys, monkeypatch, "methods", "--json")
    described = json.loads(out)
    assert code == 0
    assert set(described) == set(attn_hooks.methods())
    assert described["act"]["parameters"]["properties"]["beta"]["default"] == 0.4
    assert all(method["summary"] and method["source"] for method in described.values())
    code, out, _ = call(capsys, monkeypatch, "methods")
    assert code == 0
    assert all(name in out for name in described)


def test_info_needs_no_weights(model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    code, out, _ = call(capsys, monkeypatch, "info", folder, "--json")
    described = json.loads(out)
    assert code == 0
    assert (described["class"], described["num_layers"], described["image_token_id"]) == ("LlamaForCausalLM", 2, None)
    assert [layer["num_kv_heads"] for layer in described["layers"]] == [2, 2]
    assert set(described["accepted"]) | set(described["refused"]) == set(attn_hooks.methods())
    assert described["paths"][-1] == "pytorch"
    assert torch.cuda.is_available() or described["why_these_paths"] == "no GPU"
    code, out, _ = call(capsys, monkeypatch, "info", folder)
    assert code == 0
    assert "LlamaForCausalLM, 2 layers" in out
    assert f"paths on this machine: {', '.join(described['paths'])} ({described['why_these_paths']})" in out


def test_info_of_a_vision_language_model_names_its_image_token(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    LlavaConfig(vision_config=vision, text_config=text, image_token_id=299).save_pretrained(tmp_path)
    code, out, error = call(capsys, monkeypatch, "info", tmp_path, "--json")
    assert code == 0, error
    described = json.loads(out)
    assert described["image_token_id"] == 299
    assert [layer["num_heads"] for layer in described["layers"]] == [4, 4]
    assert len(described["left_alone"]) == 2
    assert "left alone: 2 attention modules" in call(capsys, monkeypatch, "info", tmp_path)[1]


@pytest.fixture
def llava_next_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A config and a processor, no weights; and a picture of 36 x 20 pixels."""
    own_tokenizer = copy.deepcopy(tokenizer)
    own_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token_id = own_tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    grids = [[16, 32], [32, 16], [32, 32]]
    LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=len(own_tokenizer), bos_token_id=own_tokenizer.bos_token_id),
        image_token_id=image_token_id,
        image_grid_pinpoints=grids,
    ).save_pretrained(tmp_path)
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(**square, image_grid_pinpoints=grids),
        own_tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="<bos>{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} A:",
    ).save_pretrained(tmp_path)
    Image.new("RGB", (36, 20), "teal").save(tmp_path / "picture.png")
    return tmp_path


def test_info_shows_the_layout_of_a_prompt(llava_next_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    picture = llava_next_folder / "picture.png"
    prompt = ("--prompt", "<bos>See <image> and <image>.", "--image", picture, "--image", picture)
    code, out, error = call(capsys, monkeypatch, "info", llava_next_folder, *prompt, "--json")
    assert code == 0, error
    spans = [tuple(span.values()) for span in json.loads(out)["spans"]]
    grid = "4 x 4 + 4 x 8"
    assert spans == [
        (0, 1, "bos", None, None, "<bos>"),
        (1, 5, "text", None, None, "See "),
        (5, 57, "image", 0, grid, ""),
        (57, 62, "text", None, None, " and "),
        (62, 114, "image", 1, grid, ""),
        (114, 115, "text", None, None, "."),
    ]
    code, out, _ = call(capsys, monkeypatch, "info", llava_next_folder, *prompt)
    assert code == 0
    assert "115 tokens" in out
    assert all(word in out for word in ("image 0", "image 1", grid, "' and '"))


def test_info_places_images_by_the_chat_template(llava_next_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    given = ("--prompt", "Hm?", "--image", llava_next_folder / "picture.png", "--json")
    code, out, error = call(capsys, monkeypatch, "info", llava_next_folder, *given)
    assert code == 0, error
    spans = [(span["kind"], span["text"]) for span in json.loads(out)["spans"]]
    assert spans == [("bos", "<bos>"), ("image", ""), ("text", "Hm? A:")]


def test_info_of_a_text_prompt(model_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    code, out, _ = call(capsys, monkeypatch, "info", model_folder, "--prompt", "abc", "--json")
    assert code == 0
    spans = [{"start": 0, "stop": 3, "kind": "text", "image": None, "grid": None, "text": "abc"}]
    assert json.loads(out) == {"model": str(model_folder), "by_cross_attention": False, "spans": spans}


def test_what_info_says_of_prompts_that_do_not_fit(
    llava_next_folder: Path, model_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    picture = llava_next_folder / "picture.png"

    def refusal(*words: Any) -> str:
        code, _, error = call(capsys, monkeypatch, "info", *words)
        assert code == 2
        return error

    assert "takes no image" in refusal(model_folder, "--prompt", "abc", "--image", picture)
    missing = llava_next_folder / "none.png"
    assert "no image can be read from" in refusal(llava_next_folder, "--prompt", "<image>", "--image", missing)
    assert "refuses this prompt" in refusal(llava_next_folder, "--prompt", "<image> <image>", "--image", picture)
    config = json.loads((llava_next_folder / "config.json").read_text())
    (llava_next_folder / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    assert "has image token 7" in refusal(llava_next_folder, "--prompt", "<image>", "--image", picture)


def test_run_then_run_again_then_compare(recipe_file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, out, _ = call(capsys, monkeypatch, "run", recipe_file, "--out", first, "--limit", 2)
    assert code == 0
    assert "heatmap_needle_grid.png" in out
    assert sorted(path.name for path in first.iterdir()) == [
        "heatmap_needle_grid.png",
        "reports.jsonl",
        "results.json",
        "run.json",
        "samples.jsonl",
        "table.md",
    ]
    code, _, error = call(capsys, monkeypatch, "run", recipe_file, "-o", first)
    assert code == 2
    assert "--overwrite" in error
    code, _, _ = call(
        capsys, monkeypatch, "run", recipe_file, "-o", second, "--limit", 2, "--set", "edits.streaming.window=8"
    )
    assert code == 0
    code, out, _ = call(capsys, monkeypatch, "compare", first, second, "--json")
    assert code == 0
    compared = json.loads(out)
    assert all(entry["paired"] for entry in compared["metrics"])
    assert compared["notes"] == []
    code, out, _ = call(capsys, monkeypatch, "compare", first, second)
    assert code == 0
    assert "passkey" in out


def test_a_model_folder_without_weights_is_one_line(
    recipe_file: Path, model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folder = tmp_path / "weightless"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    code, _, error = call(capsys, monkeypatch, "run", recipe_file, "-o", tmp_path / "out", "--set", f"model={folder}")
    assert code == 2
    assert "can't be loaded: Error no file named model.safetensors" in error


def test_answers_are_scored_without_a_model(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    questions = [word for file in pope_files(tmp_path) for word in ("--questions", file)]
    right = [
        write_lines(tmp_path / f"{n}.json", [{"answer": text} for text in ("Yes", "Yes", "No", "No")]) for n in "ab"
    ]
    wrong = [write_lines(tmp_path / f"{n}.json", [{"answer": "No"}] * 4) for n in "cd"]
    answers = [word for file in right for word in ("--answers", file)]
    edited = [word for file in wrong for word in ("--edited", file)]
    code, out, error = call(capsys, monkeypatch, "score", "pope", *answers, *edited, *questions, "--json")
    assert code == 0, error
    found = {(m["length"], m["metric"]): m for m in json.loads(out)["metrics"]}
    assert found["random", "accuracy"]["baseline"] == 1.0
    assert found["random", "accuracy"]["right_to_wrong"] == 2
    code, out, error = call(capsys, monkeypatch, "score", "pope", *answers, *questions, "--set", "reader=exact")
    assert code == 0, error
    assert "adversarial" in out and "100.0" in out


MISTAKES: list[tuple[list[str], str]] = [
    (["run", "no-such-recipe"], "no recipe 'no-such-recipe'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "bath_size=2"], "did you mean 'batch_size'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "device=cuda"], "sees no GPU"),
    (["run", "RECIPE", "-o", "OUT", "--set", "model=/no/such/folder"], "no model '/no/such/folder'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "model=meta-llama/Llama-3.1-8B"], "neither a folder nor in the local"),
    (["run", "RECIPE", "-o", "OUT", "--set", "model=a/b..c"], "no model id of the hub"),
    (["run", "RECIPE", "-o", "OUT", "--set", "model=testbed-ml"], "did you mean 'testbed-lm'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "edits.streaming.windw=2"], "did you mean 'window'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "edits.streaming.layers=[9]"], "layer 9"),
    (["run", "RECIPE", "-o", "OUT", "--set", "tasks.passkey.lengths=[20]"], "shortest feasible length"),
    (["run", "RECIPE", "-o", "OUT", "--set", "tasks.needle_grid.source=/no/text"], "no haystack '/no/text'"),
    (["run", "RECIPE", "-o", "OUT", "--set", "generation.chat_template=true"], "no chat template"),
    (["run", "RECIPE", "-o", "RECIPE"], "is a file"),
    (["run", "RECIPE", "--limit", "0"], "--limit"),
    (["run"], "attn-hooks run --help"),
    (["rum", "RECIPE"], "attn-hooks --help"),
    (["info", "/no/such/folder"], "no model '/no/such/folder'"),
    (["compare", "OUT", "OUT"], "no results.json"),
    (["score", "poep", "--answers", "FILE"], "did you mean 'pope'"),
    (["score", "passkey", "--answers", "FILE"], "are scored by 'run'"),
    (["score", "pope", "--answers", "FILE"], "the answers FILE can't be read"),
    (["score", "chair", "--answers", "FILE", "--set", "instanzes=x"], "did you mean 'instances'"),
    (["score", "chair", "--answers", "FILE", "--set", "words"], "not of the form key=value"),
    (["score", "pope"], "attn-hooks score --help"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(entry[0]) for entry in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, recipe_file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def no_network(*address: Any, **options: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("attn_eval.loading.getproxies", dict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    places = {"RECIPE": str(recipe_file), "OUT": str(tmp_path / "out")}
    code, _, error = call(capsys, monkeypatch, *(places.get(argument, argument) for argument in arguments))
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2
    assert message in lines[-1]
    assert lines[-1].startswith("attn-hooks: ")
    assert "Traceback" not in error


def test_an_interrupt_says_how_to_go_on(recipe_file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("attn_eval.runner.generate_answers", interrupt)
    code, _, error = call(capsys, monkeypatch, "run", recipe_file, "-o", tmp_path / "out")
    assert code == 130
    assert "the same command goes on" in error
