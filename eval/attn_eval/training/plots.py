"""What a fine-tuning shows at a glance: every head's score, and the losses by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_eval.errors import EvaluationError

LOSSES = {"loss": "training", "eval_loss": "validation"}


def draw_ranking(ranking: Sequence[tuple[int, int, float]], title: str, path: Path) -> None:
    """A heat map of (layer, head, score), heads across and layers down.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    figure_class = _figure_class()
    scores = {(layer, head): score for layer, head, score in ranking}
    layers = sorted({layer for layer, _ in scores})
    heads = 1 + max(head for _, head in scores)
    figure = figure_class(figsize=(2.0 + 0.25 * heads, 1.6 + 0.2 * len(layers)), layout="constrained")
    axes = figure.subplots()
    # Layers may differ in their number of heads.
    table = [[scores.get((layer, head), float("nan")) for head in range(heads)] for layer in layers]
    drawn = axes.imshow(table, aspect="auto", cmap="viridis")
    step = 1 + len(layers) // 20
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, label="score")
    figure.savefig(path, dpi=120)


def draw_losses(log: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Training and validation loss by epoch.

    Args:
        log: of `stages.train_stage`.
        title: of the plot.
        path: the file.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    figure = _figure_class()(figsize=(4.5, 3.0), layout="constrained")
    axes = figure.subplots()
    for key, name in LOSSES.items():
        points = [(entry["epoch"], entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("no plots without matplotlib: pip install 'attn-hooks[eval]'") from error
    return Figure
