"""From a run's log to its figures: paired metrics for every task and length, cells of a grid, timing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from attn_eval.figures import Metric, Scored, figures_of
from attn_eval.perplexity import PerplexityTask, Window, WindowScore, summarise
from attn_eval.rows import Row
from attn_eval.run_log import BASELINE, EDITED, Record
from attn_eval.statistics import compare_paired, interval_of
from attn_eval.tasks import GenerationTask, LengthTask, TaskSettings
from attn_eval.tasks.images import ImageTask, Question
from attn_eval.tasks.needle_grid import NeedleGridTask

ALL_LENGTHS = "all"
ALL_TASKS = "average"

Records = dict[tuple[str, str], Record]
Items = Sequence[Row | Window | Question]


def metrics_of(task: TaskSettings, items: Items, records: Records, runs: Sequence[str], seed: int) -> list[Metric]:
    """The figures of one task: at each length and, for answers, over all lengths; of a benchmark with images, those
    of each part (a split, a category), which stands where a length does.

    Each is a flat record: task, length, metric, samples, one value a run and, with both runs, the difference, its
    95 % bootstrap interval and, for scores, the flips with McNemar's exact p.
    """
    if isinstance(task, ImageTask):
        return figures_of(task, _scored(task, items, records, runs), runs, seed)
    if not isinstance(task, LengthTask):
        raise TypeError(f"{type(task).__name__} must derive from LengthTask or ImageTask to be measured")
    metrics = []
    for length in task.lengths:
        at_length = [item for item in items if not isinstance(item, Question) and item.length_target == length]
        if isinstance(task, PerplexityTask):
            metrics += _likelihood_metrics(task, length, at_length, records, runs, seed)
        else:
            metrics.append(_score_metric(task.name, length, at_length, records, runs, seed))
    if isinstance(task, GenerationTask) and len(task.lengths) > 1:
        metrics.append(_score_metric(task.name, ALL_LENGTHS, items, records, runs, seed))
    return metrics


def average_metric(
    tasks: Sequence[tuple[TaskSettings, Items]], records: Records, runs: Sequence[str], seed: int
) -> list[Metric]:
    """RULER's average: the unweighted mean of the answer tasks' means; its interval resamples within each task."""
    groups = [items for task, items in tasks if isinstance(task, GenerationTask)]
    if len(groups) < 2:
        return []
    scores = {run: [[records[run, item.id]["score"] for item in items] for items in groups] for run in runs}
    return [{"task": ALL_TASKS, "length": ALL_LENGTHS, "metric": "score", **_paired(scores, runs, seed)}]


def grid_of(task: TaskSettings, items: Items, records: Records, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Mean scores by length and depth, for the heat map; empty for a task without a grid."""
    if not isinstance(task, NeedleGridTask):
        return []
    cells = []
    for length in task.lengths:
        for depth in task.depths:
            inside = [i for i in items if isinstance(i, Row) and i.length_target == length and i.depth == depth]
            means = {run: _mean(records[run, item.id]["score"] for item in inside) for run in runs}
            cells.append({"length": length, "depth": depth, "samples": len(inside), **means})
    return cells


def timing_of(items: Items, records: Records, runs: Sequence[str]) -> dict[str, Any]:
    """Seconds of each run in all, and tokens a second where they make sense."""
    timing = {}
    for run in runs:
        done = [records[run, item.id] for item in items]
        prefill, decode = (sum(record[f"{phase}_seconds"] for record in done) for phase in ("prefill", "decode"))
        prompt_tokens = sum(record["prompt_tokens"] for record in done)
        # A row's first token comes out of prefill.
        decoded = sum(max(record["new_tokens"] - 1, 0) for record in done)
        timing[run] = {
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "prefill_tokens_per_second": prompt_tokens / prefill if prefill else None,
            "decode_tokens_per_second": decoded / decode if decode and decoded else None,
        }
    return timing


