"""Two finished runs side by side: what changed, and how sure that is where they saw the same data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attn_eval.figures import Metric, Scored, figures_of
from attn_eval.results import ALL_LENGTHS, ALL_TASKS, BASELINE, EDITED
from attn_eval.statistics import compare_paired
from attn_eval.tasks import build_task, task_class
from attn_eval.tasks.images import ImageTask

SAMPLE_METRICS = ("score", "nats_per_token")


def compare_results(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics that both runs have, the second less the first.

    A run's value is that of its edited half, or of the baseline where the recipe has no edits. Paired statistics are
    given for scores, nats a token and the figures of benchmarks with images, where both runs have the same data (by
    hash) and the same sample ids; elsewhere only the plain difference can be said.

    Returns:
        Records with task, length, metric, ``first``, ``second``, ``difference``, ``paired`` (bool) and, where paired,
        samples, interval, flips and McNemar's p; of benchmarks with images also ``bootstrap_p``, which draws images.
    """
    runs = [_run_of(results) for results in (first, second)]
    ours = {(metric["task"], metric["length"], metric["metric"]): metric for metric in first["metrics"]}
    paired_figures = _figures_of_both(first, second, runs)
    compared = []
    for metric in second["metrics"]:
        key = metric["task"], metric["length"], metric["metric"]
        if key not in ours:
            continue
        if key in paired_figures:
            compared.append(paired_figures[key] | {"paired": True})
            continue
        values = ours[key][runs[0]], metric[runs[1]]
        entry: dict[str, Any] = dict(zip(("task", "length", "metric"), key, strict=True))
        entry |= {name: metric[name] for name in ("unit",) if name in metric}
        difference = None if None in values else values[1] - values[0]
        entry |= {"first": values[0], "second": values[1], "difference": difference, "paired": False}
        strata = _same_samples(first, second, runs, *key)
        if strata:
            paired = asdict(compare_paired(*strata, seed=second["seeds"]["bootstrap"]))
            # A likelihood is never right or wrong, so it has no flips.
            flips = ("right_to_wrong", "wrong_to_right", "mcnemar_p") if metric["metric"] == "score" else ()
            entry |= {"paired": True, **{name: paired[name] for name in ("samples", "interval", *flips)}}
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


def _figures_of_both(
    first: dict[str, Any], second: dict[str, Any], runs: list[str]
) -> dict[tuple[str, str, str], Metric]:
    """(task, part, figure) -> the second run less the first, for benchmarks with images whose data are the same."""
    compared = {}
    for name, about in second["tasks"].items():
        if name not in first["tasks"] or first["tasks"][name]["data_sha256"] != about["data_sha256"]:
            continue
        if not issubclass(task_class(about["parameters"]["task"]), ImageTask):
            continue
        task = build_task(about["parameters"])
        assert isinstance(task, ImageTask)
        ours = {sample["id"]: sample for sample in first["samples"] if sample["label"] == name}
        samples = []
        for sample in second["samples"]:
            if sample["label"] == name:
                both = {"first": ours[sample["id"]][runs[0]], "second": sample[runs[1]]}
                parts = [part for part, _ in sample["places"]]
                scores = {run: record["score"] for run, record in both.items()}
                counts = {run: record["counts"] for run, record in both.items()}
                samples.append(Scored(sample["image"], sample["stratum"], parts, scores, counts))
        for metric in figures_of(task, samples, ("first", "second"), second["seeds"]["bootstrap"]):
            compared[name, metric["length"], metric["metric"]] = metric
    return compared


def _run_of(results: dict[str, Any]) -> str:
    return EDITED if EDITED in results["runs"] else BASELINE


def _same_samples(
    first: dict[str, Any], second: dict[str, Any], runs: list[str], task: str, length: int | str, metric: str
) -> tuple[list[list[float]], list[list[float]]] | None:
    """What both runs' samples have of a metric, a list for each task, or None if the data are not the same."""
    if metric not in SAMPLE_METRICS:
        return None
    measured = [_by_task(results, run, metric) for results, run in zip((first, second), runs, strict=True)]
    if task == ALL_TASKS and set(measured[0]) != set(measured[1]):
        return None
    strata: tuple[list[list[float]], list[list[float]]] = ([], [])
    for name in measured[0] if task == ALL_TASKS else [task]:
        if first["tasks"][name]["data_sha256"] != second["tasks"][name]["data_sha256"]:
            return None
        chosen = [sample for sample, (at, _) in measured[0][name].items() if length in (ALL_LENGTHS, at)]
        for values, stratum in zip(measured, strata, strict=True):
            stratum.append([values[name][sample][1] for sample in chosen])
    return strata


def _by_task(results: dict[str, Any], run: str, metric: str) -> dict[str, dict[str, tuple[int, float]]]:
    """Task label -> sample id -> (length, value), for the tasks that have the metric."""
    values: dict[str, dict[str, tuple[int, float]]] = {}
    for sample in results["samples"]:
        measured = sample[run]
        if "length" not in sample:
            continue
        if metric == "score" and "score" in measured:
            value = measured["score"]
        elif metric == "nats_per_token" and "nll" in measured:
            value = measured["nll"] / measured["tokens"]
        else:
            continue
        values.setdefault(sample["label"], {})[sample["id"]] = sample["length"], value
    return values
