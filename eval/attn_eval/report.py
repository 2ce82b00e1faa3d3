"""What a run leaves for its readers: results.json, table.md, a heat map for each grid, and a table on the console."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from attn_eval.errors import EvaluationError
from attn_eval.results import BASELINE, EDITED, Metric
from attn_eval.run_log import RESULTS

TABLE = "table.md"
COLUMNS = (
    "task",
    "length or part",
    "metric",
    "n",
    BASELINE,
    EDITED,
    "difference",
    "95 % interval",
    "lost/won",
    "McNemar p",
    "p by image",
)
CELLS_WITH_NUMBERS = 200


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write all files of a finished run; returns their paths."""
    written = [folder / RESULTS, folder / TABLE]
    # In two steps, so that a kill never leaves half a results.json.
    unfinished = folder / f"{RESULTS}.part"
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, written[0])
    written[1].write_text(table_markdown(results), encoding="utf-8")
    for name, task in results["tasks"].items():
        if task["grid"]:
            path = folder / f"heatmap_{name}.png"
            draw_heat_map(task["grid"], results["runs"], f"{results['recipe']['name']}: {name}", path)
            written.append(path)
        figures = [metric for metric in results["metrics"] if metric["task"] == name and "unit" in metric]
        if figures:
            path = folder / f"figures_{name}.png"
            draw_figures(figures, results["runs"], f"{results['recipe']['name']}: {name}", path)
            written.append(path)
    return written


def cells_of(metric: Metric) -> list[str]:
    """One metric as the texts of a table's row. Scores in percent, everything else in its own unit."""
    percent = metric["metric"] == "score" or metric.get("unit") == "share"

    def show(value: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.4f}"

    interval = metric.get("interval") if metric.get(EDITED) is not None else metric.get(f"{BASELINE}_interval")
    sign = "+" if metric.get(EDITED) is not None else ""
    flips = f"{metric['right_to_wrong']}/{metric['wrong_to_right']}" if "right_to_wrong" in metric else ""
    return [
        str(metric["task"]),
        str(metric["length"]),
        str(metric["metric"]),
        str(metric["samples"]),
        show(metric[BASELINE]),
        show(metric.get(EDITED)),
        show(metric.get("difference"), "+"),
        f"{show(interval[0], sign)} to {show(interval[1], sign)}" if interval else "",
        flips,
        f"{metric['mcnemar_p']:.3g}" if "mcnemar_p" in metric else "",
        f"{metric['bootstrap_p']:.3g}" if metric.get("bootstrap_p") is not None else "",
    ]


def console_table(metrics: Sequence[Metric], title: str, runs: tuple[str, str] = (BASELINE, EDITED)) -> Table:
    """The metrics as a table for the terminal; ``runs`` heads the two columns of values."""
    table = Table(title=title)
    for index, column in enumerate((*COLUMNS[:4], *runs, *COLUMNS[6:])):
        table.add_column(column, justify="left" if index in (0, 2) else "right", no_wrap=index == 0)
    for metric in metrics:
        table.add_row(*cells_of(metric))
    return table


def table_markdown(results: dict[str, Any]) -> str:
    """The page of a run: table, how to read it, edits, what they did, published figures, data and versions."""
    recipe, model = results["recipe"], results["model"]
    lines = [f"# {recipe['name']}", ""]
    if recipe["description"]:
        lines += [" ".join(recipe["description"].split()), ""]
    edits = ", ".join(_call(edit) for edit in results["edits"]) or "none"
    lines += [
        f"- Model: {recipe['model']} ({model['class']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, "
        f"{model['device']})",
        f"- Edits: {edits}",
        f"- Seed {recipe['seed']}, {_search(recipe['generation'])}, "
        f"batch {recipe['batch_size']}, chat template {'on' if results['modes']['chat_template'] else 'off'}",
        "",
        *markdown_table(COLUMNS, [cells_of(metric) for metric in results["metrics"]]),
        "",
        "Scores in percent. Difference: edited less baseline on the same samples, with its paired bootstrap interval; "
        "lost/won: samples that lost, or gained, the full score; McNemar p: exact, of those, "
        "each taken for independent; p by image: from resampled images, each with all its questions. "
        "The average weighs every task alike. "
        "Figures of images are resampled by image.",
        "",
    ]
    if results["notes"]:
        lines += ["Notes:", "", *(f"- {note}" for note in results["notes"]), ""]
    if results["edit_reports"]:
        lines += ["## What the edits did", "", *_report_table(results["edit_reports"]), ""]
    lines += ["## Published figures", "", *published_table(recipe["published"]), ""]
    lines += ["## Time", "", *_timing_table(results), "", "## Data", ""]
    columns = ("task", "version", "samples", "data sha256", "source")
    rows = []
    for name, task in results["tasks"].items():
        haystack = task["haystack"]
        text = f"{Path(haystack['name']).name} {haystack['sha256'][:12]}" if haystack else task["source"]
        rows.append([name, str(task["version"]), str(task["samples"]), task["data_sha256"][:12], text])
    lines += [*markdown_table(columns, rows), "", "## Made with", ""]
    environment = results["environment"]
    versions = {"python": environment["python"], **environment["packages"]}
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    lines.append(f"commit {environment['commit'] or 'unknown'}, {environment['gpu'] or 'no GPU'}")
    return "\n".join(lines) + "\n"


