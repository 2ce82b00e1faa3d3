"""A recipe, run: the same data through the model as it is and through the edited one, logged sample by sample."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import attn_hooks
from attn_eval.environment import describe_environment
from attn_eval.generation import generate_answers, plan_batches
from attn_eval.loading import load_model
from attn_eval.perplexity import PerplexityTask, Window
from attn_eval.prompting import PromptEncoder
from attn_eval.recipe import Recipe
from attn_eval.report import write_report
from attn_eval.results import (
    BASELINE,
    EDITED,
    Items,
    average_metric,
    grid_of,
    metrics_of,
    sample_log,
    timing_of,
)
from attn_eval.rows import Row, data_sha256, write_rows
from attn_eval.run_log import FORMAT_VERSION, Record, RunLog
from attn_eval.tasks import GenerationTask, TaskSettings

FINGERPRINT_VALUES = 64


@dataclass
class PreparedTask:
    """A task with its data, the same for every run."""

    settings: TaskSettings
    items: Items
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.sha256 = data_sha256(item.to_json() for item in self.items)


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    limit: int | None = None,
    save_data: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a recipe and write ``results.json``, ``table.md`` and, for a grid, a heat map into ``folder``.

    Samples that the folder's log already holds are not run again, so a killed run goes on with the same call.

    Args:
        recipe: what to run.
        folder: made if it isn't there.
        limit: at most so many samples of each task (of each cell of a grid); sample i stays the same.
        save_data: also write each task's rows to ``data/<task>.jsonl``.
        console: where progress goes; the standard error output by default.

    Returns:
        The content of ``results.json``.

    Raises:
        EvaluationError: the recipe, the model, the device or the folder can't be used.
        attn_hooks.AttnHooksError: an edit doesn't fit the model, or refuses a batch or a phase.
    """
    console = console or Console(stderr=True)
    edits = recipe.build_edits()
    tasks = recipe.build_tasks(limit)
    model, tokenizer = load_model(recipe.model, recipe.dtype, recipe.device)
    if edits:
        # Raises what wrapping would raise, before any data is made.
        attn_hooks.explain(model, *edits)
    encoder = PromptEncoder(tokenizer, recipe.generation.chat_template)
    prepared = _prepare(tasks, encoder, recipe.seed, console)
    if save_data:
        for task in prepared:
            if isinstance(task.settings, GenerationTask):
                rows = [item for item in task.items if isinstance(item, Row)]
                write_rows(rows, folder / "data" / f"{task.settings.name}.jsonl")
    log = RunLog(folder, _manifest(recipe, model, prepared, limit))

    notes = _notes(model, tokenizer, tasks)
    runs = [BASELINE, EDITED] if edits else [BASELINE]
    started = time.perf_counter()
    resumed = sum(log.has(run, item.id) for run in runs for task in prepared for item in task.items)
    with _progress(console) as progress:
        for task in prepared:
            for run in runs:
                scope = attn_hooks.editing(model, *edits) if run == EDITED else nullcontext(model)
                _run_task(task, run, scope, model, encoder, recipe, log, progress)
    seconds = time.perf_counter() - started

    results = _results(recipe, model, edits, prepared, log, runs, notes + _idle_edits(log))
    results["timing"] = {
        "seconds_of_this_call": seconds,
        "samples_of_earlier_calls": resumed,
        "tasks": {task.settings.name: timing_of(task.items, log.records, runs) for task in prepared},
    }
    write_report(results, folder)
    return results


def _prepare(tasks: Sequence[TaskSettings], encoder: PromptEncoder, seed: int, console: Console) -> list[PreparedTask]:
    prepared = []
    with console.status("making the data") as status:
        for task in tasks:
            status.update(f"making the data of {task.name}")
            items: list[Row | Window] = []
            for length in task.lengths:
                items += task.items(encoder, length, seed)
            prepared.append(PreparedTask(task, items))
    return prepared


def _run_task(
    task: PreparedTask,
    run: str,
    scope: AbstractContextManager[Any],
    model: Any,
    encoder: PromptEncoder,
    recipe: Recipe,
    log: RunLog,
    progress: Progress,
) -> None:
    """Run what the log does not hold yet."""
    name = task.settings.name
    missing = [item for item in task.items if not log.has(run, item.id)]
    bar = progress.add_task(f"{name}, {run}", total=len(task.items), completed=len(task.items) - len(missing))
    if not missing:
        return
    with warnings.catch_warnings():
        # An edit that never acted is said in the results, where it can't be missed.
        warnings.simplefilter("ignore", attn_hooks.EditNeverActedWarning)
        with scope:
            for records in _records(task, run, model, encoder, recipe, log):
                fresh = sum(not log.has(run, record["id"]) for record in records)
                log.add(records)
                progress.advance(bar, fresh)
            if run == EDITED:
                log.add_report(name, len(missing), attn_hooks.report(model).to_dict())


def _idle_edits(log: RunLog) -> list[str]:
    """A note for every task in which an edit was in force and not one call reached it."""
    calls: dict[tuple[str, str], int] = {}
    for entry in log.reports():
        for edit in entry["report"]["edits"]:
            key = entry["task"], edit["method"]
            calls[key] = calls.get(key, 0) + sum(edit["calls"].values())
    return [
        f"{task}: the edit {method} never acted, so both runs are the baseline"
        for (task, method), count in calls.items()
        if not count
    ]


