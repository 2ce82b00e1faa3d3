"""What would run (``explain``) and what did run (``report``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from attn_hooks.edit import STAGES, Edit, ranges
from attn_hooks.engine import has_triton
from attn_hooks.model_info import LayerInfo, ModelInfo, inspect_model
from attn_hooks.registry import resolve_edits
from attn_hooks.wrapping import check_composition, edits_in_force, wrapping_of


@dataclass(frozen=True)
class LayerExplanation:
    """What would run in one layer, and why."""

    layer: int
    edits: tuple[str, ...]
    path: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """One row a layer; ``str()`` gives a table."""

    model: str
    layers: tuple[LayerExplanation, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = Table("layer", "edits", "path", "why", title=self.model)
        for row in self.layers:
            table.add_row(str(row.layer), " + ".join(row.edits) or "-", row.path, row.why)
        return _as_text(table)


@dataclass(frozen=True)
class EditReport:
    """What one edit did. ``mass_moved``: mean share of a row's weight that went elsewhere, on the last 16
    rows of a call, measured in some layers and steps in turns. ``second_stream_skipped``: share of the forwards whose next token
    was certain without the second stream; None without one."""

    method: str
    parameters: dict[str, Any]
    calls: dict[str, int]
    layers: tuple[int, ...]
    heads: int
    rows: int
    mass_moved: float | None
    second_stream_skipped: float | None = None


@dataclass(frozen=True)
class PathReport:
    """What computed the edited calls of some layers in one phase, and why that path; ``str()`` is a line."""

    phase: str
    path: str
    why: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        where = "layer" if len(self.layers) == 1 else "layers"
        return f"{self.phase}: {self.path} in {where} {ranges(self.layers)} ({self.why})"


@dataclass(frozen=True)
class Report:
    """One row an edit; ``str()`` gives a table and, below, the paths that computed the calls."""

    model: str
    edits: tuple[EditReport, ...]
    paths: tuple[PathReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = Table("edit", "calls", "layers", "heads", "rows", "mass moved", title=self.model)
        for edit in self.edits:
            calls = ", ".join(f"{phase} {count}" for phase, count in edit.calls.items()) or "never acted"
            if edit.second_stream_skipped is not None:
                calls += f", {edit.second_stream_skipped:.0%} without the second stream"
            layers = ", ".join(map(str, edit.layers)) or "-"
            mass = "-" if edit.mass_moved is None else f"{edit.mass_moved:.4f}"
            table.add_row(edit.method, calls, layers, str(edit.heads), str(edit.rows), mass)
        return "\n".join([_as_text(table), *map(str, self.paths)])


def explain(model: nn.Module, *edits: object) -> Explanation:
    """What would run in each layer of ``model`` under ``edits`` (default: those in force). Nothing is changed.

    Raises what ``wrap`` would raise.
    """
    resolved = resolve_edits(edits) if edits else edits_in_force(model)
    info = inspect_model(model)
    for edit in resolved:
        edit.check(info)
    check_composition(resolved, info)
    rows = tuple(_explain_layer(layer, resolved, info) for layer in info.layers)
    return Explanation(info.model_class, rows)


def _explain_layer(layer: LayerInfo, edits: tuple[Edit, ...], info: ModelInfo) -> LayerExplanation:
    here = [edit for edit in edits if layer.index in edit.layers_in(info)]
    here.sort(key=lambda edit: STAGES.index(edit.writes))
    names = tuple(edit.method for edit in here)
    if not here:
        return LayerExplanation(layer.index, names, layer.backend, "no edit in this layer: the model's own backend")
    recomputing = [edit for edit in here if edit.writes not in ("output", "next-token")]
    on_gpu = _on_gpu(layer)
    refusal = _kernels_refusal(layer, here) if on_gpu else None
    by_kernels = on_gpu and refusal is None
    if not recomputing:
        why = "head outputs only: the weights are not needed"
        path = f"{layer.backend}, then gain and offset"
        if all(edit.writes == "next-token" for edit in here):
            why, path = "its attention is read and not edited", layer.backend
        return LayerExplanation(layer.index, names, f"by call: {path}, or decode" if by_kernels else path, why)
    chosen = [edit.heads_in(info, layer.index) for edit in recomputing]
    every_head = any(heads is None for heads in chosen)
    heads = sorted({head for heads in chosen if heads is not None for head in heads})
    what = ", ".join(f"{edit.method} writes {edit.writes}" for edit in recomputing)
    if refusal:
        what = f"{what}; no kernel for {refusal}"
    if by_kernels:
        by_pattern = any(edit.by_pattern for edit in here)
        path = "by call: sparse flash" if by_pattern else "by call: vendor + epilogue, edited flash or decode"
    elif every_head or len(heads) == layer.num_heads:
        path = "PyTorch, blocks of rows"
    else:
        shown = ", ".join(map(str, heads))
        path = f"PyTorch, blocks of rows for heads {shown}; {layer.backend} for the others"
    return LayerExplanation(layer.index, names, path, what)


def _on_gpu(layer: LayerInfo) -> bool:
    parameter = next(layer.module.parameters(), None)
    return parameter is not None and parameter.is_cuda


def _kernels_refusal(layer: LayerInfo, edits: list[Edit]) -> str | None:
    """What keeps every call of a layer on a GPU from the kernels, as far as that is known before a call."""
    patterned = any(edit.by_pattern for edit in edits)
    of_weights = [edit.method for edit in edits if edit.writes not in ("output", "next-token")]
    reasons = {
        "any edit without Triton": not has_triton(),
        f"the Sparsity of {' + '.join(of_weights)}": patterned and len(of_weights) > 1,
        "more than one Regroup": sum(edit.writes == "weights" for edit in edits) > 1,
        "float64": any(parameter.dtype == torch.float64 for parameter in layer.module.parameters()),
    }
    return next((what for what, holds in reasons.items() if holds), None)


def paths_of_machine() -> tuple[list[str], str]:
    """The paths that an edited call may take on this machine, and why these."""
    if not torch.cuda.is_available():
        return ["backend + affine", "pytorch"], "no GPU"
    device = torch.cuda.get_device_name()
    if not has_triton():
        return ["backend + affine", "pytorch"], f"{device}, no Triton"
    kernels = ["decode", "backend + affine", "vendor + epilogue", "vendor + last rows", "edited flash", "sparse flash"]
    return [*kernels, "pytorch"], device


def report(model: nn.Module) -> Report:
    """What the edits in force on ``model`` have done so far: calls a phase, layers, heads, rows, mass moved."""
    wrapping = wrapping_of(model, "report")
    rows = []
    for place, edit in enumerate(wrapping.edits):
        record = wrapping.recorder.records[place]
        rows.append(
            EditReport(
                method=edit.method,
                parameters=edit.model_dump(mode="json"),
                calls=dict(record.calls.items()),
                layers=tuple(sorted(record.layers)),
                heads=len(record.heads),
                rows=record.rows_edited(),
                mass_moved=record.mass_moved(),
                second_stream_skipped=record.skipped / record.steps if record.steps else None,
            )
        )
    paths = tuple(
        PathReport(phase, path, why, tuple(sorted(layers)))
        for (phase, path, why), layers in wrapping.recorder.paths.items()
    )
    if wrapping.recorder.ran_without_host:
        layers = tuple(sorted({layer for row in rows for layer in row.layers}))
        paths += (PathReport("decode", "compiled or captured", "neither counted nor measured", layers),)
    return Report(wrapping.info.model_class, tuple(rows), paths)


def _as_text(table: Table) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")
