"""Recipes: the shipped ones are valid, and every mistake in one is a single line that names the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import attn_hooks
from attn_eval.errors import EvaluationError
from attn_eval.recipe import Recipe, find_recipe, load_recipe

SHIPPED = sorted(attn_hooks.recipes_dir().glob("*/*.yaml"))
FAMILIES = ("testbed-lm", "llama-3.1-8b", "qwen2.5-7b", "gemma-2-2b")
METHODS = ("streaming", "power", "act", "sink_scale")
SMALL: dict[str, Any] = {
    "name": "small",
    "model": "testbed-lm",
    "edits": [{"method": "act"}, {"method": "sink_scale", "scale": 0.5}],
    "tasks": [{"task": "passkey", "lengths": [512]}, {"task": "niah_single_1", "label": "needle", "lengths": [512]}],
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_are_valid_and_called_as_their_files(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == f"{path.parent.name}/{path.stem}"
    assert recipe.build_tasks()
    assert len(recipe.build_edits()) == len(recipe.edits) > 0
    assert recipe.published == "none" or all(figure.source for figure in recipe.published)


def test_every_family_has_every_method() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in SHIPPED}
    assert {f"{family}/{method}" for family in FAMILIES for method in METHODS} <= names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taks": []}, "no key 'taks'; did you mean 'tasks'"),
        ({"tasks": []}, "tasks: tuple should have at least 1 item"),
        ({"tasks": None}, "tasks: "),
        ({"tasks": [{"task": "paskey", "lengths": [512]}]}, "no task 'paskey'; did you mean 'passkey'"),
        ({"tasks": [{"lengths": [512]}]}, "every task needs its name"),
        ({"tasks": [{"task": "passkey"}]}, "task 'passkey': the key 'lengths' is missing"),
        ({"tasks": [{"task": "passkey", "lengths": [512], "sampels": 3}]}, "no key 'sampels'; did you mean 'samples'"),
        ({"tasks": [{"task": "passkey", "lengths": [0]}]}, "task 'passkey': lengths.0: input should be greater than 0"),
        ({"tasks": SMALL["tasks"][:1] * 2}, "two tasks are called 'passkey'"),
        ({"edits": [{"beta": 0.4}]}, "edit 0 names no method"),
        ({"edits": [3]}, "edits.0: input should be a table of keys, given 3"),
        ({"generation": {"do_sampel": True}}, "no key 'generation.do_sampel'; did you mean 'do_sample'"),
        ({"generation": {"top_p": 0.9}}, "top_p has no effect without do_sample"),
        ({"device": "tpu"}, "device: input should be 'auto', 'cpu' or 'cuda', given 'tpu'"),
        ({"batch_size": 0}, "batch_size: input should be greater than 0"),
        ({"published": [{"metric": "m", "value": 1}]}, "source' is missing"),
        ({"name": "a b"}, "name: "),
    ],
)
def test_a_wrong_key_or_value_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        load_recipe(write(tmp_path, SMALL | change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "no valid YAML"), ("- 1", "must be a table of keys"), ("", "must be a table of keys")],
)
def test_a_file_that_is_no_recipe(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_recipe(write(tmp_path, content))


def test_a_wrong_parameter_of_a_method_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL | {"edits": [{"method": "act", "betta": 0.4}]})
    with pytest.raises(EvaluationError, match="no parameter 'betta'; did you mean 'beta'"):
        load_recipe(path).build_edits()
    with pytest.raises(attn_hooks.AttnHooksError, match="streaming"):
        load_recipe(write(tmp_path, SMALL | {"edits": [{"method": "streamin"}]})).build_edits()


def test_overrides_reach_tasks_by_label_and_edits_by_method(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALL),
        [
            "batch_size=3",
            "generation.do_sample=true",
            "tasks.needle.lengths=[256, 512]",
            "tasks.0.samples=2",
            "edits.sink_scale.scale=0.1",
            "edits.act={method: streaming}",
        ],
    )
    assert recipe.batch_size == 3
    assert recipe.generation.do_sample
    assert recipe.build_tasks()[1].lengths == (256, 512)
    assert recipe.build_tasks(limit=1)[0].samples == 1
    assert [edit["method"] for edit in recipe.edits] == ["streaming", "sink_scale"]
    assert recipe.edits[1]["scale"] == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size", "not of the form key=value"),
        ("bath_size=3", "did you mean 'batch_size'"),
        ("tasks.neddle.samples=3", "did you mean 'needle'"),
        ("tasks.7.samples=3", "no entry '7'"),
        ("tasks.needle.sampels=3", "did you mean 'samples'"),
        ("generation.do_sampl=true", "did you mean 'do_sample'"),
        ("name.x=1", "is a value and has no key 'x'"),
        ("published.0.metric=1", "'published'|nothing|plain value"),
        ("seed=[", "no valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_one_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_recipe(write(tmp_path, SMALL), [override])


def test_the_fingerprint_sees_what_changes_a_result_and_nothing_else(tmp_path: Path) -> None:
    def fingerprint(**change: Any) -> str:
        return load_recipe(write(tmp_path, SMALL | change)).fingerprint()

    assert fingerprint() == fingerprint(name="other", description="words", published="none")
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"batch_size": 2},
        {"edits": []},
        {"generation": {"num_beams": 5}},
    ]
    assert len({fingerprint(**change) for change in changes}) == len(changes)


def test_recipes_are_found_as_files_and_by_name(tmp_path: Path) -> None:
    shipped = attn_hooks.recipes_dir()
    assert find_recipe("testbed-lm/act", shipped) == shipped / "testbed-lm" / "act.yaml"
    assert find_recipe("recipes/testbed-lm/act.yaml", shipped).name == "act.yaml"
    path = write(tmp_path, SMALL)
    assert find_recipe(str(path), shipped) == path
    with pytest.raises(EvaluationError, match="did you mean 'testbed-lm/streaming'"):
        find_recipe("testbed-lm/streming", shipped)


def test_recipe_schema_has_the_documented_keys() -> None:
    assert set(Recipe.model_fields) == {
        "name",
        "description",
        "model",
        "dtype",
        "device",
        "edits",
        "tasks",
        "generation",
        "seed",
        "batch_size",
        "published",
    }


def test_a_bare_name_is_the_method_with_its_defaults(tmp_path: Path) -> None:
    """As ``attn_hooks.wrap`` reads the same file."""
    path = write(tmp_path, SMALL | {"edits": ["act", {"method": "sink_scale"}]})
    assert load_recipe(path).build_edits() == [attn_hooks.ACT(), attn_hooks.SinkScale()]
