"""How much each head looks at the image, measured on a prompt. Masses are streamed: no N x N weights are held."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Reads, Scope, Writes
from attn_hooks.errors import AttnHooksError
from attn_hooks.last_row import last_row_outputs
from attn_hooks.methods.vhr import vision_aware_head_divergence
from attn_hooks.model_info import ModelInfo, inspect_model
from attn_hooks.prompt import answering_rows, image_keys, rows_after_images
from attn_hooks.wrapping import EditNeverActedWarning, editing
from attn_kernels import Primitive

MEASURES = {
    "image_mass": "weight on the image, in the last row of the prompt",
    "image_mass_of_text": "weight on the image, averaged over the text behind it",
    "vhd": "vision-aware head divergence: how far the head's output in that row moves when the image is taken away",
}


@dataclass(frozen=True)
class HeadScores:
    """``by_measure``: for each name in ``MEASURES`` a float32 tensor ``(layers, heads)``, averaged over the prompts that have an
    image; NaN where a layer has fewer heads than others. Row r is layer ``layers[r]``. ``missing``: why a measure is not there.

    ``tokens`` and ``image_tokens`` count the prompts that have an image.
    """

    model: str
    layers: tuple[int, ...]
    by_measure: dict[str, Tensor]
    tokens: int
    image_tokens: int
    missing: dict[str, str] = field(default_factory=dict)

    def ranked(self, measure: str) -> list[tuple[int, int, float]]:
        """(layer, head, score), the largest first."""
        scores = self.by_measure[measure]
        places = scores.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True).tolist()
        found = [(divmod(place, scores.shape[1]), float(scores.flatten()[place])) for place in places]
        return [(self.layers[row], head, score) for (row, head), score in found if score == score]


class _ImageMass(Edit):
    """Reads each head's image mass and edits nothing; sees the effect of all edits in force."""

    method: ClassVar[str] = "score_heads"
    source: ClassVar[str] = "a measurement"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "tokens"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"

    _found: dict[int, dict[str, Tensor]] = PrivateAttr(default_factory=dict)
    _counts: list[int] = PrivateAttr(default_factory=list)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        model.require_image_keys(self.method)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        keys = call.keys_at(image_keys(self, call))
        mass = call.tap("group_mass", keys=keys)
        last, text = answering_rows(self, call, None), rows_after_images(call)
        assert last is not None, "a prompt"
        with_image = call.layout.is_image.any(1).to(mass.device)
        self._counts[:] = int(call.layout.valid[with_image.cpu()].sum()), int(call.layout.is_image.sum())
        self._found[call.layer] = {
            "image_mass": _averaged(mass, last & with_image[:, None]),
            "image_mass_of_text": _averaged(mass, text & call.layout.valid.to(mass.device)),
        }
        return []


class _Divergence(Edit):
    """Reads each head's output with and without the image (VHR, arXiv 2412.13949) and edits nothing."""

    method: ClassVar[str] = "score_heads"
    source: ClassVar[str] = "a measurement"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "value", "output", "tokens"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"
    needs_companions: ClassVar[bool] = True

    _found: dict[int, dict[str, Tensor]] = PrivateAttr(default_factory=dict)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        prompts = call.batch - call.companions
        outputs = last_row_outputs(self, call)
        divergence = vision_aware_head_divergence(outputs[:prompts], outputs[-prompts:], outlier=None)
        with_image = call.layout.is_image[:prompts].any(1).to(divergence.device)
        self._found[call.layer] = {"vhd": divergence[with_image].mean(0).float().cpu()}
        return []


def _averaged(mass: Tensor, rows: Tensor) -> Tensor:
    """``(h,)`` from masses ``(B, h, N)``: the mean over the rows ``(B, N)`` of a prompt, then over prompts that have any."""
    by_prompt = torch.where(rows[:, None], mass, 0.0).sum(-1) / rows.sum(-1).clamp(min=1)[:, None]
    return (by_prompt.sum(0) / rows.any(-1).sum()).float().cpu()


@torch.no_grad()
def score_heads(model: nn.Module, **inputs: Any) -> HeadScores:
    """Runs ``model(**inputs)``, what a processor gave for prompts with images, and measures each head of each layer.

    Under the edits in force on the model; by two forwards, one of them with companion rows (``lockstep.py``), without which
    ``vhd`` is missing. Raises ``EditError`` where no key is an image's.
    """
    masses, divergence = _ImageMass(), _Divergence()
    missing: dict[str, str] = {}
    with warnings.catch_warnings():
        # They read only, which is not acting.
        warnings.simplefilter("ignore", EditNeverActedWarning)
        with editing(model, masses):
            model(**inputs)
        try:
            with editing(model, divergence):
                model(**inputs)
        except AttnHooksError as refusal:
            missing["vhd"] = str(refusal)
    layers = tuple(sorted(masses._found))
    found = {layer: masses._found[layer] | divergence._found.get(layer, {}) for layer in layers}
    most = max(layer.num_heads for layer in inspect_model(model).layers)
    by_measure = {
        name: torch.stack(
            [
                torch.nn.functional.pad(scores, (0, most - len(scores)), value=torch.nan)
                for scores in (found[layer][name] for layer in layers)
            ]
        )
        for name in MEASURES
        if name not in missing
    }
    tokens, image_tokens = masses._counts
    return HeadScores(inspect_model(model).model_class, layers, by_measure, tokens, image_tokens, missing)
