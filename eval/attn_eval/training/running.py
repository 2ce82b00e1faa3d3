"""A LoFiT recipe, run: heads selected, offsets tuned on them, the model measured with them and without.

Each stage has a folder of its own, with what it was made from in ``run.json``; what is done is not done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import set_seed

import attn_hooks
from attn_eval.environment import describe_environment
from attn_eval.errors import EvaluationError
from attn_eval.loading import load_model
from attn_eval.report import COLUMNS, cells_of, markdown_table, published_table
from attn_eval.run_log import BASELINE, EDITED, FORMAT_VERSION, RESULTS, RunLog
from attn_eval.runner import progress_bars, weights_fingerprint
from attn_eval.training.examples import DataSplits
from attn_eval.training.measuring import examples_sha256, file_sha256, measured, metrics_of
from attn_eval.training.probing import head_outputs_of
from attn_eval.training.recipe import LofitRecipe
from attn_eval.training.stages import ADAPTER, LOG, final_losses, train_stage, write_json
from attn_hooks.lofit import L1Penalty, LofitConfig, random_heads, rank_heads, read_top_heads
from attn_hooks.lofit.selection import PUBLISHED_SHARE
from attn_hooks.probes import probe_heads

SELECT, TRAIN, EVAL = "select", "train", "eval"
HEADS = "heads.json"
TABLE = "table.md"
WEIGHTS = "adapter_model.safetensors"

Head = tuple[int, int]


@dataclass
class Workplace:
    """A recipe with its model and data, loaded once for all stages.

    Attributes:
        folder: has a folder for each stage.
    """

    recipe: LofitRecipe
    folder: Path
    console: Console
    limit: int | None = None
    model: Any = field(init=False)
    tokenizer: Any = field(init=False)
    splits: DataSplits = field(init=False)
    data: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        whole = self.recipe.data.splits(self.recipe.seed)
        self.splits = whole if self.limit is None else whole.limited(self.limit)
        self.data = examples_sha256(self.splits)
        self.model, self.tokenizer = load_model(self.recipe.model, self.recipe.dtype, self.recipe.device)
        self.weights = weights_fingerprint(self.model)

    def log_of(self, stage: str, fingerprint: str, **made_from: Any) -> RunLog:
        """The stage's folder, for which this must be what it was made from."""
        manifest = {"format_version": FORMAT_VERSION, "recipe": fingerprint, "model_weights": self.weights}
        return RunLog(self.folder / stage, {**manifest, "data": self.data, **made_from})

    def adapted(self, **config: Any) -> Any:
        """The model with a new adapter, whose start values come from the recipe's seed."""
        set_seed(self.recipe.seed)
        return get_peft_model(self.model, LofitConfig(task_type="CAUSAL_LM", **config))


def select(place: Workplace) -> list[tuple[int, int, float]]:
    """Stage 1: every head with its score, the best first; written to ``select/heads.json``.

    Raises:
        EvaluationError: the folder holds another run, or training stopped at a loss that is not finite.
    """
    recipe = place.recipe
    log = place.log_of(SELECT, recipe.fingerprint_of_selection())
    done = log.folder / HEADS
    if done.is_file():
        return [(layer, head, score) for layer, head, score in json.loads(done.read_text(encoding="utf-8"))["heads"]]
    method = recipe.selection.method
    losses: dict[str, float | None] = {}
    if method == "random":
        drawn = random_heads(place.model, share=1.0, seed=recipe.seed)
        ranking = [(layer, head, 0.0) for layer, head in drawn]
    elif method == "probes":
        examples, batch_size = place.splits.train, recipe.eval_batch_size
        outputs, labels, groups = head_outputs_of(place.model, place.tokenizer, examples, batch_size)
        ranking = probe_heads(outputs, labels, groups=groups, seed=recipe.seed).ranked()
    else:
        model = place.adapted(component=method)
        title = f"select: {'scales' if method == 'scale' else 'offsets'} of all heads"
        callbacks = [L1Penalty(recipe.selection.l1)]
        history = train_stage(
            model, place.tokenizer, place.splits, recipe.selection, recipe, log.folder, title, callbacks, place.console
        )
        losses = final_losses(history)
        ranking = rank_heads(model)
        place.model = model.unload()
    about = {"method": method, "seed": recipe.seed, "model": recipe.model, "data": place.splits.source, **losses}
    write_json(done, {**about, "environment": describe_environment(), "heads": ranking})
    return ranking


