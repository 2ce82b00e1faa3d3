"""The commands ``attn-hooks lofit select|train|eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attn_eval.errors import EvaluationError
from attn_eval.terminal import out, silence_loading_bars

if TYPE_CHECKING:
    # Imported where it is used: it brings PyTorch, which the help doesn't need.
    from attn_eval.training.running import Workplace

SHOWN_HEADS = 20

lofit = typer.Typer(
    name="lofit",
    help=(
        "Fine-tune a few heads (LoFiT, arXiv 2406.01563): select them, train offsets on them, measure.\n\n"
        "On the small model that is shipped, on a CPU, in minutes:\n\n"
        "  attn-hooks lofit select testbed-lm/two_hop\n\n"
        "  attn-hooks lofit train testbed-lm/two_hop\n\n"
        "  attn-hooks lofit eval testbed-lm/two_hop"
    ),
)

RecipeName = Annotated[
    str,
    typer.Argument(help="A YAML file, or the name of a shipped recipe of recipes/lofit such as testbed-lm/two_hop."),
]
Folder = Annotated[
    Path | None, typer.Option("-o", "--out", help="Where the results go; results/NAME of the recipe by default.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe; may be given again: --set num_heads=4 --set tuning.epochs=2. The three commands "
        "need the same.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many examples of each part, for a quick look; the three need the same."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin this stage anew, and forget those behind it.")]


@lofit.command()
def select(
    recipe: RecipeName,
    output: Folder = None,
    overrides: Overrides = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 1: rank all heads by what a scale of their output learns under an L1 penalty.

    Writes select/heads.json, and heads.png and losses.png. A training that was stopped goes on with the same command.
    """
    from attn_eval.training.plots import draw_ranking
    from attn_eval.training.running import EVAL, SELECT, TRAIN
    from attn_eval.training.running import select as select_heads

    place = _workplace(recipe, output, overrides, limit, [SELECT, TRAIN, EVAL] if overwrite else [])
    ranking = select_heads(place)
    method = place.recipe.selection.method
    table = Table(title=f"{place.recipe.name}: {len(ranking)} heads by {method}")
    for column in ("layer", "head", "score"):
        table.add_column(column, justify="right")
    for layer, head, score in ranking[:SHOWN_HEADS]:
        table.add_row(str(layer), str(head), f"{score:.4f}")
    out().print(table)
    plots = _draw_losses(place, place.folder / SELECT, "all heads")
    plots += _drawn(place.folder / SELECT / "heads.png", draw_ranking, ranking, f"{place.recipe.name}: {method}")
    out().print(f"written to {escape(str(place.folder / SELECT))}: {', '.join(['heads.json', *plots])}", soft_wrap=True)


@lofit.command()
def train(
    recipe: RecipeName,
    output: Folder = None,
    overrides: Overrides = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 2: train offsets on the best heads; everything else of the model stays as it is.

    Writes a PEFT adapter to train/adapter, which wrap(model, "lofit:FOLDER") puts on, and losses.png.
    """
    from attn_eval.training.running import EVAL, TRAIN
    from attn_eval.training.running import train as train_offsets

    place = _workplace(recipe, output, overrides, limit, [TRAIN, EVAL] if overwrite else [])
    adapter = train_offsets(place)
    about = json.loads((adapter.parent / "training.json").read_text(encoding="utf-8"))
    losses = ", ".join(f"{key} {about[key]:.4f}" for key in ("loss", "eval_loss") if about[key] is not None)
    out().print(
        f"{len(about['heads'])} heads from {about['heads_from']}, {about['trained_numbers']:,} numbers: {losses}"
    )
    plots = _draw_losses(place, adapter.parent, f"{len(about['heads'])} heads")
    written = ", ".join([adapter.name, "training.json", *plots])
    out().print(f"written to {escape(str(adapter.parent))}: {written}", soft_wrap=True)


@lofit.command("eval")
def evaluate(
    recipe: RecipeName,
    output: Folder = None,
    overrides: Overrides = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Measure the test examples with the trained adapter and without, pair by pair.

    Exact match for prompts with completions, MC1 and MC2 for TruthfulQA. Writes eval/results.json and eval/table.md.
    """
    from attn_eval.report import console_table
    from attn_eval.training.running import EVAL
    from attn_eval.training.running import evaluate as measure

    place = _workplace(recipe, output, overrides, limit, [EVAL] if overwrite else [])
    results: dict[str, Any] = measure(place)
    if as_json:
        print(json.dumps({key: results[key] for key in ("adapter", "data", "metrics")}, indent=2))
        return
    out().print(console_table(results["metrics"], place.recipe.name))
    out().print(f"written to {escape(str(place.folder / EVAL))}: results.json, table.md", soft_wrap=True)


def _draw_losses(place: Workplace, folder: Path, what: str) -> list[str]:
    """None where nothing was trained."""
    from attn_eval.training.plots import draw_losses
    from attn_eval.training.stages import LOG

    if not (folder / LOG).is_file():
        return []
    log = json.loads((folder / LOG).read_text(encoding="utf-8"))
    return _drawn(folder / "losses.png", draw_losses, log, f"{place.recipe.name}: {what}")


def _drawn(path: Path, draw: Callable[..., None], *what: Any) -> list[str]:
    """The file's name if it could be drawn; else the reason is told, since what was trained is worth more."""
    try:
        draw(*what, path)
    except EvaluationError as problem:
        out().print(escape(str(problem)))
        return []
    return [path.name]


def _workplace(
    recipe: str, output: Path | None, overrides: list[str] | None, limit: int | None, forgotten: list[str]
) -> Workplace:
    import attn_hooks
    from attn_eval.recipe import find_recipe, load_settings
    from attn_eval.training.recipe import LofitRecipe

    path = find_recipe(recipe, attn_hooks.recipes_dir(), "lofit")
    loaded = load_settings(path, LofitRecipe, overrides or [])
    folder = output or Path("results") / loaded.name
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"the output {folder} is a file: give a folder with -o")

    from attn_eval.training.running import Workplace, forget

    silence_loading_bars()
    forget(folder, forgotten)
    return Workplace(loaded, folder, Console(stderr=True), limit)