def draw_figures(metrics: Sequence[Metric], runs: Sequence[str], title: str, path: Path) -> None:
    """A benchmark's shares in percent with their intervals, a panel for each part, one point a run.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    figure_class = _figure_class()
    shown = [metric for metric in metrics if metric["unit"] == "share"]
    parts = list(dict.fromkeys(metric["length"] for metric in shown))
    names = list(dict.fromkeys(metric["metric"] for metric in shown))
    figure = figure_class(figsize=(2.0 + 3.0 * len(parts), 1.4 + 0.4 * len(names)))
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axis, part in zip(axes, parts, strict=True):
        for number, run in enumerate(runs):
            points = [metric for metric in shown if metric["length"] == part and metric[run] is not None]
            values = [100 * metric[run] for metric in points]
            ends = [metric[f"{run}_interval"] or (metric[run], metric[run]) for metric in points]
            # A percentile interval need not hold the value itself.
            reach = [[max(0.0, v - 100 * low) for v, (low, _) in zip(values, ends, strict=True)],
                     [max(0.0, 100 * high - v) for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
            places = [names.index(metric["metric"]) + 0.3 * (number - (len(runs) - 1) / 2) for metric in points]
            axis.errorbar(values, places, xerr=reach, fmt="os"[number], capsize=2, markersize=4, label=run)
        axis.set_title(part)
        axis.set_xlim(-2, 102)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=7)
    figure.suptitle(f"{title}, percent with 95 % interval", fontsize=10)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_heat_map(grid: Sequence[dict[str, Any]], runs: Sequence[str], title: str, path: Path) -> None:
    """Length across, depth down, mean score as colour on one fixed scale; baseline and edited side by side.

    Raises:
        EvaluationError: matplotlib isn't installed.
    """
    figure_class = _figure_class()
    import matplotlib

    lengths = sorted({cell["length"] for cell in grid})
    depths = sorted({cell["depth"] for cell in grid})
    by_place = {(cell["depth"], cell["length"]): cell for cell in grid}
    # A Figure of its own draws with Agg, whatever display the caller's pyplot is set to.
    figure = figure_class(figsize=(1.5 + len(runs) * max(3.2, 0.7 * len(lengths)), 1.6 + max(2.4, 0.36 * len(depths))))
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    image = None
    for axis, run in zip(axes, runs, strict=True):
        values = [[by_place[depth, length][run] for length in lengths] for depth in depths]
        image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap=matplotlib.colormaps["viridis"], aspect="auto")
        axis.set_title(f"{run}, mean {sum(map(sum, values)) / len(grid):.2f}")
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45, ha="right")
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_xlabel("length (tokens)")
        if len(grid) <= CELLS_WITH_NUMBERS:
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    shade = "black" if value > 0.5 else "white"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=7)
    axes[0].set_ylabel("depth of the needle (%)")
    samples = grid[0]["samples"]
    figure.suptitle(f"{title}, {samples} sample{'s' if samples > 1 else ''} a cell", fontsize=10)
    figure.colorbar(image, ax=list(axes), label="share found")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("the plots need matplotlib: pip install 'attn-hooks[eval]'") from error
    return Figure


def _search(generation: dict[str, Any]) -> str:
    beams = f"beams of {generation['num_beams']}" if generation["num_beams"] > 1 else ""
    if generation["do_sample"]:
        return f"sampled, {beams}" if beams else "sampled"
    return beams or "greedy"


def _call(edit: dict[str, Any]) -> str:
    given = ", ".join(f"{name}={value}" for name, value in edit.items() if name != "method" and value is not None)
    return f"{edit['method']}({given})"


def published_table(published: str | list[dict[str, Any]]) -> list[str]:
    """A recipe's published figures as lines of Markdown."""
    if isinstance(published, str):
        return ["None for this model with these edits."]
    rows = [[str(figure[key]) for key in ("metric", "value", "source", "note")] for figure in published]
    return markdown_table(("metric", "value", "source", "note"), rows)


def _report_table(reports: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for entry in reports:
        for edit in entry["report"]["edits"]:
            calls = ", ".join(f"{phase} {count}" for phase, count in edit["calls"].items()) or "never acted"
            moved = "" if edit["mass_moved"] is None else f"{edit['mass_moved']:.4f}"
            layers = ", ".join(map(str, edit["layers"]))
            rows.append(
                [entry["task"], str(entry["samples"]), edit["method"], calls, layers, str(edit["heads"]), moved]
            )
    return markdown_table(("task", "samples", "edit", "calls", "layers", "heads", "mass moved"), rows)


def _timing_table(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, runs in results["timing"]["tasks"].items():
        for run, timing in runs.items():
            speeds = [timing[f"{phase}_tokens_per_second"] for phase in ("prefill", "decode")]
            rows.append(
                [name, run, f"{timing['prefill_seconds']:.1f}", f"{timing['decode_seconds']:.1f}"]
                + ["" if speed is None else f"{speed:.0f}" for speed in speeds]
            )
    return markdown_table(("task", "run", "prefill s", "decode s", "prefill tokens/s", "decode tokens/s"), rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]
