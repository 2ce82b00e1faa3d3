"""The GPU benchmarks' JSON as markdown tables for the docs.

    python -m bench.render [--edits bench/results/edits-h200.json] [--end-to-end bench/results/end-to-end-h200.json]

A ratio in bold misses its goal; "-" was not measured (the JSON's ``errors`` and ``notes`` say why).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Speed of an edited model as a share of the unwrapped one's.
NO_EDIT_GOAL, EDITED_GOAL = 0.99, 0.93


def goal_of(row: Row) -> float:
    """The largest ratio to SDPA that a row may have."""
    if row["phase"] == "decode":
        return 1.00
    if row["method"] == "head-affine":
        return 1.02
    if row["method"].endswith("-suffix"):
        return 1.05
    return 1.10 if row["n_query"] >= 8192 else 1.15


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def ratio_cell(row: Row | None, column: str = "ratio") -> str:
    if row is None or row.get(column) is None:
        return "-"
    text = number(row[column])
    return f"**{text}**" if row[column] > goal_of(row) else text


def _values(rows: Iterable[Row], *names: str) -> list[Any]:
    """Distinct values, or tuples of them, in the order in which they come."""
    return list(dict.fromkeys(tuple(row[name] for name in names) if len(names) > 1 else row[names[0]] for row in rows))


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _grid(rows: Sequence[Row], column: str) -> str:
    """Methods down; shape, batch and length across."""
    places = sorted(_values(rows, "batch", "n_key"))
    found = {(row["method"], row["batch"], row["n_key"]): row for row in rows}
    header = ["edit"] + [f"{_tokens(keys)}{'' if batch == 1 else f', batch {batch}'}" for batch, keys in places]
    body = [
        [method, *(ratio_cell(found.get((method, *place)), column) for place in places)]
        for method in _values(rows, "method")
    ]
    name = "sdpa_graph_ms" if column == "graph_ratio" else "sdpa_ms"
    sdpa = {(row["batch"], row["n_key"]): row[name] for row in rows if row.get(name) is not None}
    body.append(["SDPA, ms", *(number(sdpa.get(place), ".3g") for place in places)])
    return markdown_table(header, body)


def _against_others(rows: Sequence[Row]) -> str:
    header = ["edit", "tokens", "path", "ours, ms", "SDPA, ms", "eager / ours", "flex / ours", "peak / SDPA's peak"]
    body = []
    for row in sorted(rows, key=lambda row: (row["phase"] != "prefill", row["n_key"])):
        ours = row.get("ours_ms")
        if ours is None or row.get("ratio") is None:
            continue
        peak, sdpa_peak, inputs = row.get("peak_mib"), row.get("sdpa_peak_mib"), row.get("inputs_mib") or 0
        whole = None if peak is None or sdpa_peak is None else (inputs + peak) / (inputs + sdpa_peak)
        others = [row[name] / ours if row.get(name) else None for name in ("eager_ms", "flex_ms")]
        body.append(
            [
                row["method"],
                f"{row['phase']} {_tokens(row['n_key'])}",
                str(row.get("path")),
                number(ours, ".3g"),
                number(row["sdpa_ms"], ".3g"),
                number(others[0], ".1f"),
                number(others[1]),
                number(whole, ".3f"),
            ]
        )
    return markdown_table(header, body)


def edits_markdown(results: dict[str, Any]) -> str:
    """All tables of ``bench.edits``."""
    meta, rows = results["meta"], results["rows"]
    parts = [_origin(meta)]
    for phase in ("prefill", "decode"):
        for shape in _values(rows, "model_shape"):
            chosen = [row for row in rows if row["phase"] == phase and row["model_shape"] == shape]
            if not chosen:
                continue
            parts.append(f"**{phase.capitalize()}, {shape}**: time as a ratio to the best SDPA backend")
            parts.append(_grid(chosen, "ratio"))
            if any(row.get("graph_ratio") is not None for row in chosen):
                parts.append(f"**Decode, {shape}**: the same as the replay of a CUDA graph")
                parts.append(_grid(chosen, "graph_ratio"))
    if rows:
        shape = rows[0]["model_shape"]
        parts.append(f"**Against eager attention and flex_attention, {shape}, batch 1**")
        parts.append(_against_others([row for row in rows if row["model_shape"] == shape and row["batch"] == 1]))
    return "\n\n".join(parts)


def end_to_end_markdown(results: dict[str, Any]) -> str:
    """The table of ``bench.end_to_end``: speed as a share of the unwrapped model's."""
    meta, rows = results["meta"], results["rows"]
    parts = [_origin(meta)]
    for model in _values(rows, "model"):
        chosen = [row for row in rows if row["model"] == model]
        places = _values(chosen, "phase", "n_prompt")
        found = {(row["setting"], row["phase"], row["n_prompt"]): row for row in chosen}
        header = ["setting"]
        for phase, prompt in places:
            header += (
                [f"first token, {_tokens(prompt)}"]
                if phase == "prefill"
                else ["decode, CUDA graph"]
                if phase == "replay"
                else ["decode, forward loop", "decode, `generate`"]
            )
        body = []
        for setting in _values(chosen, "setting"):
            cells = [setting]
            for place in places:
                row = found.get((setting, *place), {})
                cells.append(_speed_cell(row, "speed_ratio"))
                if place[0] == "decode":
                    cells.append(_speed_cell(row, "generate_speed_ratio"))
            body.append(cells)
        parts += [f"**{model}**: speed as a share of the unwrapped model's", markdown_table(header, body)]
    return "\n\n".join(parts)


