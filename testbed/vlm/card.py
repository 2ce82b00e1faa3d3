"""The model card's tables, printed from what was measured: ``python -m testbed.vlm.card`` writes them between its marks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.vlm import MODEL
from testbed.vlm.splits import MEASURED, POPE_SPLITS

BEGIN, END = "<!-- measured: begin (python -m testbed.vlm.card) -->", "<!-- measured: end -->"
CHAIR = ("chair_s", "chair_i", "recall", "f1", "length", "distinct_2", "at_token_cap")


def write_card(model: Path) -> None:
    """Put the tables between the card's two marks."""
    card = model / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    behind = rest.partition(END)[2]
    card.write_text(f"{before}{measured(model)}{behind}", encoding="utf-8")


def measured(model: Path) -> str:
    """The measured part, marks included, from ``metrics.json`` and the training's curve."""
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    curve = json.loads((model / "training" / "run_1.json").read_text(encoding="utf-8"))["curve"]
    parts = [_pope(metrics["splits"]), _chair(metrics["splits"]), _mme(metrics["splits"]), _curve(curve)]
    return "\n\n".join([BEGIN, *parts, _sinks(metrics["attention"]), _heads(metrics["attention"]), END])


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _cell(figure: Mapping[str, Any], scale: float = 100) -> str:
    value, interval = scale * figure["value"], figure["interval"]
    return f"{value:.1f}" + (f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})" if interval else "")


def _pope(splits: Mapping[str, Any]) -> str:
    rows = [
        [name, part, *(_cell(splits[name]["pope"][part][figure]) for figure in ("accuracy", "f1", "yes_ratio"))]
        for name in MEASURED
        for part in POPE_SPLITS
    ]
    return (
        "### POPE\n\nPercent, with 95 % intervals over images. `test`: companions missing; `val`: as in training.\n\n"
        + _table(["split", "questions", "accuracy", "F1", "answered yes"], rows)
    )


def _chair(splits: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_cell(splits[name]["chair"]["all"][figure], 1 if figure == "length" else 100) for figure in CHAIR)]
        for name in MEASURED
    ]
    return "### CHAIR\n\nPercent; length in words.\n\n" + _table(["split", *CHAIR], rows)


def _mme(splits: Mapping[str, Any]) -> str:
    parts = ("count", "position", "color")
    rows = [[name, *(_cell(splits[name]["mme"][part]["accuracy"]) for part in parts)] for name in MEASURED]
    return "### Questions in MME's form\n\nAccuracy in percent.\n\n" + _table(["split", *parts], rows)


def _curve(curve: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            round(row["seconds"]),
            row["step"],
            *(f"{100 * row['test']['pope'][part]['accuracy']:.1f}" for part in POPE_SPLITS),
            *(f"{100 * row[name]['chair']['chair_s']:.1f}" for name in ("test", "val")),
        ]
        for row in curve
        if "test" in row
    ]
    return (
        "### While training\n\nOn 250 scenes (the last row: 500), in bfloat16, by the training's own questions: POPE's "
        "accuracy with the companions missing, and CHAIR_S without and with them.\n\n"
        + _table(["seconds", "step", *POPE_SPLITS, "CHAIR_S test", "CHAIR_S val"], rows)
    )


def _sinks(attention: Mapping[str, Any]) -> str:
    names = {
        "phi_bos": "BOS",
        "phi_image": "image tokens, mean",
        "phi_image_largest": "image tokens, largest",
        "phi_text_largest": "text, largest",
    }
    columns = [attention[name] for name in names]
    rows = [[layer, *(f"{value:.1f}" for value in values)] for layer, values in enumerate(zip(*columns, strict=True))]
    formed = "None" if not attention["sink_dims"] else f"Dimensions {attention['sink_dims']}"
    return (
        "### Sinks\n\nThe largest of |x[d]| / rms(x) over d of what enters a layer, on "
        f"{attention['prompts']} captioning prompts; VAR calls a token a sink from 20 on. {formed} reach it.\n\n"
        + _table(["layer", *names.values()], rows)
    )


def _heads(attention: Mapping[str, Any]) -> str:
    texts = []
    for name, title in (("image_mass", "on the image"), ("bos_mass", "on BOS"), ("vhd", "VHD")):
        scale, form = (1, ".1f") if name == "vhd" else (100, ".0f")
        cells = [[layer, *(format(scale * value, form) for value in row)] for layer, row in enumerate(attention[name])]
        what = "Vision-aware head divergence" if name == "vhd" else f"Percent of the prompt's last row's weight {title}"
        texts.append(f"{what}:\n\n" + _table(["layer", *(f"head {h}" for h in range(len(cells[0]) - 1))], cells))
    above = attention["heads_above_image_mass"]
    total = sum(len(row) for row in attention["image_mass"])
    return (
        f"### Heads\n\n{above['heads']} of {total} heads give at least {100 * above['threshold']:.0f} % of the last row's "
        "weight to the image.\n\n" + "\n\n".join(texts)
    )


if __name__ == "__main__":
    write_card(MODEL)
