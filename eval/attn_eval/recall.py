"""What sparse methods keep of a model's attention on one prompt: as JSON, as tables and as heat maps."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from attn_eval.environment import describe_environment
from attn_eval.errors import EvaluationError
from attn_eval.haystack import get_haystack

if TYPE_CHECKING:
    from attn_kernels import Fidelity, Recall

MEASURES = {
    "recall": "share of dense attention on the keys visited",
    "recall_p5": "recall of the row at the 5th percentile",
    "density": "keys visited, of those visible",
    "output_error": "relative error of the head's output",
}
DRAWN = ("recall", "density", "output_error")


def parse_edit(text: str) -> dict[str, Any]:
    """``"xattention threshold=0.8"`` as a recipe has it: ``{"method": "xattention", "threshold": 0.8}``.

    Raises:
        EvaluationError: it is not of that form.
    """
    try:
        method, *parameters = shlex.split(text)
        pairs = [parameter.split("=", 1) for parameter in parameters]
        return {"method": method} | {name: yaml.safe_load(value) for name, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        raise EvaluationError(
            f"--edit {text!r} is not of the form METHOD PARAMETER=VALUE ..., e.g. --edit 'xattention threshold=0.8'"
        ) from error


def prompt_ids(tokenizer: Any, prompt: str | None, length: int) -> Any:
    """``(1, N)`` token ids of the prompt, or of ``length`` tokens of the text that ships with the package.

    Raises:
        EvaluationError: the text that ships is shorter.
    """
    text = get_haystack("held_out").text if prompt is None else prompt
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    if prompt is None and ids.shape[1] < length:
        raise EvaluationError(
            f"the text that ships has {ids.shape[1]} tokens, not {length}: give one with --prompt-file"
        )
    return ids if prompt is not None else ids[:, :length]


def measured_recall(
    model: str, edits: list[str], prompt: str | None, length: int, rows: int, dtype: str, device: str
) -> dict[str, Any]:
    """What ``attn-hooks recall`` writes as JSON: the measures of each edit in total, by layer, and by layer and head.

    Raises:
        EvaluationError: the model cannot be loaded, an edit is not of the form asked for, or the prompt does not fit.
    """
    from attn_eval.loading import load_model
    from attn_hooks.recall import recall_of
    from attn_hooks.registry import build_edit

    # Before the model is loaded, which takes long.
    wanted = [build_edit(parse_edit(edit)) for edit in edits]
    loaded, tokenizer = load_model(model, dtype, device)
    ids = prompt_ids(tokenizer, prompt, length).to(loaded.device)
    most = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] > most:
        raise EvaluationError(f"{ids.shape[1]} tokens are more than the {most} positions of {model!r}")
    if ids.shape[1] < 2:
        raise EvaluationError("the prompt holds no text")
    measured = recall_of(loaded, wanted, rows, input_ids=ids)
    return {
        "model": model,
        "class": measured.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt": "the text that ships" if prompt is None else prompt,
        "tokens": measured.tokens,
        "rows": measured.rows,
        "layers": list(measured.by_edit[0]),
        "measures": MEASURES,
        "edits": [
            {
                "edit": str(edit),
                "parameters": {"method": edit.method, **edit.model_dump(mode="json")},
                "total": vars(measured.of(number).total()),
                "by_layer": [vars(recall.total()) for recall in measured.by_edit[number].values()],
                "by_head": _by_head(list(measured.by_edit[number].values())),
            }
            for number, edit in enumerate(measured.edits)
        ],
        "environment": describe_environment(),
    }


def _by_head(layers: list[Recall]) -> dict[str, list[list[float | None]]]:
    """For each measure a row for each layer; None where a layer has fewer heads than others."""
    found: list[list[Fidelity]] = [recall.by_head() for recall in layers]
    most = max(map(len, found))
    return {
        name: [[getattr(head, name) for head in heads] + [None] * (most - len(heads)) for heads in found]
        for name in MEASURES
    }


def totals_table(measured: dict[str, Any]) -> Table:
    """One line for each edit."""
    title = f"{measured['class']}, {measured['tokens']} tokens, {measured['rows']} rows of each head"
    table = Table(title=title, caption="; ".join(f"{_shown(name)}: {meaning}" for name, meaning in MEASURES.items()))
    table.add_column("edit")
    for name in MEASURES:
        table.add_column(_shown(name), justify="right")
    for about in measured["edits"]:
        table.add_row(escape(about["edit"]), *_cells(about["total"]))
    return table


def layers_table(measured: dict[str, Any], about: dict[str, Any]) -> Table:
    """One edit, a line for each layer, with the head that keeps least."""
    table = Table(title=escape(about["edit"]))
    for name in ("layer", *map(_shown, MEASURES), "lowest head"):
        table.add_column(name, justify="right")
    for place, (layer, found) in enumerate(zip(measured["layers"], about["by_layer"], strict=True)):
        heads = [(recall, head) for head, recall in enumerate(about["by_head"]["recall"][place]) if recall is not None]
        recall, head = min(heads)
        table.add_row(str(layer), *_cells(found), f"{head} ({recall:.3f})")
    return table


def _shown(name: str) -> str:
    return name.replace("recall_p5", "recall p5").replace("_", " ")


def _cells(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.3f}" for name in MEASURES]


def draw_recall(measured: dict[str, Any], path: Path) -> None:
    """Heat maps, heads across and layers down: a row for each edit; recall, density and output error side by side.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("heat maps need matplotlib: pip install 'attn-hooks[eval]'") from error
    edits, layers = measured["edits"], measured["layers"]
    columns = len(edits[0]["by_head"]["recall"][0])
    size = (len(DRAWN) * (2.0 + 0.18 * columns), len(edits) * (1.6 + 0.18 * len(layers)))
    figure = Figure(figsize=size, layout="constrained")
    step = 1 + len(layers) // 20
    for row, about in zip(figure.subplots(len(edits), len(DRAWN), squeeze=False), edits, strict=True):
        for axes, name in zip(row, DRAWN, strict=True):
            table = [[float("nan") if value is None else value for value in heads] for heads in about["by_head"][name]]
            colours = "viridis_r" if name == "output_error" else "viridis"
            drawn = axes.imshow(
                table, aspect="auto", cmap=colours, vmin=0.0, vmax=None if name == "output_error" else 1.0
            )
            axes.set_yticks(range(0, len(layers), step), layers[::step])
            axes.set_xlabel("head")
            axes.set_title(f"{_shown(name)}, {about['total'][name]:.3f}", fontsize=9)
            figure.colorbar(drawn, ax=axes)
        row[0].set_ylabel(f"{about['edit']}\nlayer", fontsize=8)
    figure.suptitle(f"{Path(measured['model']).name}, {measured['tokens']} tokens", fontsize=10)
    figure.savefig(path, dpi=120)
