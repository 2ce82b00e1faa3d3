"""The model card's tables, printed from what was measured, so that no figure in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin (testbed/lm/evaluate.py card) -->", "<!-- measured: end -->"


def write_card(model: Path, bars: Mapping[str, tuple[float | None, float | None]], text_loss_bar: float) -> None:
    """Put the tables between the card's two marks."""
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((model / "training").glob("run_*.json"))]
    sections = [
        _retrieval(metrics["retrieval"], bars),
        _text(metrics["text"], metrics["overlap"], text_loss_bar),
        _heads(metrics["retrieval_heads"]),
        _sinks(metrics["sinks"]),
        _local_window(metrics["local_window"]),
        _curve(runs),
    ]
    card = model / "README.md"
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    card.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(sections) + f"\n\n{END}{behind}", encoding="utf-8")


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _retrieval(scores: Mapping[str, Any], bars: Mapping[str, tuple[float | None, float | None]]) -> str:
    rows = []
    for task, by_length in scores.items():
        row: list[object] = [f"`{task}`"]
        verdict = []
        for length, bar in zip(("4096", "8192"), bars.get(task, (None, None)), strict=True):
            cell = by_length.get(length)
            row += ["not measured" if cell is None else f"{100 * cell['score']:.1f} ({cell['samples']})"]
            if bar is not None:
                reached = cell is not None and cell["score"] >= bar
                verdict.append(f"≥ {100 * bar:.0f} at {length}: {'reached' if reached else 'missed'}")
        rows.append([*row, "; ".join(verdict)])
    return "### Retrieval\n\nScore in percent (samples).\n\n" + _table(["task", "4096", "8192", "bar"], rows)


def _text(text: Mapping[str, Any], overlap: Mapping[str, Any], bar: float) -> str:
    rows = [
        [
            name,
            cell["nats_a_token"],
            cell["bits_a_byte"],
            cell["tokens"],
            cell["bytes_a_token"],
            f"{100 * overlap['by_source'][name]:.1f}",
        ]
        for name, cell in text["by_source"].items()
    ]
    total = text["nats_a_token"]
    position = _table(list(text["by_position"]), [list(text["by_position"].values())])
    return (
        "### Held-out text\n\n"
        f"{total} nats a token over all sources (bar: at most {bar}, {'reached' if total <= bar else 'missed'}). "
        f"Repeated: percent of its runs of {overlap['words']} words that stand in the training text too.\n\n"
        + _table(["source", "nats a token", "bits a byte", "tokens", "bytes a token", "repeated"], rows)
        + "\n\nNats a token by the token's position, windows of 8192:\n\n"
        + position
    )


def _heads(heads: Mapping[str, Any]) -> str:
    rows = [[head["layer"], head["head"], f"{100 * head['share']:.1f}"] for head in heads["best"]]
    return (
        f"### Retrieval heads\n\nOne needle of 8 in {heads['length']} tokens of text, {heads['tokens_asked']} digits "
        "asked: how often (percent) a head's most attended key is the very digit that comes next. Layers and heads "
        "count from 0.\n\n" + _table(["layer", "head", "percent"], rows)
    )


def _sinks(sinks: Mapping[str, Any]) -> str:
    layers = sinks["bos_share_by_layer_and_head"]
    rows = [[index, *(f"{100 * share:.2f}" for share in layer)] for index, layer in enumerate(layers)]
    header = ["layer", *(f"head {head}" for head in range(len(layers[0])))]
    even = 100 * sinks["bos_share_of_even_attention"]
    return (
        "### Attention on BOS\n\nPercent of the attention of positions 256 to 2047 in held-out text; even attention "
        f"would give {even:.2f}.\n\n" + _table(header, rows)
    )


def _local_window(windows: Mapping[str, Mapping[str, float]]) -> str:
    header = ["window", *next(iter(windows.values()))]
    rows = [[window, *losses.values()] for window, losses in windows.items()]
    return (
        "### A local window, with and without the first keys\n\nNats a token of held-out text, positions past the "
        "window, up to 4096.\n\n" + _table(header, rows)
    )


def _curve(runs: Sequence[Sequence[Mapping[str, float]]]) -> str:
    names = ("text loss", "needle in text 4096", "one of 8 8192", "4 values 4096", "4 hops 4096")
    rows = [
        [run, round(row["seconds"]), int(row["step"]), round(row["tokens"] / 1e6), *(row[name] for name in names)]
        for run, curve in enumerate(runs, start=1)
        for row in curve
        if names[0] in row
    ]
    return (
        "### While training\n\nHeld-out text's loss, and the share of 32 held-out rows whose whole answer was the "
        "model's first choice.\n\n" + _table(["run", "seconds", "step", "million tokens", *names], rows)
    )
