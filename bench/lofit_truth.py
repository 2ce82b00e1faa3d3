"""Does it matter which heads LoFiT tunes? The paper's comparison (arXiv 2406.01563) on testbed-lm and generated data.

    python -m bench.lofit_truth --processes 12 --out bench/results/lofit-truth.json    # 3 seeds; minutes on a GPU
    python -m bench.lofit_truth --heads 5 --arms "lofit, selected; lofit, random"      # a tenth of the heads
    python -m bench.lofit_truth --seeds 0 --train 8 --test 8 --epochs 1 --arms "lora 1"   # a look

Exact match on two-hop questions of the model as it is, ITI, LoFiT on heads that its first stage selected, on heads by ITI's
probes, on random heads and on heads selected for kinship, RED, and LoRA on q_proj and v_proj. Every arm has a grid of
settings (learning rates; ITI's strength; rate and L1 weight of the first stage), of which the best on a seed of its own
(``--tuning-seed``) runs on the others. ``lofit, best random`` chooses among as many draws of heads as the first stage has
settings, ``lofit, random`` draws anew on each seed. Each seed has its own data and start values. Intervals are of paired
differences to the model as it is, resampling examples within each seed. ITI contrasts each prompt's answer with that of the
next example. What the file holds is not run again: after ``--budget-seconds`` the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import set_seed

import attn_hooks
from attn_eval.run_log import RunLog
from attn_eval.runner import progress_bars
from attn_eval.statistics import compare_paired
from attn_eval.training.measuring import measured
from attn_eval.training.probing import head_outputs_of
from attn_eval.training.recipe import LofitRecipe, Stage
from attn_eval.training.running import Head, Workplace, select
from attn_eval.training.stages import train_stage, write_json
from attn_hooks.lofit import RedConfig, random_heads
from attn_hooks.probes import fit_iti, probe_heads
from bench.shapes import Budget, environment

BASE = "base"
SELECTED, PROBES, RANDOM, OTHER = "lofit, selected", "lofit, probes", "lofit, random", "lofit, other task"
BEST_RANDOM = "lofit, best random"
TASK, OTHER_TASK = "two_hop", "kinship"
# Seeds of the draws to choose among, unlike those of data.
FIRST_DRAW = 1000
LOFIT_RATES = (1e-2, 3e-2, 1e-1, 3e-1)
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# (learning rate, L1 weight) of the first stage.
SELECTIONS = ((5e-3, 5e-4), (5e-3, 5e-3), (3e-2, 5e-4), (3e-2, 5e-3))
# A learning rate, or ITI's alpha, and the number of one of SELECTIONS or of a draw of heads.
Setting = tuple[float, int]


def grid(strengths: Sequence[float], choices: int = 1) -> tuple[Setting, ...]:
    return tuple(product(strengths, range(choices)))


GRIDS: dict[str, tuple[Setting, ...]] = {
    BASE: grid((0.0,)),
    "iti": grid((2.0, 5.0, 15.0)),
    **dict.fromkeys((SELECTED, OTHER, BEST_RANDOM), grid(LOFIT_RATES, len(SELECTIONS))),
    **dict.fromkeys((PROBES, RANDOM), grid(LOFIT_RATES)),
    "red": grid(LOFIT_RATES),
    **{f"lora {rank}": grid(LORA_RATES) for rank in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class Settings:
    """What all arms have in common; sizes in examples."""

    train: int
    test: int
    epochs: int
    heads: int
    tuning_seed: int
    device: str


@dataclass(frozen=True)
class Job:
    """One arm at one setting on one seed, or with ``arm`` None the ranking of a task's heads by one of ``SELECTIONS`` on a seed."""

    seed: int
    arm: str | None
    setting: Setting = (0.0, 0)
    task: str = TASK

    @property
    def key(self) -> str:
        strength, choice = self.setting
        return (
            f"{self.seed}/rank {self.task}/{choice}"
            if self.arm is None
            else f"{self.seed}/{self.arm}/{strength:g}/{choice}"
        )


def recipe_of(job: Job, settings: Settings) -> LofitRecipe:
    strength, choice = job.setting
    rate, l1 = SELECTIONS[choice]
    return LofitRecipe.model_validate(
        {
            "name": f"truth/{job.task}",
            "model": "testbed-lm",
            "dtype": "float32",
            "device": settings.device,
            "data": {"set": job.task, "train": settings.train, "validation": 0, "test": settings.test},
            "selection": {"learning_rate": rate, "l1": l1, "epochs": settings.epochs},
            "tuning": {"learning_rate": strength or 1.0, "epochs": settings.epochs},
            "num_heads": settings.heads,
            "new_tokens": 10,
            "seed": job.seed,
        }
    )


def scores(place: Workplace, model: Any, folder: Path) -> list[float]:
    log = RunLog(folder / "measured", {"arm": folder.name})
    for _ in measured(model.eval(), place.tokenizer, place.splits, place.recipe, "edited", log):
        pass
    return [float(log.records["edited", example.id]["score"]) for example in place.splits.test]


