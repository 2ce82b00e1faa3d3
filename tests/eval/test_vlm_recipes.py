"""Every recipe of a large vision-language model, on a tiny random model of its family: the edits act, the tasks ask.

What a recipe names and the twin does not have is cut down: layers and hidden dimensions to its own, pictures to hand-made ones,
answers to a few tokens. The processors of the large models are not here, so tasks are asked and judged without a model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_hooks
from attn_eval.recipe import Recipe, load_recipe
from attn_eval.tasks import build_task
from attn_eval.tasks.images import Reply
from tests.eval.benchmarks import chair_files, draw, pope_files
from tests.hooks import vlms

TWINS = {
    "llava-1.5-7b": "llava",
    "llava-1.5-13b": "llava",
    "llava-next-7b": "llava_next",
    "qwen2-vl-7b": "qwen2_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl",
    "internvl3-8b": "internvl",
    "instructblip-7b": "instructblip",
}
METHODS = ("var", "vhr", "imbalanced", "pai", "spin", "vcd", "damro", "eah", "agla", "opera")
RECIPES = sorted(path for model in TWINS for path in (attn_hooks.recipes_dir() / model).glob("*.yaml"))
DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
# VAR needs the hidden dimensions of the backbone's sinks, which were not published.
UNKNOWN_DIMS = {("var", model) for model in ("qwen2.5-vl-7b", "internvl3-8b")}


def on_twin(edit: dict[str, Any], layers: int) -> attn_hooks.Edit:
    """With layers that the twin has, and VAR with dimensions and a threshold at which a random model has sinks."""
    given = dict(edit)
    if given.get("layers") is not None:
        given["layers"] = tuple(layer for layer in given["layers"] if layer < layers) or (0,)
    elif given["method"] in ("pai", "imbalanced", "agla"):
        # By default from layer 2 on, or those in the middle: the twin has two.
        given["layers"] = tuple(range(layers))
    if given["method"] == "var":
        given |= {"dims": (0, 1), "tau": 1.0, "layers": tuple(range(layers))}
    return attn_hooks.build_edit(given)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
@torch.no_grad()
def test_a_recipe_runs_on_its_models_twin(path: Path) -> None:
    recipe = load_recipe(path, [])
    case = vlms.CASES[TWINS[path.parent.name]]
    model, inputs = case.model(), case.inputs()
    edits = [on_twin(edit, len(attn_hooks.inspect_model(model).layers)) for edit in recipe.edits]
    assert [edit["method"] for edit in recipe.edits] == [path.stem.removesuffix("-pope").removesuffix("-chair")]
    with attn_hooks.editing(model, *edits):
        how = {"do_sample": recipe.generation.do_sample, "num_beams": recipe.generation.num_beams}
        made = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **how)
        (done,) = attn_hooks.report(model).edits
    assert made.shape[0] == len(inputs["attention_mask"]) and sum(done.calls.values()) > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipes_tasks_ask_two_samples(path: Path, tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(path, [])
    for given in recipe.tasks:
        if given["task"] == "mme":
            assert set(given) == {"task", "images"}
            continue
        files: dict[str, Any] = {"images": draw(tmp_path / "images", ["1.png", "2.png"]), "samples": 2}
        if given["task"] == "pope":
            files["questions"] = pope_files(tmp_path)
        else:
            # The images are those of the questions; here of the annotations.
            files |= {**chair_files(tmp_path), "questions": None, "words": "rules"}
            files["images"] = draw(tmp_path / "coco", [f"COCO_val2014_{number:012d}.png" for number in (1, 2, 3)])
        task = build_task({name: value for name, value in {**given, **files}.items() if value is not None})
        questions = task.asked(0)
        assert len(questions) >= 2
        for question in questions:
            assert question.prompt.startswith(given.get("prompt", question.question))
            task.judge(question, Reply("Yes, there is a dog.", False, None))


def test_every_method_of_a_model_has_both_benchmarks_with_their_token_limits() -> None:
    benchmarks: dict[tuple[str, str], set[str]] = {}
    for path in RECIPES:
        recipe = load_recipe(path, [])
        tasks = [given for given in recipe.tasks if given["task"] != "mme"]
        assert all("new_tokens" in given for given in tasks), path
        method = recipe.edits[0]["method"]
        benchmarks.setdefault((path.parent.name, method), set()).update(given["task"] for given in tasks)
    assert set(map(frozenset, benchmarks.values())) == {frozenset({"pope", "chair"})}, benchmarks


@pytest.mark.parametrize("model", TWINS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_method_without_a_recipe_is_refused_by_name(method: str, model: str) -> None:
    stems = {path.stem.removesuffix("-pope").removesuffix("-chair") for path in RECIPES if path.parent.name == model}
    if method in stems:
        return
    if (method, model) in UNKNOWN_DIMS:
        with pytest.raises(attn_hooks.AttnHooksError, match="find-sinks"):
            attn_hooks.wrap(vlms.CASES[TWINS[model]].model(), attn_hooks.VAR(layers=(0, 1)))
        return
    case = vlms.CASES[TWINS[model]]
    twin, inputs = case.model(), case.inputs()
    edit = on_twin({"method": method}, len(attn_hooks.inspect_model(twin).layers))
    with pytest.raises(attn_hooks.AttnHooksError, match=type(twin).__name__):
        attn_hooks.wrap(twin, edit)(**inputs)


def test_the_docs_table_is_what_ships() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for model in TWINS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{model}` |")]
        told = [method for method, cell in zip(METHODS, row.split("|")[2:], strict=False) if cell.strip() == "yes"]
        stems = {re.sub("-(pope|chair)$", "", path.stem) for path in RECIPES if path.parent.name == model}
        assert told == [method for method in METHODS if method in stems]
