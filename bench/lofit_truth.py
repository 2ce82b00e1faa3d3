"""Does it matter which heads LoFiT tunes? The paper's comparison (arXiv 2406.01563) on testbed-lm and generated data.

    python -m bench.lofit_truth --out bench/results/lofit-truth.json                  # 3 seeds; hours on a CPU
    python -m bench.lofit_truth --seeds 0 --train 8 --test 8 --epochs 1 --ranks 1     # a look, minutes on a CPU

Exact match on two-hop questions of the model as it is, ITI, LoFiT on heads that its first stage selected, on random heads and on
heads selected for kinship, and LoRA on q_proj and v_proj. Each seed has its own data, start values and random heads. Intervals
are of paired differences to the model as it is, resampling examples within each seed. ITI contrasts each prompt's answer with
that of the next example. Arms that the file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import set_seed

import attn_hooks
from attn_eval.environment import describe_environment
from attn_eval.run_log import RunLog
from attn_eval.statistics import compare_paired
from attn_eval.training.encoding import OpenPromptEncoder, encode_pair, pad_token, padded
from attn_eval.training.examples import Completion
from attn_eval.training.measuring import measured
from attn_eval.training.recipe import LofitRecipe, Stage
from attn_eval.training.running import Workplace, select
from attn_eval.training.stages import train_stage, write_json
from attn_hooks.lofit import random_heads
from attn_hooks.probes import HeadOutputs, fit_iti, probe_heads

BASE = "base"


def recipe_of(task: str, seed: int, options: argparse.Namespace) -> LofitRecipe:
    sizes = {"train": options.train, "validation": 0, "test": options.test}
    return LofitRecipe.model_validate(
        {
            "name": f"truth/{task}",
            "model": "testbed-lm",
            "dtype": "float32",
            "data": {"set": task, **sizes},
            "selection": {"learning_rate": options.selection_rate, "epochs": options.epochs},
            "tuning": {"learning_rate": options.rate, "epochs": options.epochs},
            "num_heads": options.heads,
            "new_tokens": 10,
            "seed": seed,
        }
    )


def iti_of(place: Workplace, heads: int) -> Any:
    """ITI from the training prompts with their answer and with that of the next example."""
    encoder, rows, labels, groups = OpenPromptEncoder(place.tokenizer), [], [], []
    examples = [example for example in place.splits.train if isinstance(example, Completion)]
    for number, example in enumerate(examples):
        for label, answer in ((1, example.completion), (0, examples[(number + 1) % len(examples)].completion)):
            pair = encode_pair(encoder, example.prompt, answer, end=False)
            rows.append({"input_ids": pair.ids, "labels": pair.labels})
            labels.append(label)
            groups.append(number)
    pad = pad_token(place.tokenizer)
    batches = [padded(rows[first : first + 16], pad) for first in range(0, len(rows), 16)]
    inputs = [
        {name: batch[name].to(place.model.device) for name in ("input_ids", "attention_mask")} for batch in batches
    ]
    outputs = HeadOutputs.collect(place.model, inputs)
    return fit_iti(outputs, labels, probe_heads(outputs, labels, groups=groups).select(k=heads))


def scores(place: Workplace, model: Any, folder: Path) -> list[float]:
    log = RunLog(folder / "measured", {"arm": folder.name})
    for _ in measured(model.eval(), place.tokenizer, place.splits, place.recipe, "edited", log):
        pass
    return [float(log.records["edited", example.id]["score"]) for example in place.splits.test]


def trained(place: Workplace, model: Any, stage: Stage, folder: Path) -> tuple[list[float], int]:
    numbers = sum(value.numel() for value in model.parameters() if value.requires_grad)
    train_stage(model, place.tokenizer, place.splits, stage, place.recipe, folder, folder.name, console=place.console)
    found = scores(place, model, folder)
    place.model = model.unload()
    return found, numbers


def run_seed(seed: int, options: argparse.Namespace, done: dict[str, Any], save: Any) -> None:
    work = Path(tempfile.mkdtemp())
    console = Console(stderr=True)
    place = Workplace(recipe_of("two_hop", seed, options), work / "two_hop", console)
    other = Workplace(recipe_of("kinship", seed, options), work / "kinship", console)
    count = options.heads

    def lofit(name: str, heads: Sequence[tuple[int, int]]) -> tuple[list[float], int]:
        return trained(place, place.adapted(heads=list(heads)), place.recipe.tuning, work / name)

    def lora(rank: int) -> tuple[list[float], int]:
        set_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        stage = place.recipe.tuning.model_copy(update={"learning_rate": options.lora_rate})
        return trained(place, get_peft_model(place.model, config), stage, work / f"lora{rank}")

    def iti() -> tuple[list[float], int]:
        edit = iti_of(place, count)
        with attn_hooks.editing(place.model, edit):
            return scores(place, place.model, work / "iti"), edit.direction.numel()

    arms = {
        BASE: lambda: (scores(place, place.model, work / BASE), 0),
        "iti": iti,
        "lofit, selected": lambda: lofit("selected", [(layer, head) for layer, head, _ in select(place)[:count]]),
        "lofit, random": lambda: lofit("random", random_heads(place.model, k=count, seed=seed)),
        "lofit, other task": lambda: lofit("other", [(layer, head) for layer, head, _ in select(other)[:count]]),
        **{f"lora {rank}": (lambda rank=rank: lora(rank)) for rank in options.ranks},
    }
    for name, arm in arms.items():
        if f"{seed}/{name}" not in done:
            found, numbers = arm()
            done[f"{seed}/{name}"] = {"scores": found, "trained_numbers": numbers}
            save()
    shutil.rmtree(work, ignore_errors=True)


def rows_of(done: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy of each arm that all seeds have, and its paired difference to the model as it is."""
    rows = []
    for name in dict.fromkeys(key.split("/", 1)[1] for key in done):
        if not all(f"{seed}/{name}" in done for seed in seeds):
            continue
        base, found = ([done[f"{seed}/{arm}"]["scores"] for seed in seeds] for arm in (BASE, name))
        paired = compare_paired(base, found, 0)
        rows.append(
            {
                "arm": name,
                "trained_numbers": done[f"{seeds[0]}/{name}"]["trained_numbers"],
                "accuracy": paired.edited,
                "by_seed": [sum(scored) / len(scored) for scored in found],
                "difference": paired.difference,
                "interval": paired.interval,
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| arm | trained numbers | accuracy | by seed | difference | 95 % interval |",
        "|---|---:|---:|---|---:|---|",
    ]
    for row in rows:
        by_seed = ", ".join(f"{100 * value:.1f}" for value in row["by_seed"])
        interval = (
            "" if row["interval"] is None else f"{100 * row['interval'][0]:+.1f} to {100 * row['interval'][1]:+.1f}"
        )
        values = f"{100 * row['accuracy']:.1f} | {by_seed} | {100 * row['difference']:+.1f} | {interval}"
        lines.append(f"| {row['arm']} | {row['trained_numbers']:,} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--selection-rate", type=float, default=2e-2)
    parser.add_argument("--rate", type=float, default=5e-2)
    parser.add_argument("--lora-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("results/lofit-truth.json"))
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "seeds", "ranks")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else None
    if kept is not None and kept["settings"] != settings:
        parser.error(f"{options.out} was measured with other settings: give another --out")
    done: dict[str, Any] = kept["arms"] if kept is not None else {}

    def save() -> None:
        write_json(options.out, {"settings": settings, "environment": describe_environment(), "arms": done})

    for seed in options.seeds:
        run_seed(seed, options, done, save)
    table = table_of(rows_of(done, options.seeds))
    options.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
