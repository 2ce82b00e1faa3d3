"""ITI's probes: which heads' outputs tell true texts from false ones, and the shift between the two.

Source: Li et al., "Inference-Time Intervention", NeurIPS 2023, arXiv 2306.03341, section 3. One logistic regression a head on
its output at the last token of each text; heads are ranked by accuracy on texts held out.

    outputs = HeadOutputs.collect(model, batches)
    heads = probe_heads(outputs, labels, groups=questions).select(k=48)
    model = wrap(model, fit_iti(outputs, labels, heads))
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from attn_hooks.edit import Heads
from attn_hooks.errors import error
from attn_hooks.head_vectors import how_many
from attn_hooks.methods.iti import ITI
from attn_hooks.output_projection import output_projections

METHOD = "iti"
PUBLISHED_HEADS = 48
FILE = "head_outputs.float32"


@dataclass(frozen=True)
class HeadOutputs:
    """Head outputs of the last token of each of ``samples`` texts, in a file that lives as long as this object.

    Memory holds one batch while they are collected, and one layer when they are read. ``layers``: their indices.
    """

    samples: int
    layers: tuple[int, ...]
    _shapes: tuple[tuple[int, int], ...]  # (heads, head_dim) of each layer
    _folder: Any = field(repr=False, compare=False)

    @classmethod
    @torch.no_grad()
    def collect(cls, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> HeadOutputs:
        """Runs ``model(**batch)`` for each batch, ``input_ids`` and ``attention_mask`` of texts padded on either side.

        Takes what each output projection is given, under the edits in force on the model. Raises ``EditError`` for a model in
        training mode, no batch, a row without a token, and outputs that are not finite; ``UnsupportedModelError`` as LoFiT does.
        """
        if model.training:
            raise error("bad-head-outputs", detail="the model is in training mode; call eval() first")
        projections = output_projections(model, METHOD)
        found: dict[str, Tensor] = {}
        last: list[Tensor] = []

        def capture(name: str) -> Any:
            def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                z = inputs[0]
                found[name] = z[torch.arange(len(z), device=z.device), last[0].to(z.device)].float().cpu()

            return before

        handles = [at.module.register_forward_pre_hook(capture(at.name)) for at in projections]
        folder, samples = TemporaryDirectory(prefix="attn_hooks_"), 0
        try:
            with open(Path(folder.name) / FILE, "wb") as file:
                for batch in batches:
                    inputs = {name: value.to(model.device) for name, value in batch.items()}
                    last[:] = [_last_tokens(inputs)]
                    model(**inputs)
                    side_by_side = torch.cat([found[projection.name] for projection in projections], dim=-1)
                    if not bool(side_by_side.isfinite().all()):
                        raise error(
                            "bad-head-outputs", detail=f"those of a text from number {samples} on are not finite"
                        )
                    file.write(side_by_side.numpy().tobytes())
                    samples += len(side_by_side)
        finally:
            for handle in handles:
                handle.remove()
        if not samples:
            raise error("bad-head-outputs", detail="there was no text to run")
        layers = [projection.layer for projection in projections]
        shapes = tuple((layer.num_heads, layer.value_dim) for layer in layers)
        return cls(samples, tuple(layer.index for layer in layers), shapes, folder)

    def of_layer(self, layer: int) -> Tensor:
        """``(samples, heads, head_dim)`` float32."""
        place = self.layers.index(layer)
        widths = [heads * head_dim for heads, head_dim in self._shapes]
        whole = torch.from_file(
            str(Path(self._folder.name) / FILE), size=self.samples * sum(widths), dtype=torch.float32
        )
        start = sum(widths[:place])
        rows = whole.view(self.samples, -1)[:, start : start + widths[place]].clone()
        return rows.unflatten(-1, self._shapes[place])


def _last_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """``(B,)``: the column of each row's last real token."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.full((len(tokens),), tokens.shape[1] - 1)
    if not bool(mask.any(1).all()):
        raise error("bad-head-outputs", detail="a row of a batch is padding alone")
    return torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), -1).amax(1)


