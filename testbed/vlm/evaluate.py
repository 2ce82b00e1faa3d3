"""Measure an exported model on held-out scenes with the evaluations' own tasks, and write ``metrics.json`` beside it.

    python -m testbed.vlm.evaluate models/testbed-vlm/weak

Takes about five minutes on two CPU cores: POPE, CHAIR and MME's questions on both splits, then what stands out in hidden states
and attention. Scenes and answers stay in ``--work``; a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from attn_eval import run_recipe
from attn_eval.image_prompts import ImagePrompts
from attn_eval.recipe import Recipe
from attn_hooks.head_scores import score_heads
from attn_hooks.sinks import find_sink_dims
from testbed.vlm.measure import CAPTION_TOKENS
from testbed.vlm.scenes import image_name, write_scenes
from testbed.vlm.splits import MEASURED, POPE_SPLITS, SPLITS, Split
from testbed.vlm.text import DETAILED_PROMPTS

METRICS = "metrics.json"
MME_CATEGORIES = ("count", "position", "color")
BATCH = 50
ATTENTION_SCENES, ATTENTION_BATCH = 64, 16
# What VAR takes for a sink, and for a head that looks at the image.
SINK_PHI, CENTRIC_MASS = 20.0, 0.2
DIGITS = 4


def scenes_folder(work: Path, split: Split, scenes: int) -> Path:
    """The folder of a split's first scenes, written if it isn't there."""
    folder = work / f"{split.name}_{scenes}"
    if not (folder / "manifest.json").is_file():
        write_scenes(folder, split, scenes)
    return folder


def recipe(model: Path, scenes: Path) -> Recipe:
    """POPE, CHAIR and MME on the files of a folder of scenes, in float32."""
    images = str(scenes / "images")
    files = {name: str(scenes / f"{name}.json") for name in ("instances", "captions")}
    return Recipe(
        name=f"testbed-vlm/{scenes.name}",
        model=str(model),
        dtype="float32",
        batch_size=BATCH,
        tasks=(
            {"task": "pope", "questions": [str(scenes / f"coco_pope_{name}.json") for name in POPE_SPLITS], "images": images},
            {"task": "chair", **files, "images": images, "new_tokens": CAPTION_TOKENS, "prompt": DETAILED_PROMPTS[0]},
            {"task": "mme", "images": str(scenes / "mme"), "categories": MME_CATEGORIES},
        ),
    )  # fmt: skip


def figures(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Task, part, and each figure as its value with its 95 % interval (null where one image leaves none)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in results["metrics"]:
        interval = metric["baseline_interval"]
        part = found.setdefault(metric["task"], {}).setdefault(metric["length"], {"questions": metric["samples"]})
        part[metric["metric"]] = {
            "value": _rounded(metric["baseline"]),
            "interval": None if interval is None else [_rounded(end) for end in interval],
        }
    return found


def _rounded(value: float | Tensor) -> Any:
    """A number, or a tensor as nested lists, to four digits."""
    if isinstance(value, Tensor):
        return [_rounded(entry) for entry in value] if value.ndim else _rounded(value.item())
    return round(value, DIGITS)


class Relative:
    """|x[d]| / rms(x), its largest over d, of every token that enters each layer."""

    def __init__(self, hidden: Tensor) -> None:
        hidden = hidden.float()
        self.phi = (hidden.abs() / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()).amax(-1)


@torch.no_grad()
def attention(model: LlavaForConditionalGeneration, processor: Any, scenes: Path) -> dict[str, Any]:
    """Sinks and heads, on captioning prompts about the first scenes.

    Returns:
        ``phi``: for each layer the largest of |x[d]| / rms(x) of the tokens that enter it, on the first token, on image tokens
        (mean over them, and the largest) and on the text behind; ``sink_dims``: dimensions that VAR could use;
        by layer and head ``bos_mass`` and ``image_mass`` (weight in the prompt's last row), ``image_peak`` (the largest image
        token's share of that image mass) and ``vhd``, vision-aware head divergence.
    """
    prompts = ImagePrompts(processor)
    numbers = json.loads((scenes / "manifest.json").read_text(encoding="utf-8"))["scenes"]
    numbers = range(1, min(numbers, ATTENTION_SCENES) + 1)
    pictures = [Image.open(scenes / "images" / image_name(number)).convert("RGB") for number in numbers]
    parts: list[dict[str, Tensor]] = []
    dims: set[int] | None = None
    for start in track(range(0, len(pictures), ATTENTION_BATCH), description="attention", transient=True):
        part = pictures[start : start + ATTENTION_BATCH]
        inputs = prompts.encode([DETAILED_PROMPTS[0]] * len(part), part)
        scores = score_heads(model, **inputs)
        found = set(find_sink_dims(model, SINK_PHI, **inputs).dims)
        dims = found if dims is None else dims & found
        parts.append({**scores.by_measure, **_looked_at(model, inputs)})
    weights = torch.tensor(
        [min(ATTENTION_BATCH, len(pictures) - start) for start in range(0, len(pictures), ATTENTION_BATCH)]
    )
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        largest = name.endswith("largest")
        joined[name] = values.amax(0) if largest else torch.einsum("p...,p->...", values, weights / weights.sum())
    return {
        "prompts": len(pictures), "prompt": DETAILED_PROMPTS[0], "image_tokens": model.config.image_seq_length,
        "sink_dims": sorted(dims or ()),
        "heads_above_image_mass": {"threshold": CENTRIC_MASS, "heads": int((joined["image_mass"] >= CENTRIC_MASS).sum())},
        **{name: _rounded(value) for name, value in sorted(joined.items())},
    }  # fmt: skip


def _looked_at(model: LlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    implementation = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    finally:
        model.set_attn_implementation(implementation)
    ids = inputs["input_ids"]
    image = ids == model.config.image_token_index
    behind = (image.flip(1).cumsum(1).flip(1) == 0) & inputs["attention_mask"].bool()
    first = torch.zeros_like(image)
    first[torch.arange(len(ids)), inputs["attention_mask"].argmax(1)] = True
    phi = torch.stack([Relative(hidden).phi for hidden in output.hidden_states[:-1]])  # (layers, B, N)
    last = torch.stack([layer[:, :, -1].float() for layer in output.attentions])  # (layers, B, heads, N)
    on_image = torch.where(image[None, :, None], last, 0.0)
    mass = on_image.sum(-1)
    return {
        "phi_bos": phi[:, first].mean(1), "phi_image": phi[:, image].mean(1), "phi_image_largest": phi[:, image].amax(1),
        "phi_image_share_of_sinks": (phi[:, image] >= SINK_PHI).float().mean(1), "phi_text_largest": phi[:, behind].amax(1),
        "bos_mass": torch.where(first[None, :, None], last, 0.0).sum(-1).mean(1),
        "image_peak": (on_image.amax(-1) / mass.clamp(min=1e-9)).mean(1),
    }  # fmt: skip


def measure(folder: Path, work: Path, scenes: int | None) -> dict[str, Any]:
    """Everything, written to ``metrics.json`` in the model's folder."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    metrics: dict[str, Any] = {"parameters": model.num_parameters(), "dtype": "float32", "splits": {}}
    for split in (SPLITS[name] for name in MEASURED):
        files = scenes_folder(work, split, scenes or split.scenes)
        manifest = json.loads((files / "manifest.json").read_text(encoding="utf-8"))
        about = {name: manifest[name] for name in ("seed", "companions_missing", "scenes", "pixels")}
        results = run_recipe(recipe(folder, files), work / "results" / folder.resolve().name / files.name)
        metrics["splits"][split.name] = {**about, **figures(results)}
    metrics["attention"] = attention(
        model, processor, scenes_folder(work, SPLITS["test"], scenes or SPLITS["test"].scenes)
    )
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of testbed.vlm.export")
    parser.add_argument("--work", type=Path, default=Path("out/testbed_vlm"), help="for scenes and answers")
    parser.add_argument("--scenes", type=int, help="the first so many of each split; all by default")
    given = parser.parse_args()
    metrics = measure(given.model, given.work, given.scenes)
    for split, found in metrics["splits"].items():
        accuracies = {name: found["pope"][name]["accuracy"]["value"] for name in POPE_SPLITS}
        chair = {name: found["chair"]["all"][name]["value"] for name in ("chair_s", "chair_i", "recall")}
        print(split, accuracies, chair)


if __name__ == "__main__":
    main()