def trained(place: Workplace, model: Any, stage: Stage, folder: Path) -> dict[str, Any]:
    numbers = sum(value.numel() for value in model.parameters() if value.requires_grad)
    history = train_stage(
        model, place.tokenizer, place.splits, stage, place.recipe, folder, folder.name, console=place.console
    )
    steps = max(entry["step"] for entry in history)
    return {"scores": scores(place, model, folder), "trained_numbers": numbers, "steps": steps}


def run_job(job: Job, settings: Settings, rankings: dict[str, list[Head]]) -> dict[str, Any]:
    """What a job found: ``heads``, the best first, or ``scores`` by test example and ``trained_numbers``."""
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (rich writes to it until the process ends)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        place = Workplace(recipe_of(job, settings), work / job.task, quiet)
        if job.arm is None:
            return {"heads": [(layer, head) for layer, head, _ in select(place)]}
        if job.arm == BASE:
            return {"scores": scores(place, place.model, work / BASE), "trained_numbers": 0, "steps": 0}
        if job.arm in ("iti", PROBES):
            outputs, labels, groups = head_outputs_of(place.model, place.tokenizer, place.splits.train, 16)
            heads = probe_heads(outputs, labels, groups=groups).select(k=settings.heads)
            if job.arm == "iti":
                edit = fit_iti(outputs, labels, heads, alpha=job.setting[0])
                with attn_hooks.editing(place.model, edit):
                    return {
                        "scores": scores(place, place.model, work / "iti"),
                        "trained_numbers": edit.direction.numel(),
                        "steps": 0,
                    }
        elif job.arm == RANDOM:
            heads = random_heads(place.model, k=settings.heads, seed=job.seed)
        elif job.arm == BEST_RANDOM:
            heads = random_heads(place.model, k=settings.heads, seed=FIRST_DRAW + job.setting[1])
        elif job.arm in (SELECTED, OTHER):
            task = TASK if job.arm == SELECTED else OTHER_TASK
            heads = rankings[Job(job.seed, None, job.setting, task).key][: settings.heads]
        else:
            set_seed(job.seed)
            config: Any = RedConfig(task_type="CAUSAL_LM")
            if job.arm != "red":
                rank = int(job.arm.removeprefix("lora "))
                config = LoraConfig(
                    r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
                )
            return trained(place, get_peft_model(place.model, config), place.recipe.tuning, work / job.arm)
        heads = [(layer, head) for layer, head in heads]
        return trained(place, place.adapted(heads=heads), place.recipe.tuning, work / job.arm) | {"heads": heads}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def chosen_setting(done: dict[str, Any], arm: str, seed: int) -> Setting | None:
    """The best of the arm's grid on the tuning seed, of equal ones the smallest; None where one was not run."""
    found = {setting: done.get(Job(seed, arm, setting).key) for setting in GRIDS[arm]}
    if any(result is None for result in found.values()):
        return None
    return max(found, key=lambda setting: (mean(found[setting]["scores"]), -setting[0], -setting[1]))


