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
from attn_eval.environment import describe_environment, unlike
from attn_eval.generation import Answer, answer_questions, generate_answers, plan_batches, plan_questions
from attn_eval.image_prompts import ImagePrompts
from attn_eval.loading import load_model, load_vision_model
from attn_eval.perplexity import PerplexityTask, Window
from attn_eval.prompting import PromptEncoder
from attn_eval.recipe import Recipe
from attn_eval.report import write_report
from attn_eval.results import (
    Items,
    Records,
    average_metric,
    disagreement_notes,
    grid_of,
    metrics_of,
    sample_log,
    timing_of,
)
from attn_eval.rows import Row, data_sha256, write_rows
from attn_eval.run_log import BASELINE, EDITED, FORMAT_VERSION, RESULTS, Record, RunLog, load_results
from attn_eval.tasks import GenerationTask, LengthTask, TaskSettings
from attn_eval.tasks.images import ImageTask, Question, Reply, decode
from attn_eval.yes_no import NO, YES

FINGERPRINT_VALUES = 64


@dataclass(frozen=True)
class Asker:
    """A model and what turns samples into its inputs.

    Attributes:
        model: as loaded; edits come and go.
        encoder: for prompts of text.
        prompts: for questions about images; None for a model of text.
        recipe: generation, batch size and seed.
    """

    model: Any
    encoder: PromptEncoder
    prompts: ImagePrompts | None
    recipe: Recipe


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
    baseline: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a recipe and write ``results.json``, ``table.md`` and, for a grid, a heat map into ``folder``.

    Samples that the folder's log already holds are not run again, so a killed run goes on with the same call.

    Args:
        recipe: what to run.
        folder: made if it isn't there.
        limit: at most so many samples of each task (of each cell of a grid); sample i stays the same.
        save_data: also write each task's rows to ``data/<task>.jsonl``.
        baseline: the folder of another run on the same model and data, whose answers without edits are taken over.
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
    asker = _load(recipe, tasks)
    model = asker.model
    if edits:
        # Raises what wrapping would raise, before any data is made.
        attn_hooks.explain(model, *edits)
    prepared = _prepare(tasks, asker.encoder, recipe.seed, console)
    if save_data:
        for task in prepared:
            rows = [item for item in task.items if isinstance(item, Row | Question)]
            if rows:
                write_rows(rows, folder / "data" / f"{task.settings.name}.jsonl")
    manifest, notes = _manifest(recipe, model, prepared, limit), _notes(asker, prepared)
    if baseline is not None:
        # Before the folder belongs to this run.
        RunLog.check_baseline(baseline, manifest)
    log = RunLog(folder, manifest)
    if baseline is not None:
        log.take_baseline(baseline)
        notes.append(f"the answers without edits, and their times, are those of {baseline}")
        notes += _made_elsewhere(baseline)

    runs = [BASELINE, EDITED] if edits else [BASELINE]
    started = time.perf_counter()
    resumed = sum(log.has(run, item.id) for run in runs for task in prepared for item in task.items)
    with progress_bars(console) as progress:
        for task in prepared:
            for run in runs:
                scope = attn_hooks.editing(model, *edits) if run == EDITED else nullcontext(model)
                _run_task(task, run, scope, asker, log, progress)
    seconds = time.perf_counter() - started

    results = _results(recipe, model, edits, prepared, log, runs, notes + _idle_edits(log))
    results["timing"] = {
        "seconds_of_this_call": seconds,
        "samples_of_earlier_calls": resumed,
        "tasks": {task.settings.name: timing_of(task.items, log.records, runs) for task in prepared},
    }
    for task in prepared:
        if isinstance(task.settings, ImageTask):
            for run in runs:
                write_answers(task.settings, task.items, _of_run(log.records, task.items, run), run, folder)
    write_report(results, folder)
    return results