def sample_log(task: TaskSettings, items: Items, records: Records, runs: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a sample: what was asked for, and what each run made of it."""
    log = []
    for item in items:
        about: dict[str, Any] = {"id": item.id, "task": item.task, "label": task.name}
        if isinstance(item, Question) and isinstance(task, ImageTask):
            about |= {
                "image": item.image,
                "stratum": task.stratum(item),
                "places": [list(place) for place in item.places],
            }
            about |= {"question": item.question, "truth": list(item.truth)}
        elif not isinstance(item, Question):
            about["length"] = item.length_target
        if isinstance(item, Row):
            about |= {"length_actual": item.length_actual, "depth": item.depth}
            about |= {"answer_positions": list(item.answer_positions), "outputs": list(item.outputs)}
        for run in runs:
            record = records[run, item.id]
            about[run] = {key: value for key, value in record.items() if key not in ("run", "task", "id")}
        log.append(about)
    return log


def disagreement_notes(task: ImageTask, run: str, read: Sequence[dict[str, Any]]) -> list[str]:
    """How many answers of a run other scripts read differently, and which scripts do.

    Args:
        task: for its name.
        run: baseline or edited.
        read: what was read in each answer.
    """
    unclear = [entry for entry in read if entry.get("readings")]
    if not unclear:
        return []
    found = Counter(name for entry in unclear for name, said in entry["readings"].items() if said != entry["said"])
    readers = ", ".join(f"{name} {count}" for name, count in found.most_common())
    return [f"{task.name}, {run}: {len(unclear)} of {len(read)} answers are read differently by others ({readers})"]


def _scored(task: ImageTask, items: Items, records: Records, runs: Sequence[str]) -> list[Scored]:
    return [
        Scored(
            image=item.image,
            stratum=task.stratum(item),
            parts=item.parts,
            scores={run: records[run, item.id]["score"] for run in runs},
            counts={run: records[run, item.id]["counts"] for run in runs},
        )
        for item in items
        if isinstance(item, Question)
    ]


def _score_metric(
    name: str, length: int | str, items: Items, records: Records, runs: Sequence[str], seed: int
) -> Metric:
    scores = {run: [[records[run, item.id]["score"] for item in items]] for run in runs}
    return {"task": name, "length": length, "metric": "score", **_paired(scores, runs, seed)}


def _paired(scores: dict[str, list[list[float]]], runs: Sequence[str], seed: int) -> dict[str, Any]:
    if EDITED in runs:
        return asdict(compare_paired(scores[BASELINE], scores[EDITED], seed))
    means = [_mean(stratum) for stratum in scores[BASELINE]]
    interval = interval_of(scores[BASELINE], seed)
    return {"samples": sum(map(len, scores[BASELINE])), "baseline": _mean(means), "baseline_interval": interval}


def _likelihood_metrics(
    task: PerplexityTask, length: int, items: Items, records: Records, runs: Sequence[str], seed: int
) -> list[Metric]:
    scores = {run: [window_score(records[run, item.id]) for item in items] for run in runs}
    figures = {run: _figures(summarise(scores[run])) for run in runs}
    metrics = []
    for name in figures[BASELINE]:
        metric: Metric = {"task": task.name, "length": length, "metric": name, "samples": len(items)}
        metric |= {run: figures[run][name] for run in runs}
        if EDITED in runs:
            metric["difference"] = metric[EDITED] - metric[BASELINE]
        if EDITED in runs and name == "nats_per_token":
            # Windows of one length score nearly the same number of tokens, so their means are resampled as equals.
            pairs = zip(scores[BASELINE], scores[EDITED], strict=True)
            gaps = [after.nll / after.tokens - before.nll / before.tokens for before, after in pairs]
            metric["interval"] = interval_of([gaps], seed)
        metrics.append(metric)
    return metrics


def _figures(summary: dict[str, Any]) -> dict[str, float]:
    """A summary's figures by name, those by position among them."""
    figures = {name: summary[name] for name in ("nats_per_token", "perplexity", "bits_per_byte")}
    by_position = summary["nats_per_token_by_position"]
    return figures | {f"nats_per_token at {bucket}": value for bucket, value in by_position.items()}


def window_score(record: Record) -> WindowScore:
    """The window's likelihoods as they stand in the log."""
    buckets = {name: (float(nll), int(tokens)) for name, (nll, tokens) in record["buckets"].items()}
    return WindowScore(record["nll"], record["tokens"], record["scored_bytes"], buckets)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