def _records(
    task: PreparedTask, run: str, model: Any, encoder: PromptEncoder, recipe: Recipe, log: RunLog
) -> Iterator[list[Record]]:
    settings = task.settings
    if isinstance(settings, PerplexityTask):
        for window in task.items:
            if isinstance(window, Window) and not log.has(run, window.id):
                yield [_measure_window(settings, run, model, window)]
    elif isinstance(settings, GenerationTask):
        rows = [item for item in task.items if isinstance(item, Row)]
        for batch in plan_batches(rows, recipe.batch_size):
            if all(log.has(run, row.id) for row in batch):
                continue
            answers = generate_answers(model, encoder, batch, recipe.generation, recipe.seed)
            yield [
                {
                    "run": run,
                    "task": settings.name,
                    "id": row.id,
                    "prediction": answer.text,
                    "score": settings.score(row, answer.text),
                    "prompt_tokens": row.length_actual - row.new_tokens,
                    "new_tokens": answer.new_tokens,
                    "prefill_seconds": answer.prefill_seconds,
                    "decode_seconds": answer.decode_seconds,
                }
                for row, answer in zip(batch, answers, strict=True)
            ]
    else:
        raise TypeError(f"{type(settings).__name__} must derive from GenerationTask or PerplexityTask to be run")


def _measure_window(task: PerplexityTask, run: str, model: Any, window: Window) -> Record:
    start = time.perf_counter()
    score = asdict(task.measure(model, window))
    seconds = time.perf_counter() - start
    decoding = task.mode == "decode"
    return {
        "run": run,
        "task": task.name,
        "id": window.id,
        **score,
        "prompt_tokens": len(window.token_ids),
        "new_tokens": score["tokens"] if decoding else 0,
        "prefill_seconds": 0.0 if decoding else seconds,
        "decode_seconds": seconds if decoding else 0.0,
    }


def _manifest(recipe: Recipe, model: Any, prepared: Sequence[PreparedTask], limit: int | None) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.fingerprint(),
        "sample_limit": limit,
        "model_weights": _weights_fingerprint(model),
        "data": {task.settings.name: task.sha256 for task in prepared},
        "task_versions": {task.settings.name: task.settings.version for task in prepared},
    }


def _weights_fingerprint(model: Any) -> str:
    """A sha256 over every parameter's name, shape and first values: tells two checkpoints apart in no time."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        first = parameter.detach().flatten()[:FINGERPRINT_VALUES]
        digest.update(json.dumps(first.float().tolist()).encode())
    return digest.hexdigest()


def _notes(model: Any, tokenizer: Any, tasks: Sequence[TaskSettings]) -> list[str]:
    """What a reader of the results must know beforehand."""
    notes = []
    longest = max(length for task in tasks for length in task.lengths)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        notes.append(f"lengths go up to {longest}, beyond the {positions} positions that the model's config gives")
    for task in tasks:
        if isinstance(task, PerplexityTask) and task.add_bos and tokenizer.bos_token_id is None:
            notes.append(f"{task.name}: the tokenizer has no BOS token, so windows begin with text")
    return notes


def _results(
    recipe: Recipe,
    model: Any,
    edits: Sequence[attn_hooks.Edit],
    prepared: Sequence[PreparedTask],
    log: RunLog,
    runs: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    pairs = [(task.settings, task.items) for task in prepared]
    records, seed = log.records, recipe.seed
    metrics = [metric for task, items in pairs for metric in metrics_of(task, items, records, runs, seed)]
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.fingerprint(),
        "runs": list(runs),
        "model": {
            "name": recipe.model,
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "baseline_attention": model.config._attn_implementation,
            "weights_fingerprint": _weights_fingerprint(model),
            "revision": getattr(model.config, "_commit_hash", None),
        },
        "modes": {
            "query_aware": True,
            "chat_template": recipe.generation.chat_template,
            "truncation": "none: every prompt is made to fit",
            "padding": "left" if recipe.batch_size > 1 else "none",
        },
        "edits": [{"method": edit.method, **edit.model_dump(mode="json")} for edit in edits],
        "edit_reports": log.reports(),
        "notes": list(notes),
        "metrics": metrics + average_metric(pairs, records, runs, seed),
        "tasks": {
            task.settings.name: {
                "version": task.settings.version,
                "parameters": task.settings.model_dump(mode="json"),
                "data_sha256": task.sha256,
                "haystack": _haystack(task.settings),
                "samples": len(task.items),
                "grid": grid_of(task.settings, task.items, records, runs),
            }
            for task in prepared
        },
        "seeds": {"data": seed, "sampling": seed, "bootstrap": seed},
        "environment": describe_environment(),
        "samples": [entry for task, items in pairs for entry in sample_log(task.name, items, records, runs)],
    }


def _haystack(task: TaskSettings) -> dict[str, str] | None:
    haystack = task.haystack_used()
    return None if haystack is None else {"name": haystack.name, "sha256": haystack.sha256}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