def write_answers(task: ImageTask, items: Sequence[Any], records: dict[str, Record], run: str, folder: Path) -> None:
    """Write a run's answers under ``answers/TASK/RUN``, in the format that the benchmark's own script reads, and those
    that are read differently by other scripts into ``disagreements.jsonl`` beside them.
    """
    target = folder / "answers" / task.name / run
    target.mkdir(parents=True, exist_ok=True)
    answers = [(question, records[question.id]["prediction"]) for question in items]
    for name, content in task.answer_files(answers).items():
        (target / name).write_text(content, encoding="utf-8")
    unclear = [
        {"id": question.id, "image": question.image, "question": question.question, "gold": question.truth[0]}
        | {"answer": records[question.id]["prediction"], **records[question.id]["read"]["readings"]}
        for question in items
        if records[question.id]["read"].get("readings")
    ]
    if any("readings" in records[question.id]["read"] for question in items):
        lines = "".join(json.dumps(entry) + "\n" for entry in unclear)
        (target / "disagreements.jsonl").write_text(lines, encoding="utf-8")


def _load(recipe: Recipe, tasks: Sequence[TaskSettings]) -> Asker:
    if not any(isinstance(task, ImageTask) for task in tasks):
        model, tokenizer = load_model(recipe.model, recipe.dtype, recipe.device)
        return Asker(model, PromptEncoder(tokenizer, recipe.generation.chat_template), None, recipe)
    model, processor = load_vision_model(recipe.model, recipe.dtype, recipe.device)
    prompts = ImagePrompts(processor, recipe.generation.image_prompt)
    return Asker(model, PromptEncoder(prompts.tokenizer, recipe.generation.chat_template), prompts, recipe)


def _prepare(tasks: Sequence[TaskSettings], encoder: PromptEncoder, seed: int, console: Console) -> list[PreparedTask]:
    prepared = []
    with console.status("making the data") as status:
        for task in tasks:
            status.update(f"making the data of {task.name}")
            prepared.append(PreparedTask(task, task.items(encoder, seed)))
    return prepared


def _run_task(
    task: PreparedTask,
    run: str,
    scope: AbstractContextManager[Any],
    asker: Asker,
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
            for records in _records(task, run, asker, log):
                fresh = sum(not log.has(run, record["id"]) for record in records)
                log.add(records)
                progress.advance(bar, fresh)
            if run == EDITED:
                log.add_report(name, len(missing), attn_hooks.report(asker.model).to_dict())


def _made_elsewhere(baseline: Path) -> list[str]:
    """A note where the answers that were taken over may differ from this machine's, beside what the edits do."""
    if not (baseline / RESULTS).is_file():
        return [f"{baseline} is no finished run, so it is not known on what its answers were made"]
    changed = unlike(load_results(baseline)["environment"], describe_environment())
    if not changed:
        return []
    return [f"{baseline} was made elsewhere ({', '.join(changed)} here): differences are not the edits' alone"]


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


def _records(task: PreparedTask, run: str, asker: Asker, log: RunLog) -> Iterator[list[Record]]:
    settings = task.settings
    if isinstance(settings, PerplexityTask):
        for window in task.items:
            if isinstance(window, Window) and not log.has(run, window.id):
                yield [_measure_window(settings, run, asker.model, window)]
    elif isinstance(settings, GenerationTask):
        yield from _row_records(settings, task.items, run, asker, log)
    elif isinstance(settings, ImageTask):
        yield from _question_records(settings, task.items, run, asker, log)
    else:
        raise TypeError(
            f"{type(settings).__name__} must derive from GenerationTask, PerplexityTask or ImageTask to be run"
        )


def _row_records(settings: GenerationTask, items: Items, run: str, asker: Asker, log: RunLog) -> Iterator[list[Record]]:
    recipe = asker.recipe
    for batch in plan_batches([item for item in items if isinstance(item, Row)], recipe.batch_size):
        if all(log.has(run, row.id) for row in batch):
            continue
        answers = generate_answers(asker.model, asker.encoder, batch, recipe.generation, recipe.seed)
        yield [
            {
                **_answer_record(run, settings, row.id, answer),
                "score": settings.score(row, answer.text),
                "prompt_tokens": row.length_actual - row.new_tokens,
            }
            for row, answer in zip(batch, answers, strict=True)
        ]


def _question_records(settings: ImageTask, items: Items, run: str, asker: Asker, log: RunLog) -> Iterator[list[Record]]:
    recipe = asker.recipe
    if asker.prompts is None:
        raise TypeError(f"{settings.name} has images, so its model needs a processor")
    choices = asker.prompts.first_tokens((YES, NO)) if settings.wants_first_token else None
    for batch in plan_questions([item for item in items if isinstance(item, Question)], recipe.batch_size):
        if all(log.has(run, question.id) for question in batch):
            continue
        images = [decode(settings.image_bytes(question), question.image) for question in batch]
        answers = answer_questions(asker.model, asker.prompts, batch, images, recipe.generation, recipe.seed, choices)
        records = []
        for question, answer in zip(batch, answers, strict=True):
            first_token = None if answer.first_token is None else (answer.first_token[0], answer.first_token[1])
            judged = settings.judge(question, Reply(answer.text, answer.capped, first_token))
            records.append(
                {
                    **_answer_record(run, settings, question.id, answer),
                    "score": judged.score,
                    "counts": judged.counts,
                    "read": judged.read,
                    "first_token": first_token,
                    "prompt_tokens": answer.prompt_tokens,
                }
            )
        yield records


def _answer_record(run: str, task: TaskSettings, sample: str, answer: Answer) -> Record:
    return {
        "run": run,
        "task": task.name,
        "id": sample,
        "prediction": answer.text,
        "new_tokens": answer.new_tokens,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
    }


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
        "baseline_recipe": recipe.baseline_fingerprint(),
        "sample_limit": limit,
        "model_weights": weights_fingerprint(model),
        "data": {task.settings.name: task.sha256 for task in prepared},
        "task_versions": {task.settings.name: task.settings.version for task in prepared},
    }


