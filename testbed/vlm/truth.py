"""What every intervention does to testbed-vlm: POPE and CHAIR at its defaults, and at the best of a small grid.

    python -m testbed.vlm.truth run --work out/truth --processes 12      # tune, choose, test; goes on where it was stopped
    python -m testbed.vlm.truth run --work out/truth --methods pai,vhr --scenes 50
    python -m testbed.vlm.truth table bench/results/testbed-vlm.json     # the docs' table

Every setting of a method's grid is run on the split ``tune``, whose scenes miss their objects' companions as those of ``test``
do. One is chosen for POPE (accuracy, mean of the three splits) and one for CHAIR (the lowest CHAIR_S among settings whose recall
is at most ``RECALL_KEPT`` below the unedited model's; if there is none, the best F1). The defaults and the chosen ones then run
on ``test``, each paired with the unedited model's answers, greedy, or with beams on both sides where a study has some.
Nothing is chosen on ``test``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from testbed.vlm import MODEL
from testbed.vlm.evaluate import recipe, scenes_folder
from testbed.vlm.splits import SPLITS

RECALL_KEPT = 0.02
DIGITS = 4
# Where the most of a token's hidden state is in one dimension: testbed-vlm has no sinks at VAR's 20.
SINK_TAUS = (9.0, 10.0)
SINK_SCENES = 16

Settings = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A method, the settings that differ from its own defaults on this model, and the grid around them.

    With ``beams`` both sides of every pair have as many, the tuning, too.
    """

    method: str
    axes: Mapping[str, Sequence[Any]]
    base: Mapping[str, Any] = field(default_factory=dict)
    beams: int = 1

    @property
    def name(self) -> str:
        return with_beams(self.method, self.beams)

    def grid(self) -> list[Settings]:
        return [{**self.base, **dict(zip(self.axes, values, strict=True))} for values in product(*self.axes.values())]


# Six layers of four heads: layers and shares of heads are this model's own, strengths are around the published ones.
# Its pictures come as -1 to 1.
BLACK = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
ALL_LAYERS, LATE_LAYERS = (0, 1, 2, 3, 4, 5), (3, 4, 5)
STUDIES = (
    Study("var", {"tau": SINK_TAUS, "p": (0.0, 0.4, 0.6), "rho": (0.5, 0.8)}),
    Study("pai", {"alpha": (0.05, 0.1, 0.2, 0.5), "gamma": (1.0, 1.1, 1.5, 2.0)}),
    Study("spin", {"r": (0.75, 0.5), "eps": (0.05, 0.3, 0.6, 0.8)}),
    Study("imbalanced", {"alpha": (0.2, 0.4, 0.7), "beta": (0.1, 0.4), "gamma": (1.0, 1.1)}),
    Study("vhr", {"alpha": (1.1, 1.2, 1.5, 2.0), "layers": (LATE_LAYERS, ALL_LAYERS), "rows": ("generated", "text")}),
    Study("eah", {"threshold": (0.002, 0.01, 0.03), "layers": ((0,), (1,), (2,))}),
    Study("vcd", {"alpha": (0.25, 0.5, 1.0, 2.0), "step": (300, 500, 700)}),
    Study("damro", {"alpha": (0.25, 0.5, 1.5), "tokens": (5, 10, 20)}),
    Study("agla", {"alpha": (0.5, 1.0, 2.0), "keep": (0.5, 0.8, 0.95)}, base=BLACK),
    Study("opera", {"alpha": (1.0, 10.0), "sigma": (50.0, 100.0, 200.0), "faithful": ("paper", "code")}),
    Study("opera", {"alpha": (1.0, 3.0, 10.0), "sigma": (50.0, 70.0), "faithful": ("paper", "code")}, beams=5),
    Study("act", {"beta": (0.2, 0.4, 0.7), "alpha": (3.0, 5.0)}),
    Study("pasta", {"alpha": (0.01, 0.1, 0.5)}, base={"spans": "image"}),
)


@dataclass(frozen=True)
class Ask:
    """One run: a method, or the model as it is, and how many beams write the answers."""

    method: str | None = None
    settings: Settings = field(default_factory=dict)
    beams: int = 1

    @property
    def name(self) -> str:
        return f"{with_beams(self.method or 'unedited', self.beams)} {label(self.settings)}"


def with_beams(name: str, beams: int) -> str:
    return name if beams == 1 else f"{name}-beams-{beams}"


