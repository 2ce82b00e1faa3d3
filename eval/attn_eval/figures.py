"""A benchmark's figures from counts, with intervals that resample its images.

The questions about an image are not independent, so an image with all its questions is what is drawn. Baseline and
edited run are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_eval.statistics import CONFIDENCE, FULL_SCORE, bootstrap_p, mcnemar_exact, resampled_sums
from attn_eval.tasks.images import Figures, ImageTask, Totals

Metric = dict[str, Any]
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Scored:
    """One question with what each run made of it.

    Attributes:
        image: questions with one image are drawn together.
        stratum: images are drawn within it.
        parts: where the answer counts; a part that comes twice counts twice.
        scores: run -> 1.0 or 0.0.
        counts: run -> what is added up.
    """

    image: str
    stratum: str
    parts: Sequence[str]
    scores: Mapping[str, float]
    counts: Mapping[str, Mapping[str, float]]


def figures_of(task: ImageTask, samples: Sequence[Scored], runs: Sequence[str], seed: int) -> list[Metric]:
    """Every figure of every part: its value in each run with its 95 % interval and, for two runs, their difference
    (second less first) with its interval and, for the mean of scores, the flips, McNemar's exact p, which takes questions for
    independent, and ``bootstrap_p``, which draws images.
    """
    images = list(dict.fromkeys((sample.stratum, sample.image) for sample in samples))
    tables = [_image_sums(task, samples, run) for run in runs]
    columns = list(
        dict.fromkeys((part, name) for table in tables for (_, part), sums in table.items() for name in sums)
    )
    sums = np.array(
        [
            [[table.get((image, part), {}).get(name, 0.0) for part, name in columns] for image in images]
            for table in tables
        ]
    )
    observed = [task.figures(_totals(columns, table.sum(axis=0)[None])) for table in sums]
    drawn: list[Figures] | None = None
    strata = [stratum for stratum, _ in images]
    if min(map(strata.count, set(strata))) > 1:
        resampled = resampled_sums(np.concatenate(sums, axis=1), strata, seed)
        drawn = [task.figures(_totals(columns, part)) for part in np.split(resampled, len(runs), axis=1)]
    return [_metric(task, key, samples, runs, observed, drawn) for key in observed[0]]


def _image_sums(
    task: ImageTask, samples: Sequence[Scored], run: str
) -> dict[tuple[tuple[str, str], str], dict[str, float]]:
    """((stratum, image), part) -> sums of the counts of its answers."""
    sums: dict[tuple[tuple[str, str], str], dict[str, float]] = {}
    for sample in samples:
        for part in sample.parts:
            counts = sums.setdefault(((sample.stratum, sample.image), part), {})
            for name, value in sample.counts[run].items():
                counts[name] = counts.get(name, 0.0) + value
    return {key: counts | task.image_counts(counts) for key, counts in sums.items()}


def _metric(
    task: ImageTask,
    key: tuple[str, str],
    samples: Sequence[Scored],
    runs: Sequence[str],
    observed: Sequence[Figures],
    drawn: Sequence[Figures] | None,
) -> Metric:
    part, figure = key
    inside = [sample for sample in samples if part in sample.parts] or list(samples)
    metric: Metric = {
        "task": task.name,
        "length": part,
        "metric": figure,
        "unit": "" if figure in task.plain_figures else "share",
        "samples": sum(sample.parts.count(part) if part in sample.parts else len(sample.parts) for sample in inside),
    }
    for number, run in enumerate(runs):
        metric[run] = _value(observed[number][key])
        metric[f"{run}_interval"] = None if drawn is None else _interval(drawn[number][key])
    if len(runs) == 2:
        first, second = (metric[run] for run in runs)
        metric["difference"] = None if first is None or second is None else second - first
        metric["interval"] = None if drawn is None else _interval(drawn[1][key] - drawn[0][key])
        if figure in task.flip_figures:
            scores = [[sample.scores[run] >= FULL_SCORE for run in runs] for sample in inside]
            lost, won = sum(a and not b for a, b in scores), sum(b and not a for a, b in scores)
            metric |= {"right_to_wrong": lost, "wrong_to_right": won, "mcnemar_p": mcnemar_exact(lost, won)}
            metric["bootstrap_p"] = None if drawn is None else bootstrap_p(drawn[1][key] - drawn[0][key])
    return metric


def _totals(columns: Sequence[tuple[str, str]], sums: np.ndarray) -> Totals:
    totals: dict[str, dict[str, np.ndarray]] = {}
    for (part, name), values in zip(columns, sums.T, strict=True):
        totals.setdefault(part, {})[name] = values
    return totals


def _value(values: np.ndarray) -> float | None:
    value = float(np.asarray(values).reshape(-1)[0])
    return None if np.isnan(value) else value


def _interval(values: np.ndarray) -> Interval:
    """None where the figure is undefined in a resample: its spread is not known then."""
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
