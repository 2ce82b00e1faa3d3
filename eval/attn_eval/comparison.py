"""Two finished runs side by side: what changed, and how sure that is where they saw the same data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attn_eval.results import BASELINE, EDITED
from attn_eval.statistics import compare_paired


def compare_results(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics that both runs have, the second less the first.

    A run's value is that of its edited half, or of the baseline where the recipe has no edits. Paired statistics are
    given for scores where both runs have the same data (by hash) and the same sample ids; elsewhere the samples
    differ, and only the plain difference can be said.

    Returns:
        Records with task, length, metric, ``first``, ``second``, ``difference``, ``paired`` (bool) and, where paired,
        samples, interval, flips and McNemar's p.
    """
    runs = [_run_of(results) for results in (first, second)]
    ours = {(metric["task"], metric["length"], metric["metric"]): metric for metric in first["metrics"]}
    compared = []
    for metric in second["metrics"]:
        key = metric["task"], metric["length"], metric["metric"]
        if key not in ours:
            continue
        values = ours[key][runs[0]], metric[runs[1]]
        entry: dict[str, Any] = dict(zip(("task", "length", "metric"), key, strict=True))
        entry |= {"first": values[0], "second": values[1], "difference": values[1] - values[0], "paired": False}
        strata = _same_samples(first, second, runs, *key) if metric["metric"] == "score" else None
        if strata:
            paired = asdict(compare_paired(*strata, seed=second["seeds"]["bootstrap"]))
            statistics = ("samples", "interval", "right_to_wrong", "wrong_to_right", "mcnemar_p")
            entry |= {"paired": True, **{name: paired[name] for name in statistics}}
        compared.append(entry)
    return compared


def left_out(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Tasks that only one of the runs has, and tasks whose data differ: what a reader must know of a comparison."""
    notes = []
    for name in sorted({*first["tasks"], *second["tasks"]}):
        if name not in first["tasks"] or name not in second["tasks"]:
            where = "first" if name in first["tasks"] else "second"
            notes.append(f"{name}: only in the {where} run")
        elif first["tasks"][name]["data_sha256"] != second["tasks"][name]["data_sha256"]:
            notes.append(f"{name}: the data differ, so no paired statistics")
    return notes


def _run_of(results: dict[str, Any]) -> str:
    return EDITED if EDITED in results["runs"] else BASELINE


def _same_samples(
    first: dict[str, Any], second: dict[str, Any], runs: list[str], task: str, length: int | str, metric: str
) -> tuple[list[list[float]], list[list[float]]] | None:
    """The scores of both runs, a list for each task, or None if the data are not the same."""
    scored = [_scores(results, run) for results, run in zip((first, second), runs, strict=True)]
    if task == "average":
        names = [name for name in scored[0] if name in scored[1]]
        if set(scored[0]) != set(scored[1]):
            return None
    else:
        names = [task]
    strata: tuple[list[list[float]], list[list[float]]] = ([], [])
    for name in names:
        if first["tasks"][name]["data_sha256"] != second["tasks"][name]["data_sha256"]:
            return None
        chosen = [sample for sample, (at, _) in scored[0][name].items() if length in ("all", at)]
        for scores, stratum in zip(scored, strata, strict=True):
            stratum.append([scores[name][sample][1] for sample in chosen])
    return strata


def _scores(results: dict[str, Any], run: str) -> dict[str, dict[str, tuple[int, float]]]:
    """Task label -> sample id -> (length, score), for the tasks that have scores."""
    scores: dict[str, dict[str, tuple[int, float]]] = {}
    for sample in results["samples"]:
        if "score" in sample[run]:
            scores.setdefault(sample["label"], {})[sample["id"]] = sample["length"], sample[run]["score"]
    return scores