def rows_of(done: dict[str, Any], seeds: Sequence[int], settings: dict[str, Setting]) -> list[dict[str, Any]]:
    """Accuracy of each arm at its setting that all seeds have, and its paired difference to the model as it is."""
    rows = []
    for arm, setting in settings.items():
        keys = [Job(seed, arm, setting).key for seed in seeds]
        bases = [Job(seed, BASE).key for seed in seeds]
        if not all(key in done for key in (*keys, *bases)):
            continue
        base, found = ([done[key]["scores"] for key in of] for of in (bases, keys))
        paired = compare_paired(base, found, 0)
        rows.append(
            {
                "arm": arm,
                "setting": setting[0],
                **({"selection": SELECTIONS[setting[1]]} if arm in (SELECTED, OTHER) else {}),
                "trained_numbers": done[keys[0]]["trained_numbers"],
                "steps": done[keys[0]]["steps"],
                "accuracy": paired.edited,
                "by_seed": [mean(scored) for scored in found],
                "difference": paired.difference,
                "interval": paired.interval,
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| arm | setting | trained numbers | steps | accuracy | by seed | difference | 95 % interval |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for row in rows:
        by_seed = ", ".join(f"{100 * value:.1f}" for value in row["by_seed"])
        interval = (
            "" if row["interval"] is None else f"{100 * row['interval'][0]:+.1f} to {100 * row['interval'][1]:+.1f}"
        )
        values = f"{100 * row['accuracy']:.1f} | {by_seed} | {100 * row['difference']:+.1f} | {interval}"
        setting = "" if row["arm"] == BASE else f"{row['setting']:g}"
        if "selection" in row:
            setting += f"; stage 1: {row['selection'][0]:g}, L1 {row['selection'][1]:g}"
        lines.append(f"| {row['arm']} | {setting} | {row['trained_numbers']:,} | {row['steps']} | {values} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy by arm; a point is a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1))
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, 100 * row["accuracy"], color="tab:blue" if row["arm"].startswith("lofit") else "silver")
        axes.plot([100 * value for value in row["by_seed"]], [place] * len(row["by_seed"]), "k.")
    axes.set_yticks(range(len(rows)), [f"{row['arm']} ({row['trained_numbers']:,})" for row in reversed(rows)])
    axes.set_xlabel("exact match, %")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


class Study:
    """Runs jobs in several processes and keeps each result in the file at once."""

    def __init__(self, settings: Settings, out: Path, processes: int, budget: Budget, meta: dict[str, Any]) -> None:
        self.settings, self.out, self.processes, self.budget = settings, out, processes, budget
        self.meta = meta | {"settings": vars(settings), "selections": SELECTIONS}
        kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
        if kept is not None and kept["meta"]["settings"] != vars(settings):
            raise ValueError(f"{out} was measured with other settings: give another --out")
        self.done: dict[str, Any] = {} if kept is None else kept["jobs"]
        self.rows: list[dict[str, Any]] = []

    def run(self, seeds: Sequence[int], arms: Sequence[str]) -> None:
        tuning = self.settings.tuning_seed
        tasks = {arm: task for arm, task in ((SELECTED, TASK), (OTHER, OTHER_TASK)) if arm in arms}
        choices = range(len(SELECTIONS))
        self._run("rank heads", [Job(tuning, None, (0.0, one), task) for one in choices for task in tasks.values()])
        self._run("tune", [Job(tuning, arm, setting) for arm in arms for setting in GRIDS[arm]])
        chosen = {arm: found for arm in arms if (found := chosen_setting(self.done, arm, tuning)) is not None}
        ranked = [(task, chosen[arm]) for arm, task in tasks.items() if arm in chosen]
        self._run("rank heads", [Job(seed, None, setting, task) for seed in seeds for task, setting in ranked])
        self._run("test", [Job(seed, arm, setting) for seed in seeds for arm, setting in chosen.items()])
        self.rows = rows_of(self.done, seeds, chosen)
        self._save()

    def _run(self, title: str, jobs: Iterable[Job]) -> None:
        todo = [job for job in jobs if job.key not in self.done]
        rankings = {
            key: [tuple(head) for head in found["heads"]] for key, found in self.done.items() if "/rank " in key
        }
        work: Callable[[Job], dict[str, Any]] = partial(run_job, settings=self.settings, rankings=rankings)
        with progress_bars(Console(stderr=True)) as progress:
            bar = progress.add_task(title, total=len(todo))
            for job, found in self._results(work, todo):
                self.done[job.key] = found
                self._save()
                progress.advance(bar)

    def _results(
        self, work: Callable[[Job], dict[str, Any]], todo: Sequence[Job]
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Jobs as they are done, until the time is out; those that run then are waited for."""
        if self.processes == 1:
            for job in todo:
                if self.budget.left <= 0:
                    return
                yield job, work(job)
            return
        if not todo or self.budget.left <= 0:
            return
        with ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(work, job): job for job in todo}
            waiting = set(running)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running[future], future.result()
                if self.budget.left <= 0:
                    waiting = {future for future in waiting if not future.cancel()}

    def _save(self) -> None:
        write_json(self.out, {"meta": self.meta, "rows": self.rows, "jobs": self.done})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-seed", type=int, default=100, help="of the data on which settings are chosen")
    parser.add_argument("--arms", help=f"a few of them, split by semicolons: {'; '.join(GRIDS)}")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--heads", type=int, default=16, help="of the model's 48 that LoFiT and ITI change")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget-seconds", type=float, help="start no run after so many seconds")
    parser.add_argument("--commit", help="commit to record, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("results/lofit-truth.json"))
    options = parser.parse_args()
    arms = list(GRIDS) if options.arms is None else [BASE, *(arm.strip() for arm in options.arms.split(";"))]
    unknown = [arm for arm in arms if arm not in GRIDS]
    if unknown:
        parser.error(f"no such arm: {unknown[0]!r}; there are {', '.join(map(repr, GRIDS))}")
    if options.tuning_seed in options.seeds:
        parser.error(f"settings are chosen on seed {options.tuning_seed}: give another --tuning-seed, or other --seeds")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    meta = environment("bench.lofit_truth", sys.argv[1:], options.commit)
    try:
        study = Study(settings, options.out, options.processes, Budget(options.budget_seconds), meta)
    except ValueError as problem:
        parser.error(str(problem))
    study.run(options.seeds, arms)
    table = table_of(study.rows)
    options.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    plot(study.rows, options.out.with_suffix(".png"))
    print(table)
    missing = [arm for arm in arms if arm not in {row["arm"] for row in study.rows}]
    if missing:
        print(f"out of time for {', '.join(missing)}: the same command goes on")


if __name__ == "__main__":
    main()