def _speed_cell(row: Row, column: str) -> str:
    share = row.get(column)
    if share is None:
        return "-"
    if row["setting"] == "unwrapped":
        absolute = (
            row.get("ms") if row["phase"] == "prefill" else row.get(column.replace("speed_ratio", "tokens_per_s"))
        )
        return f"{number(absolute, '.3g')} {'ms' if row['phase'] == 'prefill' else 'tokens/s'}"
    goal = NO_EDIT_GOAL if row["setting"] == "no edit" else EDITED_GOAL
    return f"**{share:.3f}**" if share < goal else f"{share:.3f}"


def _origin(meta: dict[str, Any]) -> str:
    return (
        f"{meta.get('gpu') or 'CPU'}, torch {meta['torch']}, Triton {meta.get('triton')}, cuDNN {meta.get('cudnn')}, "
        f"{meta['date'][:10]}, commit {meta.get('commit')}: `{meta['command']}`."
    )


def edits_summary(rows: Sequence[Row]) -> str:
    """Plain text that fits a terminal: ratios by case, then what is missing or wrong. ``*`` misses the goal."""
    methods = _values(rows, "method")
    lines = [f"{'':26}{'sdpa ms':>9} " + "".join(f"{method[:9]:>10}" for method in methods)]
    found = {(row["phase"], row["batch"], row["model_shape"], row["n_key"], row["method"]): row for row in rows}
    for case in sorted(_values(rows, "phase", "batch", "model_shape", "n_key"), reverse=False):
        phase, batch, shape, keys = case
        here = [found.get((*case, method)) for method in methods]
        sdpa = next((row["sdpa_ms"] for row in here if row and row["sdpa_ms"]), None)
        name = f"{phase[:7]} {shape[:5]} B{batch} {_tokens(keys)}"
        lines.append(
            f"{name:26}{number(sdpa, '.4f'):>9} " + "".join(f"{_plain_cell(row, 'ratio'):>10}" for row in here)
        )
        if any(row and row.get("graph_ratio") is not None for row in here):
            cells = "".join(f"{_plain_cell(row, 'graph_ratio'):>10}" for row in here)
            lines.append(f"{'   as a graph':26}{'':9} {cells}")
    for other in ("eager", "flex"):
        speedups = [
            row[f"{other}_ms"] / row["ours_ms"] for row in rows if row.get(f"{other}_ms") and row.get("ours_ms")
        ]
        if speedups:
            lines.append(f"{other} / ours: {min(speedups):.2f} to {max(speedups):.2f} in {len(speedups)} rows")
    problems = [
        f"{row['method']} {row['phase']} {row['model_shape'][:5]} B{row['batch']} {row['n_key']}: {name}: {text[:110]}"
        for row in rows
        for name, text in row["errors"].items()
    ]
    lines += [f"{len(problems)} problems", *problems[:30]]
    return "\n".join(lines)


def _plain_cell(row: Row | None, column: str) -> str:
    if row is None:
        return ""
    if row.get(column) is None:
        return "!" if column == "ratio" else "-"
    return f"{row[column]:.3f}{'*' if row[column] > goal_of(row) else ' '}"


def end_to_end_summary(rows: Sequence[Row]) -> str:
    """Plain text: one line a row."""
    lines = [f"{'':58}{'ms':>10}{'speed':>8}{'tok/s':>9}{'gen tok/s':>10}{'speed':>8}{'peak MiB':>10}"]
    for row in rows:
        name = f"{row['model'][:12]} {row['phase']} {_tokens(row['n_prompt'])} {row['setting']}"
        lines.append(
            f"{name:58}{number(row.get('ms')):>10}{number(row.get('speed_ratio'), '.3f'):>8}"
            f"{number(row.get('tokens_per_s'), '.1f'):>9}{number(row.get('generate_tokens_per_s'), '.1f'):>10}"
            f"{number(row.get('generate_speed_ratio'), '.3f'):>8}{number(row.get('peak_mib'), '.0f'):>10}"
        )
        lines += [f"    {where}: {text[:120]}" for where, text in row["errors"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, default=Path("bench/results/edits-h200.json"))
    parser.add_argument("--end-to-end", type=Path, default=Path("bench/results/end-to-end-h200.json"))
    options = parser.parse_args()
    for path, render in ((options.edits, edits_markdown), (options.end_to_end, end_to_end_markdown)):
        if path.exists():
            print(render(json.loads(path.read_text(encoding="utf-8"))), end="\n\n")


if __name__ == "__main__":
    main()