def label(settings: Mapping[str, Any]) -> str:
    """A folder's name for settings."""
    told = [f"{name}={value}".replace(" ", "").strip("()") for name, value in settings.items() if name != "dims"]
    return "_".join(told).replace("(", "").replace(")", "").replace("/", "-") or "default"


@dataclass(frozen=True)
class Place:
    """Where and on what a run takes place."""

    model: Path
    work: Path
    dtype: str
    batch: int
    scenes: int | None

    def scenes_of(self, split: str) -> Path:
        return scenes_folder(self.work / "scenes", SPLITS[split], self.scenes or SPLITS[split].scenes)

    def folder(self, split: str, ask: Ask) -> Path:
        method = with_beams(ask.method or "unedited", ask.beams)
        return self.work / self.dtype / f"{split}_{self.scenes or SPLITS[split].scenes}" / method / label(ask.settings)


def measure(place: Place, split: str, ask: Ask) -> list[dict[str, Any]]:
    """The paired figures of POPE and CHAIR under one edit, or those of the model as it is."""
    from rich.console import Console

    from attn_eval import run_recipe
    from attn_eval.recipe import GenerationSettings

    asked = recipe(place.model, place.scenes_of(split))
    edits = ({"method": ask.method, **ask.settings},) if ask.method else ()
    asked = asked.model_copy(
        update={
            "name": f"testbed-vlm/{split}", "dtype": place.dtype, "batch_size": place.batch, "edits": edits,
            "generation": GenerationSettings(num_beams=ask.beams),
            "tasks": tuple(task for task in asked.tasks if task["task"] != "mme"),
        }
    )  # fmt: skip
    results = run_recipe(
        asked,
        place.folder(split, ask),
        baseline=place.folder(split, Ask(beams=ask.beams)) if ask.method else None,
        console=Console(quiet=True),
    )
    return list(results["metrics"])


def figures(metrics: Iterable[Mapping[str, Any]], run: str) -> dict[str, float]:
    """``task/part/metric`` -> value, those that are defined: captions that name nothing have no precision."""
    return {
        f"{metric['task']}/{metric['length']}/{metric['metric']}": round(metric[run], DIGITS)
        for metric in metrics
        if metric.get(run) is not None and "length" in metric
    }


