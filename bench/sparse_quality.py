"""What sparse methods cost a model that retrieves: answers against density, for each method at three budgets.

    python -m bench.sparse_quality --processes 9                # testbed-lm to 8K tokens, one GPU and a core for each process
    python -m bench.sparse_quality --lengths 512 --samples 2 --tasks passkey,vt     # a look, on a CPU
    python -m bench.sparse_quality --table bench/results/sparse-quality.json        # the table of a file, nothing run

Every method answers the questions that the dense model answers: a needle grid over depth, pass keys, RULER's needle tasks and
variable tracking. Accuracy is the mean over tasks of their mean scores, its difference to the dense model's comes with a paired
bootstrap interval that resamples questions within each task. Density, recall and output error are of the prompt, on the first
questions of each task, with queries and keys of the dense model; ``recall_last`` is of the last row, which asks.

Goes on where it was stopped: answers lie in ``--work``, rows in the file. Rows of other methods in the file are kept, if they
were measured alike. Beside the JSON it writes a table (.md) and accuracy against density (.png).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attn_hooks
from attn_eval import EvaluationError, run_recipe
from attn_eval.loading import load_model
from attn_eval.prompting import PromptEncoder
from attn_eval.recipe import Recipe
from attn_eval.statistics import compare_paired
from attn_eval.tasks import build_task
from attn_hooks.recall import recall_of
from attn_kernels import Recall
from bench.render import markdown_table
from bench.shapes import Results, Row, environment

SEED = 42
DENSE = "dense"
BUDGETS = ("small", "middle", "large")
# For a model of 8192 tokens: blocks of 64, so that a prompt has 128.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "streaming": ({"window": 512}, {"window": 1024}, {"window": 4096}),
    "trishape": ({"window": 384}, {"window": 896}, {"window": 3968}),
    "power": ({"window_blocks": 4}, {"window_blocks": 16}, {"window_blocks": 48}),
    "vertical_slash": (
        {"vertical": 100, "slash": 100},
        {"vertical": 300, "slash": 300},
        {"vertical": 1000, "slash": 1000},
    ),
    "anchor": (
        {"block": 64, "step": 8, "theta": 4.0},
        {"block": 64, "step": 8, "theta": 8.0},
        {"block": 64, "step": 8, "theta": 12.0},
    ),
    "s2": (
        {"local_blocks": 4, "stride": 6, "shards": "query_heads"},
        {"local_blocks": 16, "stride": 6, "shards": "query_heads"},
        {"local_blocks": 16, "stride": 2},
    ),
    "dynamic_mask": ({"window": 512}, {"window": 1024}, {"window": 4096}),
    "moba": (
        {"block": 128, "top_k": 4},
        {"block": 128, "top_k": 8},
        {"block": 256, "top_k": 12},
    ),
    "xattention": (
        {"block": 64, "stride": 8, "threshold": 0.5},
        {"block": 64, "stride": 8, "threshold": 0.8},
        {"block": 64, "stride": 8, "threshold": 0.95},
    ),
}
_TEXT = {"start": "random"}
# Label -> the task. New tokens hold the longest answer; the grid's five depths share the samples.
TASKS: dict[str, dict[str, Any]] = {
    "grid": {"task": "needle_grid", "depths": [0, 25, 50, 75, 100], "new_tokens": 12, **_TEXT},
    "passkey": {"task": "passkey"},
    "niah_single_1": {"task": "niah_single_1", "new_tokens": 12},
    "niah_single_2": {"task": "niah_single_2", "new_tokens": 12, **_TEXT},
    "niah_single_3": {"task": "niah_single_3", "new_tokens": 48, **_TEXT},
    "niah_multikey_1": {"task": "niah_multikey_1", "keys": 8, "new_tokens": 12, **_TEXT},
    "niah_multikey_2": {"task": "niah_multikey_2", "new_tokens": 12},
    "niah_multikey_3": {"task": "niah_multikey_3", "new_tokens": 48},
    "niah_multivalue": {"task": "niah_multivalue", "new_tokens": 48, **_TEXT},
    "niah_multiquery": {"task": "niah_multiquery", "new_tokens": 48, **_TEXT},
    "vt": {"task": "variable_tracking", "hops": 4, "example_tokens": 0, "new_tokens": 48},
}
MEASURED = ("recall", "recall_p5", "density", "output_error")
ROWS_A_PROMPT = 128
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Setting:
    """A method at a budget; ``edit`` None: the model as it is."""

    method: str
    budget: str
    edit: attn_hooks.Edit | None

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}" if self.edit else DENSE


def settings_of(methods: Iterable[str]) -> list[Setting]:
    """Every method at its three budgets, the smallest first.

    Raises:
        EvaluationError: a method has no budgets here.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise EvaluationError(f"no budgets for {', '.join(unknown)}: there are some for {', '.join(METHODS)}")
    return [
        Setting(method, budget, attn_hooks.build_edit({"method": method, **parameters}))
        for method in methods
        for budget, parameters in zip(BUDGETS, METHODS[method], strict=True)
    ]