def weights_fingerprint(model: Any) -> str:
    """A sha256 over every parameter's name, shape and first values: tells two checkpoints apart in no time."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        first = parameter.detach().flatten()[:FINGERPRINT_VALUES]
        digest.update(json.dumps(first.float().tolist()).encode())
    return digest.hexdigest()


def _notes(asker: Asker, prepared: Sequence[PreparedTask]) -> list[str]:
    """What a reader of the results must know beforehand."""
    notes = []
    tasks = [task.settings for task in prepared]
    longest = max((length for task in tasks if isinstance(task, LengthTask) for length in task.lengths), default=0)
    positions = getattr(asker.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        notes.append(f"lengths go up to {longest}, beyond the {positions} positions that the model's config gives")
    for task in prepared:
        settings = task.settings
        if isinstance(settings, PerplexityTask) and settings.add_bos and asker.encoder.tokenizer.bos_token_id is None:
            notes.append(f"{settings.name}: the tokenizer has no BOS token, so windows begin with text")
        if isinstance(settings, ImageTask):
            notes += settings.notes([item for item in task.items if isinstance(item, Question)])
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
    for settings, items in pairs:
        if isinstance(settings, ImageTask):
            for run in runs:
                notes = [
                    *notes,
                    *disagreement_notes(settings, run, [log.records[run, item.id]["read"] for item in items]),
                ]
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
            "weights_fingerprint": weights_fingerprint(model),
            "revision": getattr(model.config, "_commit_hash", None),
        },
        "modes": {
            "query_aware": True,
            "chat_template": recipe.generation.chat_template,
            "image_prompt": recipe.generation.image_prompt,
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
                "source": _source(task.settings),
                "samples": len(task.items),
                "grid": grid_of(task.settings, task.items, records, runs),
            }
            for task in prepared
        },
        "seeds": {"data": seed, "sampling": seed, "bootstrap": seed},
        "environment": describe_environment(),
        "samples": [entry for task, items in pairs for entry in sample_log(task, items, records, runs)],
    }


def _of_run(records: Records, items: Items, run: str) -> dict[str, Record]:
    return {item.id: records[run, item.id] for item in items}


def _haystack(task: TaskSettings) -> dict[str, str] | None:
    haystack = task.haystack_used()
    return None if haystack is None else {"name": haystack.name, "sha256": haystack.sha256}


def _source(task: TaskSettings) -> str:
    if not isinstance(task, ImageTask):
        return "made up"
    return f"data set {task.dataset}" if task.dataset else "published files"


def progress_bars(console: Console) -> Progress:
    """A bar a task: how many of how many, time gone and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