def heads_to_tune(place: Workplace) -> tuple[list[Head], str]:
    """The recipe's heads, best first, and where they come from.

    Raises:
        EvaluationError: the ranking is not there, or has fewer heads than are asked for.
    """
    recipe = place.recipe
    if isinstance(recipe.heads, tuple):
        return list(recipe.heads), "the recipe"
    file = Path(recipe.heads).expanduser() if recipe.heads is not None else place.folder / SELECT / HEADS
    ranking = read_ranking(file, "run 'attn-hooks lofit select' first" if recipe.heads is None else "mend 'heads'")
    total = sum(layer.num_heads for layer in attn_hooks.inspect_model(place.model).layers)
    count = recipe.num_heads or max(1, round(PUBLISHED_SHARE * total))
    if count > len(ranking):
        raise EvaluationError(f"{count} heads are to be tuned, and {file} ranks {len(ranking)}: lower num_heads")
    return ranking[:count], str(file) if recipe.heads is not None else f"the ranking by {SELECT}"


def read_ranking(file: Path, way_out: str) -> list[Head]:
    """The heads of a heads.json or of a top_heads .npy file, best first.

    Raises:
        EvaluationError: it isn't there or is neither.
        attn_hooks.AttnHooksError: a .npy file of another form.
    """
    if not file.is_file():
        raise EvaluationError(f"no ranking of heads at {file}: {way_out}")
    if file.suffix == ".npy":
        return read_top_heads(file)
    try:
        return [(int(layer), int(head)) for layer, head, *_ in json.loads(file.read_text(encoding="utf-8"))["heads"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file} is no ranking of heads as 'select' writes it ({error!r}): {way_out}") from error


def train(place: Workplace) -> Path:
    """Stage 2: offsets on the heads, saved to ``train/adapter``.

    Raises:
        EvaluationError: there is no ranking, the folder holds another run, or the loss is not finite.
    """
    recipe = place.recipe
    heads, source = heads_to_tune(place)
    log = place.log_of(TRAIN, recipe.fingerprint(), heads=[list(head) for head in heads])
    adapter = log.folder / ADAPTER
    if (adapter / WEIGHTS).is_file():
        return adapter
    model = place.adapted(heads=heads)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    title = f"train: offsets of {len(heads)} heads, {trained:,} numbers"
    history = train_stage(
        model, place.tokenizer, place.splits, recipe.tuning, recipe, log.folder, title, console=place.console
    )
    place.model = model.unload()
    about = {"heads": heads, "heads_from": source, "trained_numbers": trained, **final_losses(history)}
    write_json(log.folder / "training.json", {**about, "environment": describe_environment()})
    return adapter


def evaluate(place: Workplace) -> dict[str, Any]:
    """The test examples with the trained adapter and without; writes ``eval/results.json`` and ``eval/table.md``.

    Raises:
        EvaluationError: there is no trained adapter, or the folder holds another run.
    """
    recipe = place.recipe
    adapter = place.folder / TRAIN / ADAPTER
    if not (adapter / WEIGHTS).is_file():
        raise EvaluationError(f"no trained adapter at {adapter}: run 'attn-hooks lofit train' first")
    sha256 = file_sha256((adapter / WEIGHTS).read_bytes())
    log = place.log_of(EVAL, recipe.fingerprint(), adapter=sha256)
    model = PeftModel.from_pretrained(place.model, adapter).eval()
    total = len(place.splits.test)
    with progress_bars(place.console) as progress:
        for run in (BASELINE, EDITED):
            known = sum(log.has(run, example.id) for example in place.splits.test)
            bar = progress.add_task(f"eval, {run}", total=total, completed=known)
            if run == BASELINE:
                with model.disable_adapter():
                    for count in measured(model, place.tokenizer, place.splits, recipe, run, log):
                        progress.advance(bar, count)
            else:
                for count in measured(model, place.tokenizer, place.splits, recipe, run, log):
                    progress.advance(bar, count)
    training = json.loads((place.folder / TRAIN / "training.json").read_text(encoding="utf-8"))
    results = {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.fingerprint(),
        "model": {"name": recipe.model, "class": type(place.model).__name__, "weights_fingerprint": place.weights},
        "adapter": {
            "sha256": sha256,
            "bytes": (adapter / WEIGHTS).stat().st_size,
            "share_of_parameters": training["trained_numbers"] / _base_parameters(model),
            **{key: training[key] for key in ("heads", "heads_from", "trained_numbers", "loss", "eval_loss")},
        },
        "data": {
            "source": place.splits.source,
            "sha256": place.data,
            "sizes": {part: len(getattr(place.splits, part)) for part in ("train", "validation", "test")},
        },
        "metrics": metrics_of(place.splits, log.records, recipe),
        "seeds": {"data": recipe.seed, "training": recipe.seed, "bootstrap": recipe.seed},
        "environment": describe_environment(),
        "training": json.loads((place.folder / TRAIN / LOG).read_text(encoding="utf-8")),
        "samples": [
            {"id": example.id, **{run: _without_keys(log.records[run, example.id]) for run in (BASELINE, EDITED)}}
            for example in place.splits.test
        ],
    }
    write_json(log.folder / RESULTS, results)
    (log.folder / TABLE).write_text(table_markdown(results), encoding="utf-8")
    return results


def table_markdown(results: dict[str, Any]) -> str:
    """The page of an evaluation."""
    recipe, adapter, data = results["recipe"], results["adapter"], results["data"]
    lines = [f"# {recipe['name']}", ""]
    if recipe["description"]:
        lines += [" ".join(recipe["description"].split()), ""]
    heads = ", ".join(f"{layer}.{head}" for layer, head in adapter["heads"])
    sizes = ", ".join(f"{size} {part}" for part, size in data["sizes"].items())
    versions = {"python": results["environment"]["python"], **results["environment"]["packages"]}
    lines += [
        f"- Model: {recipe['model']} ({results['model']['class']})",
        f"- Data: {data['source']}; {sizes}",
        f"- Trained: {adapter['trained_numbers']:,} numbers ({adapter['share_of_parameters']:.4%} of the model's), "
        f"{adapter['bytes']:,} bytes, offsets of {len(adapter['heads'])} heads from {adapter['heads_from']}",
        f"- Heads (layer.head): {heads}",
        f"- Seed {recipe['seed']}",
        "",
        *markdown_table(COLUMNS, [cells_of(metric) for metric in results["metrics"]]),
        "",
        "In percent. Baseline: the model without the adapter. Difference: on the same examples, with its paired bootstrap "
        "interval; lost/won: examples that lost, or gained, the full score.",
        "",
        "## Published figures",
        "",
        *published_table(recipe["published"]),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"commit {results['environment']['commit'] or 'unknown'}, {results['environment']['gpu'] or 'no GPU'}",
    ]
    return "\n".join(lines) + "\n"


def forget(folder: Path, stages: Sequence[str]) -> None:
    """Remove what stages left in a folder, and nothing else."""
    for stage in stages:
        for name in (
            "run.json", "samples.jsonl", "reports.jsonl", RESULTS, HEADS, TABLE, LOG, "training.json", "heads.png", "losses.png",
        ):  # fmt: skip
            (folder / stage / name).unlink(missing_ok=True)
        for name in (ADAPTER, "checkpoints", "last_good"):
            shutil.rmtree(folder / stage / name, ignore_errors=True)


def _base_parameters(model: Any) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if "lofit_" not in name)


def _without_keys(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("run", "task", "id")}
