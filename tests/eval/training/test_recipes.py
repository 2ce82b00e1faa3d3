"""The shipped recipes of fine-tuning: valid, called as their files, and with the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

import attn_hooks
from attn_eval.errors import EvaluationError
from attn_eval.recipe import find_recipe, load_recipe, load_settings
from attn_eval.training.recipe import LofitRecipe

SHIPPED = sorted((attn_hooks.recipes_dir() / "lofit").glob("*/*.yaml"))
# Heads tuned, head_dim; trained numbers of the second stage as the paper's code counts them.
PUBLISHED_SIZES = {"llama-2-7b": (32, 128, 4096), "llama-2-13b": (48, 128, 6144), "gemma-7b": (16, 256, 4096)}
# Learning rate of A, lambda, learning rate of v: the paper's training scripts.
PUBLISHED_RATES = {
    "truthfulqa": {
        "gemma-7b": (5e-3, 5e-4, 2e-2),
        "llama-2-7b": (5e-3, 5e-4, 1e-2),
        "llama-2-13b": (1e-3, 1e-3, 2e-2),
    },
    "mquake": {
        "gemma-7b": (5e-3, 5e-4, 8e-3),
        "llama-2-7b": (5e-3, 1e-3, 1e-2),
        "llama-2-13b": (1e-3, 1e-3, 8e-3),
    },
    "clutrr": {
        "gemma-7b": (5e-4, 5e-3, 1e-2),
        "llama-2-7b": (5e-4, 5e-3, 1e-2),
        "llama-2-13b": (1e-3, 1e-3, 1e-2),
    },
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_are_valid_and_called_as_their_files(path: Path) -> None:
    recipe = load_settings(path, LofitRecipe)
    assert recipe.name == f"lofit/{path.parent.name}/{path.stem}"
    assert recipe.data.set == path.stem
    assert recipe.published == "none" or all(figure.source for figure in recipe.published)


@pytest.mark.parametrize("task", PUBLISHED_RATES)
@pytest.mark.parametrize("model", PUBLISHED_SIZES)
def test_the_papers_models_have_the_papers_numbers(task: str, model: str) -> None:
    recipe = load_settings(attn_hooks.recipes_dir() / "lofit" / model / f"{task}.yaml", LofitRecipe)
    rates = recipe.selection.learning_rate, recipe.selection.l1, recipe.tuning.learning_rate
    assert rates == PUBLISHED_RATES[task][model]
    heads, head_dim, trained = PUBLISHED_SIZES[model]
    assert recipe.num_heads == heads
    assert heads * head_dim == trained
    for stage in (recipe.selection, recipe.tuning):
        assert (stage.epochs, stage.batch_size, stage.early_stopping) == (5, 8, None)
    assert (recipe.seed, recipe.eval_batch_size, recipe.selection.method) == (42, 32, "scale")
    assert recipe.dtype == ("float32" if model == "llama-2-7b" else "bfloat16")


def test_every_model_has_every_task() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in SHIPPED}
    models = (*PUBLISHED_SIZES, "llama-3.1-8b")
    assert {f"{model}/{task}" for model in models for task in PUBLISHED_RATES} <= names
    assert {"testbed-lm/two_hop", "testbed-lm/kinship"} <= names


def test_the_two_kinds_of_recipes_are_told_apart(tmp_path: Path) -> None:
    shipped = attn_hooks.recipes_dir()
    path = find_recipe("testbed-lm/two_hop", shipped, "lofit")
    assert path == find_recipe("lofit/testbed-lm/two_hop", shipped, "lofit")
    with pytest.raises(EvaluationError, match="did you mean 'testbed-lm/two_hop'"):
        find_recipe("testbed-lm/two_hops", shipped, "lofit")
    with pytest.raises(EvaluationError, match="no recipe 'testbed-lm/two_hop'"):
        find_recipe("testbed-lm/two_hop", shipped)
    with pytest.raises(EvaluationError, match="no key 'data'"):
        load_recipe(path)


def test_generated_data_of_the_shipped_recipes_is_made() -> None:
    for name in ("two_hop", "kinship"):
        recipe = load_settings(attn_hooks.recipes_dir() / "lofit" / "testbed-lm" / f"{name}.yaml", LofitRecipe)
        splits = recipe.data.splits(recipe.seed)
        prompts = [[example.prompt for example in part] for part in (splits.train, splits.validation, splits.test)]
        assert [len(part) for part in prompts] == [recipe.data.train, recipe.data.validation, recipe.data.test]
        assert not set(prompts[0]) & set(prompts[2])