def sparse_methods() -> list[str]:
    """Those of the registry that choose keys."""
    return [name for name, method in attn_hooks.methods().items() if method.by_pattern]


class Study:
    """One model on one set of questions."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        self.tasks = [self._task(label) for label in options.tasks]

    def _task(self, label: str) -> dict[str, Any]:
        about = TASKS[label]
        samples = max(1, self.options.samples // len(about.get("depths", [0])))
        return {**about, "label": label, "lengths": self.options.lengths, "samples": samples}

    def conditions(self) -> dict[str, Any]:
        """What rows must have in common to stand in one file."""
        return {
            "model": Path(self.options.model).name,
            "dtype": self.dtype,
            "lengths": self.options.lengths,
            "samples": self.options.samples,
            "seed": SEED,
            "tasks": self.tasks,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }

    def answers(self, setting: Setting) -> dict[str, Any]:
        """The results of a run; the dense model's answers are taken over from its own."""
        edits = () if setting.edit is None else ({"method": setting.method, **setting.edit.model_dump(mode="json")},)
        recipe = Recipe(
            name=f"sparse-quality/{setting.name}", model=self.options.model, dtype=self.dtype, seed=SEED, edits=edits,
            tasks=tuple(self.tasks), batch_size=self.options.batch,
        )  # fmt: skip
        baseline = self.work / DENSE if setting.edit else None
        # One bar a task is enough: those of several processes would write over each other.
        console = Console(stderr=True, quiet=bool(setting.edit) and self.options.processes > 1)
        return run_recipe(recipe, self.work / setting.name, baseline=baseline, console=console)

    def kept(self, settings: Sequence[Setting]) -> dict[tuple[str, int], dict[str, float]]:
        """Recall, density and output error of each setting at each length, over the first prompts of all tasks.

        Measured numbers of a prompt are kept in ``kept.json``.
        """
        store = self.work / "kept.json"
        known: dict[str, dict[str, Any]] = json.loads(store.read_text("utf-8")) if store.exists() else {}
        prompts = list(self._prompts())
        for number, (place, ids) in enumerate(prompts, start=1):
            missing = [one for one in settings if one.edit and str(one.edit) not in known.setdefault(place, {})]
            if not missing:
                continue
            measured = recall_of(self.model, [one.edit for one in missing], ROWS_A_PROMPT, input_ids=ids)
            for position, one in enumerate(missing):
                known[place][str(one.edit)] = _numbers(measured.of(position))
            store.write_text(json.dumps(known), encoding="utf-8")
            print(f"recall {number}/{len(prompts)}: {place}", file=sys.stderr, flush=True)
        found = {}
        for length in self.options.lengths:
            for one in settings:
                of_prompts = [known[place][str(one.edit)] for place, _ in prompts if place.endswith(f"/{length}")]
                found[one.name, length] = {
                    name: sum(numbers[name] for numbers in of_prompts) / len(of_prompts) for name in of_prompts[0]
                }
        return found

    def _prompts(self) -> Iterable[tuple[str, torch.Tensor]]:
        self.model, tokenizer = load_model(self.options.model, self.dtype, "auto")
        encoder = PromptEncoder(tokenizer)
        for about in self.tasks:
            task: Any = build_task({**about, "samples": 1})
            for length in self.options.lengths:
                row = task.items_of(encoder, length, SEED)[0]
                ids = torch.tensor([encoder.encode(row.input, row.answer_prefix)], device=self.model.device)
                yield f"{about['label']}/{length}", ids