@dataclass(frozen=True)
class HeadProbes:
    """``accuracy``: by layer ``(heads,)``, the share of held-out texts that a head's probe gets right."""

    accuracy: dict[int, Tensor]

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, accuracy), the most accurate first; equal ones in the order of layers and heads."""
        scores = [
            (layer, head, float(score))
            for layer, of_heads in self.accuracy.items()
            for head, score in enumerate(of_heads)
        ]
        return sorted(scores, key=lambda found: (-found[2], found[0], found[1]))

    def select(self, k: int | None = None, share: float | None = None) -> list[tuple[int, int]]:
        """The ``k`` best heads (the paper's 48 by default), or ``share`` of all: pairs (layer, head), best first."""
        ranked = self.ranked()
        count = how_many(METHOD, len(ranked), PUBLISHED_HEADS if k is None and share is None else k, share)
        return [(layer, head) for layer, head, _ in ranked[:count]]


def probe_heads(
    outputs: HeadOutputs,
    labels: Sequence[int] | Sequence[bool],
    groups: Sequence[object] | None = None,
    validation: float = 0.2,
    seed: int = 42,
) -> HeadProbes:
    """Trains a probe for each head on part of the texts, and measures it on the share ``validation`` of them.

    ``labels``: 1 for true, 0 for false. ``groups``: of each text, what it is about; texts of one group (the answers to one
    question) are all trained on or all held out. Without groups each text is one.

    Raises ``EditError`` if labels or groups are not one a text, or a part lacks true or false texts.
    """
    truth = _checked_labels(outputs, labels)
    held_out = _held_out(outputs.samples, groups, validation, seed)
    for part, name in ((~held_out, "training"), (held_out, "validation")):
        if len(truth[part].unique()) < 2:
            raise error(
                "bad-head-outputs", detail=f"the {name} part of {int(part.sum())} texts lacks true or false ones"
            )
    accuracy = {}
    for layer in outputs.layers:
        z = outputs.of_layer(layer)
        weight, bias = logistic_regression(z[~held_out], truth[~held_out])
        says_true = torch.einsum("nhd,hd->nh", z[held_out].double(), weight) + bias > 0
        accuracy[layer] = (says_true == truth[held_out, None].bool()).float().mean(0)
    return HeadProbes(accuracy)


def fit_iti(
    outputs: HeadOutputs,
    labels: Sequence[int] | Sequence[bool],
    heads: Iterable[tuple[int, int]],
    alpha: float = 15.0,
    spread: HeadOutputs | None = None,
) -> ITI:
    """The edit for ``heads`` (of ``HeadProbes.select``, or any pairs): mass mean shift, and the deviation along it.

    ``spread``: the texts over which sigma is taken (the paper takes others than those that are labelled); ``outputs`` by default.

    Raises ``EditError`` where the two classes have the same mean, and for heads that the model does not have.
    """
    truth = _checked_labels(outputs, labels).bool()
    if len(truth.unique()) < 2:
        raise error("bad-head-outputs", detail="the texts lack true or false ones")
    chosen: Heads = tuple((int(layer), int(head)) for layer, head in heads)
    sizes = dict(zip(outputs.layers, outputs._shapes, strict=True))
    for layer, head in chosen:
        if layer not in sizes or not 0 <= head < sizes[layer][0]:
            raise error("bad-head-outputs", detail=f"they hold no head {head} of layer {layer}")
    directions: dict[tuple[int, int], Tensor] = {}
    deviations: dict[tuple[int, int], Tensor] = {}
    for layer in sorted({layer for layer, _ in chosen}):
        z = outputs.of_layer(layer).double()
        others = z if spread is None else spread.of_layer(layer).double()
        for head in (head for at, head in chosen if at == layer):
            shift = z[truth, head].mean(0) - z[~truth, head].mean(0)
            length = shift.norm()
            if not length > 0:
                raise error(
                    "bad-head-outputs", detail=f"head {head} of layer {layer} has the same mean in both classes"
                )
            directions[layer, head] = shift / length
            deviations[layer, head] = (others[:, head] @ directions[layer, head]).std(correction=0)
    longest = max(len(direction) for direction in directions.values())
    padded = [nn.functional.pad(directions[place], (0, longest - len(directions[place]))) for place in chosen]
    sigma = torch.stack([deviations[place] for place in chosen])
    return ITI(heads=chosen, direction=torch.stack(padded).float(), sigma=sigma.float(), alpha=alpha)


def logistic_regression(
    z: Tensor, truth: Tensor, strength: float = 1.0, steps: int = 100, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Weights ``(H, D)`` and biases ``(H,)`` in float64 that minimise, for each head of ``z`` ``(N, H, D)``,

        sum over texts of log(1 + exp(-y (w z + b))) + strength / 2 * ||w||^2,    y 1 or -1 as ``truth`` ``(N,)`` says

    by Newton's method with steps halved until they descend. ``strength`` 1 is the usual default of logistic regressions.
    """
    inputs = torch.cat([z.transpose(0, 1).double(), torch.ones(z.shape[1], z.shape[0], 1, dtype=torch.float64)], dim=-1)
    truth = truth.double().expand(z.shape[1], -1)
    # The bias is not held small; the tiny number keeps a head whose probe is certain solvable.
    decay = torch.full(inputs.shape[-1:], strength, dtype=torch.float64)
    decay[-1] = 1e-12
    found = torch.zeros(z.shape[1], inputs.shape[-1], dtype=torch.float64)

    def objective(found: Tensor) -> Tensor:
        logit = torch.einsum("hnd,hd->hn", inputs, found)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, truth, reduction="none").sum(-1)
        return loss + (decay * found * found).sum(-1) / 2

    for _ in range(steps):
        probability = torch.einsum("hnd,hd->hn", inputs, found).sigmoid()
        gradient = torch.einsum("hnd,hn->hd", inputs, probability - truth) + decay * found
        if bool(gradient.abs().amax() <= tolerance * len(z)):
            break
        curvature = (probability * (1 - probability))[..., None] * inputs
        hessian = curvature.transpose(1, 2) @ inputs + decay.diag()
        step = torch.linalg.solve(hessian, gradient)
        before, length = objective(found), torch.ones(len(found), 1, dtype=torch.float64)
        for _ in range(40):
            uphill = objective(found - length * step) > before
            if not bool(uphill.any()):
                break
            length[uphill] /= 2
        found = found - length * step
    return found[:, :-1], found[:, -1]


def _checked_labels(outputs: HeadOutputs, labels: Sequence[int] | Sequence[bool]) -> Tensor:
    truth = torch.tensor([int(label) for label in labels])
    if len(truth) != outputs.samples:
        raise error("bad-head-outputs", detail=f"{len(truth)} labels were given for {outputs.samples} texts")
    if not bool(((truth == 0) | (truth == 1)).all()):
        raise error("bad-head-outputs", detail="labels are 1 for true and 0 for false")
    return truth


def _held_out(samples: int, groups: Sequence[object] | None, validation: float, seed: int) -> Tensor:
    """``(samples,)`` bool."""
    of_sample = list(range(samples)) if groups is None else list(groups)
    if len(of_sample) != samples:
        raise error("bad-head-outputs", detail=f"{len(of_sample)} groups were given for {samples} texts")
    if not 0 < validation < 1:
        raise error("bad-parameters", method=METHOD, detail=f"validation: between 0 and 1 (got {validation})")
    distinct = list(dict.fromkeys(of_sample))
    random.Random(seed).shuffle(distinct)
    held_out = set(distinct[: max(1, round(validation * len(distinct)))])
    return torch.tensor([group in held_out for group in of_sample])