def paired(metrics: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``task/part/metric`` -> both runs' values, their difference and its interval."""
    return {
        f"{metric['task']}/{metric['length']}/{metric['metric']}": {
            name: _rounded(metric[name]) for name in ("baseline", "edited", "difference", "interval")
        }
        for metric in metrics
        if "length" in metric
    }


def _rounded(value: Any) -> Any:
    if value is None:
        return None
    return round(value, DIGITS) if isinstance(value, float) else [round(end, DIGITS) for end in value]


def choose(tuned: Sequence[tuple[Settings, dict[str, float]]], unedited: Mapping[str, float]) -> dict[str, Settings]:
    """The settings for POPE and for CHAIR, from figures on the split ``tune``; the first of equals."""
    keep = unedited["chair/all/recall"] - RECALL_KEPT
    kept = [(settings, found) for settings, found in tuned if found.get("chair/all/recall", 0.0) >= keep]
    return {
        "pope": max(tuned, key=lambda entry: entry[1]["pope/all/accuracy"])[0],
        "chair": min(kept, key=lambda entry: entry[1]["chair/all/chair_s"])[0]
        if kept
        else max(tuned, key=lambda entry: entry[1].get("chair/all/f1", 0.0))[0],
    }


def sink_dims(place: Place) -> dict[float, tuple[int, ...]]:
    """For each tau the dimensions in which tokens of the split ``tune`` reach it."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from attn_eval.image_prompts import ImagePrompts
    from attn_hooks.sinks import find_sink_dims
    from testbed.vlm.text import DETAILED_PROMPTS

    scenes = sorted((place.scenes_of("tune") / "images").iterdir())[:SINK_SCENES]
    pictures = [Image.open(scene).convert("RGB") for scene in scenes]
    prompts = ImagePrompts(AutoProcessor.from_pretrained(place.model))
    model = LlavaForConditionalGeneration.from_pretrained(place.model, dtype=torch.float32).eval()
    inputs = prompts.encode([DETAILED_PROMPTS[0]] * len(pictures), pictures)
    return {tau: tuple(find_sink_dims(model, tau, **inputs).dims) for tau in SINK_TAUS}


def _one(place: Place, split: str, ask: Ask) -> Any:
    import torch

    from attn_eval import EvaluationError
    from attn_hooks import AttnHooksError

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        return measure(place, split, ask)
    except (EvaluationError, AttnHooksError) as problem:
        return str(problem)
    except Exception:
        return traceback.format_exc()


class Runs:
    """Runs in several processes; what failed is kept and told at the end."""

    def __init__(self, place: Place, pool: ProcessPoolExecutor) -> None:
        self.place, self.pool = place, pool
        self.errors: list[dict[str, Any]] = []

    def __call__(self, split: str, asked: Sequence[Ask]) -> list[Any]:
        """The metrics of each, None for one that failed."""
        waiting = {self.pool.submit(_one, self.place, split, ask): number for number, ask in enumerate(asked)}
        found: list[Any] = [None] * len(asked)
        began = time.monotonic()
        for count, future in enumerate(as_completed(waiting), start=1):
            ask, result = asked[waiting[future]], future.result()
            if isinstance(result, str):
                self.errors.append({"split": split, **told_of(ask), "error": result})
            else:
                found[waiting[future]] = result
            state = "FAILED" if isinstance(result, str) else "done"
            print(f"{time.monotonic() - began:6.0f} s {count}/{len(asked)} {split} {ask.name} {state}", flush=True)
        return found


def told_of(ask: Ask) -> dict[str, Any]:
    """What a row says of its run; of beams only where there were some."""
    return {"method": ask.method, "settings": ask.settings} | ({"beams": ask.beams} if ask.beams > 1 else {})


def run(place: Place, studies: Sequence[Study], processes: int, out: Path) -> dict[str, Any]:
    """Tune, choose, test.

    Args:
        place: model, scenes and folders.
        studies: what to measure.
        processes: runs at a time.
        out: where the results will be joined to; only read.

    Returns:
        ``{"meta", "unedited", "tune", "test", "errors"}``: each row of ``tune`` has method, settings and figures; each of
        ``test`` method, what its settings are (default, or chosen for pope or chair), settings, and paired metrics; both the
        beams where there were some. ``unedited`` has the model's own figures by split, and by split and beams.
    """
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _run(place, studies, Runs(place, pool), out)


def _run(place: Place, studies: Sequence[Study], runs: Runs, out: Path) -> dict[str, Any]:
    from attn_eval.environment import describe_environment

    for split in ("tune", "test"):
        place.scenes_of(split)

    def completed(study: Study, settings: Settings) -> list[Ask]:
        """With the dimensions that VAR needs; none where no token reaches this tau."""
        if study.method != "var":
            return [Ask(study.method, settings, study.beams)]
        found = dims[settings.get("tau", SINK_TAUS[0])]
        with_dims = {**settings, "tau": settings.get("tau", SINK_TAUS[0]), "dims": found}
        return [Ask(study.method, with_dims, study.beams)] if found else []

    # Greedy in any case: all runs of one file must have that in common.
    beams = sorted({1, *(study.beams for study in studies)})
    unedited: dict[str, dict[str, float]] = {}
    for split in ("tune", "test"):
        for number, metrics in zip(beams, runs(split, [Ask(beams=number) for number in beams]), strict=True):
            if metrics is None:
                raise SystemExit(f"{place.model} can't be measured without edits: {runs.errors[0]['error']}")
            unedited[with_beams(split, number)] = figures(metrics, "baseline")
    refuse_other_answers(out, unedited)
    if any(study.method == "var" for study in studies):
        dims = sink_dims(place)
        print(f"dimensions of sinks by tau: {dims}", flush=True)
    asked = [ask for study in studies for one in study.grid() for ask in completed(study, one)]
    tuned = [
        (ask, figures(metrics, "edited"))
        for ask, metrics in zip(asked, runs("tune", asked), strict=True)
        if metrics is not None
    ]
    testing: list[tuple[str, Ask]] = []
    for study in studies:
        testing += [("default", ask) for ask in completed(study, dict(study.base))]
        mine = [(ask.settings, found) for ask, found in tuned if (ask.method, ask.beams) == (study.method, study.beams)]
        if mine:
            chosen = choose(mine, unedited[with_beams("tune", study.beams)])
            testing += [(purpose, Ask(study.method, one, study.beams)) for purpose, one in chosen.items()]
    unique = {ask.name: ask for _, ask in testing}
    tested = dict(zip(unique, runs("test", list(unique.values())), strict=True))
    return {
        "meta": {
            **conditions(place),
            "command": " ".join(["python -m testbed.vlm.truth", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"), "environment": describe_environment(),
        },
        "unedited": unedited,
        "tune": [{**told_of(ask), "figures": found} for ask, found in tuned],
        "test": [
            {**told_of(ask), "purpose": purpose, "metrics": paired(tested[ask.name])}
            for purpose, ask in testing
            if tested[ask.name] is not None
        ],
        "errors": runs.errors,
    }  # fmt: skip


def one_row_a_line(found: Mapping[str, Any]) -> str:
    """JSON, whose lists stand one entry a line."""
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in part) + "\n]"
        if isinstance(part, list)
        else f'"{name}": {json.dumps(part)}'
        for name, part in found.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def conditions(place: Place) -> dict[str, Any]:
    """What runs must have in common to stand in one file."""
    return {
        "model": place.model.name,
        "dtype": place.dtype,
        "batch_size": place.batch,
        "scenes": {split: place.scenes or SPLITS[split].scenes for split in ("tune", "test")},
        "seeds": {split: SPLITS[split].seed for split in ("tune", "test")},
        "recall_kept": RECALL_KEPT,
    }


def read(results: Path) -> dict[str, Any] | None:
    """A run's file; None where there is none.

    Raises:
        SystemExit: it is no such file.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise SystemExit(f"{results} can't be read: {problem}") from problem
    if not isinstance(found, dict) or not {"meta", "unedited", "tune", "test"} <= found.keys():
        raise SystemExit(f"{results} is no file of this program: it needs meta, unedited, tune and test")
    return found


def refuse_another_run(out: Path, wanted: Mapping[str, Any]) -> None:
    """Exits where the file can't take the results, or holds a run under other conditions."""
    if out.is_dir():
        raise SystemExit(f"--out {out} is a folder: give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise SystemExit(f"--out {out} can't be written: {problem}") from problem
    before = (read(out) or {"meta": wanted})["meta"]
    told = [
        f"{name} {before.get(name)} there and {value} here"
        for name, value in wanted.items()
        if before.get(name) != value
    ]
    if told:
        raise SystemExit(f"{out} holds a run that was measured in another way ({', '.join(told)}): give another --out")


def refuse_other_answers(out: Path, unedited: Mapping[str, Mapping[str, float]]) -> None:
    """Exits where the file's unedited model has other figures: another device or version answers otherwise."""
    before = (read(out) or {"unedited": {}})["unedited"]
    unlike = [name for name in unedited if name in before and before[name] != unedited[name]]
    if unlike:
        raise SystemExit(
            f"{out} holds a run whose unedited model answers otherwise ({', '.join(unlike)}): give another --out"
        )


def joined(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """With the rows of other studies that the file holds, if they were measured alike."""
    refuse_other_answers(out, found["unedited"])
    before = read(out)
    if before is None:
        return found
    fresh = {_study(row) for part in ("tune", "test") for row in found[part]}
    kept = {part: [row for row in before[part] if _study(row) not in fresh] for part in ("tune", "test")}
    rows = {part: kept[part] + found[part] for part in kept}
    return {**found, **rows, "unedited": before["unedited"] | found["unedited"]}


def _study(row: Mapping[str, Any]) -> str:
    return with_beams(row["method"], row.get("beams", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure")
    running.add_argument("--model", type=Path, default=MODEL)
    running.add_argument("--work", type=Path, default=Path("out/truth"), help="scenes and answers; kept between calls")
    running.add_argument("--out", type=Path, default=Path("bench/results/testbed-vlm.json"))
    running.add_argument("--methods", default=",".join(study.name for study in STUDIES))
    running.add_argument("--scenes", type=int, help="the first so many of each split; all by default")
    running.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    running.add_argument("--batch", type=int, default=50)
    running.add_argument("--processes", type=int, default=2)
    table = commands.add_parser("table", help="print the table of a run's file")
    table.add_argument("results", type=Path)
    given = parser.parse_args()
    if given.command == "table":
        results = read(given.results)
        if results is None:
            parser.error(f"there is no file {given.results}: the command run writes one")
        print(render(results))
        return
    by_method = {study.name: study for study in STUDIES}
    unknown = [name for name in given.methods.split(",") if name not in by_method]
    if unknown:
        parser.error(f"no study of {', '.join(unknown)}: --methods takes {', '.join(by_method)}")
    most = min(SPLITS[split].scenes for split in ("tune", "test"))
    if given.scenes is not None and not 0 < given.scenes <= most:
        parser.error(f"--scenes takes 1 to {most}, or leave it out for all of each split")
    if not (given.model / "config.json").is_file():
        parser.error(f"--model {given.model} holds no config.json: give the folder of a model")
    place = Place(given.model.resolve(), given.work.resolve(), given.dtype, given.batch, given.scenes)
    refuse_another_run(given.out, conditions(place))
    found = run(place, [by_method[name] for name in given.methods.split(",")], given.processes, given.out)
    found = joined(given.out, found)
    given.out.write_text(one_row_a_line(found), encoding="utf-8")
    print(render(found))
    for failed in found["errors"]:
        print(f"{_study(failed)} {label(failed['settings'])} on {failed['split']}:\n{failed['error']}")
    if found["errors"]:
        raise SystemExit(1)


# What a row of the table shows: heading, metric, and whether less is better.
COLUMNS = (
    ("POPE random", "pope/random/accuracy"),
    ("popular", "pope/popular/accuracy"),
    ("adversarial", "pope/adversarial/accuracy"),
    ("CHAIR_S", "chair/all/chair_s"),
    ("CHAIR_I", "chair/all/chair_i"),
    ("recall", "chair/all/recall"),
    ("length", "chair/all/length"),
)


# What belongs to the model, not to a choice.
UNTOLD = ("dims", *BLACK)


def render(found: Mapping[str, Any]) -> str:
    """A markdown table: the unedited model's figures, then differences to them, those whose interval leaves out 0 in bold.

    What was measured with beams stands behind the unedited model's figures with as many.
    """
    lines = [
        "| method | settings | " + " | ".join(name for name, _ in COLUMNS) + " | verdict |",
        "|---|---|" + "---:|" * len(COLUMNS) + "---|",
    ]
    for beams in sorted({1, *(row.get("beams", 1) for row in found["test"])}):
        unedited = found["unedited"][with_beams("test", beams)]
        how = "" if beams == 1 else f"beams of {beams}"
        lines.append(
            f"| no edit | {how}{' ' if how else ''}| "
            + " | ".join(_number(unedited[key], key) for _, key in COLUMNS)
            + " | |"
        )
        rows = [row for row in found["test"] if row.get("beams", 1) == beams]
        for method, settings, purposes, metrics in _by_settings(rows):
            cells = [_difference(metrics[key], key) for _, key in COLUMNS]
            told = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in UNTOLD) or "defaults"
            told = f"{how}; {told}" if how else told
            lines.append(
                f"| `{method}` | {told} ({', '.join(purposes)}) | " + " | ".join(cells) + f" | {verdict(metrics)} |"
            )
    return "\n".join(lines)


def _by_settings(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Settings, list[str], Any]]:
    """Method, settings, purposes and metrics; settings that are the same once defaults are filled in stand in one row."""
    grouped: dict[tuple[str, str], tuple[str, Settings, list[str], Any]] = {}
    for row in rows:
        place = row["method"], label(_unlike_defaults(row["method"], row["settings"]))
        same = grouped.setdefault(place, (row["method"], row["settings"], [], row["metrics"]))
        same[2].append(row["purpose"])
    return list(grouped.values())


def _unlike_defaults(method: str, settings: Settings) -> Settings:
    from attn_hooks import methods

    defaults = {name: field.default for name, field in methods()[method].model_fields.items()}
    return {name: value for name, value in settings.items() if name in UNTOLD or value != defaults[name]}


def _number(value: float, key: str) -> str:
    return f"{value:.1f}" if key.endswith("length") else f"{100 * value:.1f}"


def _difference(metric: Mapping[str, Any], key: str) -> str:
    if metric["difference"] is None:
        return "-"
    scale = 1 if key.endswith("length") else 100
    text = f"{scale * metric['difference']:+.1f}"
    return f"**{text}**" if moved(metric) else text


def moved(metric: Mapping[str, Any]) -> int:
    """1 or -1 where the interval of the difference lies above or below 0, else 0."""
    if metric["interval"] is None:
        return 0
    low, high = metric["interval"]
    return (low > 0) - (high < 0)


def verdict(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """In words what the intervals say of POPE and of captions."""
    said = [{1: "POPE better", 0: "POPE the same", -1: "POPE worse"}[moved(metrics["pope/all/accuracy"])]]
    wrong, recall = moved(metrics["chair/all/chair_s"]), moved(metrics["chair/all/recall"])
    if wrong < 0 <= recall:
        said.append("fewer captions make objects up")
    elif wrong < 0:
        said.append("fewer captions make objects up, but fewer objects are named")
    elif wrong > 0:
        said.append("more captions make objects up")
    elif recall < 0:
        said.append("fewer objects are named")
    else:
        said.append("captions the same")
    return "; ".join(said)


if __name__ == "__main__":
    main()