def _numbers(recall: Recall) -> dict[str, float]:
    return {**vars(recall.total()), "recall_last": float(recall.recall[:, :, -1].mean())}


def rows_of(
    setting: Setting, results: Mapping[str, Any], kept: Mapping[tuple[str, int], Mapping[str, float]]
) -> list[Row]:
    """One for each length."""
    run = "edited" if setting.edit else "baseline"
    rows = []
    for length in dict.fromkeys(sample["length"] for sample in results["samples"]):
        by_task: dict[str, list[tuple[float, float]]] = {}
        for sample in results["samples"]:
            if sample["length"] == length:
                by_task.setdefault(sample["label"], []).append((sample["baseline"]["score"], sample[run]["score"]))
        strata = [[list(scores) for scores in zip(*pairs, strict=True)] for pairs in by_task.values()]
        paired = compare_paired([dense for dense, _ in strata], [edited for _, edited in strata], SEED)
        row: Row = {
            "method": setting.method,
            "budget": setting.budget,
            "edit": str(setting.edit) if setting.edit else DENSE,
            "length": length,
            "accuracy": round(paired.edited, 4),
            "by_task": {
                task: round(sum(score for _, score in pairs) / len(pairs), 4) for task, pairs in by_task.items()
            },
            "samples": paired.samples,
        }
        if setting.edit:
            interval = None if paired.interval is None else [round(end, 4) for end in paired.interval]
            row |= {"difference": round(paired.difference, 4), "interval": interval}
            row |= {"right_to_wrong": paired.right_to_wrong, "wrong_to_right": paired.wrong_to_right}
            row |= {name: round(value, 4) for name, value in kept[setting.name, length].items()}
        else:
            row |= {"recall": 1.0, "recall_p5": 1.0, "recall_last": 1.0, "density": 1.0, "output_error": 0.0}
        rows.append(row)
    return rows


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats: none has at most their density and at least their accuracy, and one of the two better."""
    return sorted(
        (
            row
            for row in rows
            if not any(
                other["density"] <= row["density"]
                and other["accuracy"] >= row["accuracy"]
                and (other["density"], -other["accuracy"]) != (row["density"], -row["accuracy"])
                for other in rows
            )
        ),
        key=lambda row: row["density"],
    )


def quality_table(rows: Sequence[Row]) -> str:
    """Lengths and settings down; what stands on the Pareto front is in bold."""
    best = {
        id(row)
        for length in {row["length"] for row in rows}
        for row in pareto([r for r in rows if r["length"] == length])
    }
    body = []
    for row in sorted(rows, key=lambda row: (row["length"], row["method"] != DENSE, row["method"], row["density"])):
        accuracy = f"{100 * row['accuracy']:.1f}"
        difference = ""
        if "difference" in row:
            low, high = row["interval"] or (float("nan"), float("nan"))
            difference = f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        body.append(
            [
                str(row["length"]),
                row["edit"],
                *(f"{row[name]:.3f}" for name in ("density", "recall", "recall_p5", "recall_last", "output_error")),
                f"**{accuracy}**" if id(row) in best else accuracy,
                difference,
                f"{row['right_to_wrong']}/{row['wrong_to_right']}" if "difference" in row else "",
            ]
        )
    heads = ["tokens", "edit", "density", "recall", "recall p5", "recall of the last row", "output error"]
    return markdown_table([*heads, "accuracy", "difference", "lost/won"], body)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Accuracy against density, a panel for each length, a line for each method; dashed: the Pareto front."""
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    methods = sorted({row["method"] for row in rows} - {DENSE})
    figure = Figure(figsize=(1.0 + 4.0 * len(lengths), 4.2), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0], lengths, strict=True):
        here = [row for row in rows if row["length"] == length]
        front = pareto(here)
        axes.plot([row["density"] for row in front], [100 * row["accuracy"] for row in front], "k--", lw=0.8, alpha=0.5)
        for number, method in enumerate([*methods, DENSE]):
            points = sorted((row for row in here if row["method"] == method), key=lambda row: row["density"])
            values = [100 * row["accuracy"] for row in points]
            mark = "k*" if method == DENSE else f"C{number}{'osD^vPX'[number % 7]}-"
            axes.plot([row["density"] for row in points], values, mark, label=method, markersize=6)
        axes.set_xscale("log")
        ticks = [tick for tick in TICKS if tick >= 0.7 * min(row["density"] for row in here)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("density of the prompt's attention")
        axes.set_title(f"{length} tokens", fontsize=10)
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy (%)")
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def write_report(results: Results) -> None:
    """The table and the plot beside the JSON."""
    assert results.path is not None
    results.path.with_suffix(".md").write_text(quality_table(results.rows) + "\n", encoding="utf-8")
    about = f"{results.meta['model']}, {results.meta['samples']} questions a task, dashed: Pareto front"
    draw(results.rows, about, results.path.with_suffix(".png"))


def refuse_another_study(path: Path, wanted: Mapping[str, Any]) -> None:
    """Exits where the file holds rows that were measured in another way."""
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["meta"]
    unlike = [name for name, value in wanted.items() if before.get(name) != value]
    if unlike:
        raise SystemExit(f"{path} holds rows of other {', '.join(unlike)}: give another --out, and another --work")


def run(options: argparse.Namespace) -> None:
    study = Study(options)
    conditions = study.conditions()
    refuse_another_study(options.out, conditions)
    settings = settings_of(options.methods)
    meta = {**environment("bench.sparse_quality", sys.argv[1:], options.commit), **conditions}
    meta["without_budgets"] = [method for method in sparse_methods() if method not in METHODS]
    results = Results(options.out, meta, ("method", "budget", "length"))
    results.resume()
    dense = Setting(DENSE, DENSE, None)
    results.put(*rows_of(dense, study.answers(dense), {}))
    kept = study.kept(settings)
    began = time.monotonic()
    for count, (setting, found) in enumerate(_all_answers(study, settings), start=1):
        results.put(*rows_of(setting, found, kept))
        write_report(results)
        seconds = time.monotonic() - began
        print(f"{seconds:6.0f} s, {count}/{len(settings)} done: {setting.edit}", file=sys.stderr, flush=True)
    print(quality_table(results.rows))


def _all_answers(study: Study, settings: Sequence[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """As they come."""
    if study.options.processes == 1:
        yield from ((setting, study.answers(setting)) for setting in settings)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.options.processes, mp_context=context) as pool:
        waiting = {pool.submit(_answers, study.options, setting): setting for setting in settings}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _answers(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    torch.set_num_threads(1)
    # What the whole program says of an edit that changes nothing stands in the results.
    warnings.simplefilter("ignore", attn_hooks.EditNeverActedWarning)
    return Study(options).answers(setting)


def _numbers_of(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def _names_in(known: Iterable[str]) -> Any:
    def names(text: str) -> list[str]:
        given = re.split(r"[,\s]+", text.strip())
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return list(dict.fromkeys(given))

    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed-lm", help="a folder, a model id of the hub, or testbed-lm")
    parser.add_argument("--work", default="out/sparse_quality", help="answers; kept between calls")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sparse-quality.json"))
    parser.add_argument("--methods", type=_names_in(METHODS), default=list(METHODS), help="all by default")
    parser.add_argument("--tasks", type=_names_in(TASKS), default=list(TASKS), help="all by default")
    parser.add_argument(
        "--lengths", type=_numbers_of, default=[2048, 4096, 8192], help="tokens; default 2048,4096,8192"
    )
    parser.add_argument("--samples", type=int, default=50, help="questions of each task at each length")
    parser.add_argument("--batch", type=int, default=10, help="prompts at a time")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, on the same device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--commit", help="what to call the code where git does not know")
    parser.add_argument("--table", type=Path, help="print the table of this file and run nothing")
    options = parser.parse_args()
    if options.table:
        print(quality_table(json.loads(options.table.read_text(encoding="utf-8"))["rows"]))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attn_hooks.EditNeverActedWarning)
        try:
            run(options)
        except (EvaluationError, attn_hooks.AttnHooksError) as problem:
            raise SystemExit(str(problem)) from problem


if __name__ == "__main__":
    main()
