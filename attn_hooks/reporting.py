"""What would run (``explain``) and what did run (``report``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from attn_hooks.edit import STAGES, Edit
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
    rows of a call; in decode every 16th step is measured."""

    method: str
    parameters: dict[str, Any]
    calls: dict[str, int]
    layers: tuple[int, ...]
    heads: int
    rows: int
    mass_moved: float | None


@dataclass(frozen=True)
class PathReport:
    """What computed the edited calls of some layers in one phase, and why that path."""

    phase: str
    path: str
    why: str
    layers: tuple[int, ...]


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
            layers = ", ".join(map(str, edit.layers)) or "-"
            mass = "-" if edit.mass_moved is None else f"{edit.mass_moved:.4f}"
            table.add_row(edit.method, calls, layers, str(edit.heads), str(edit.rows), mass)
        lines = [
            f"{path.phase}: {path.path} in {len(path.layers)} layer{'s' * (len(path.layers) > 1)} ({path.why})"
            for path in self.paths
        ]
        return "\n".join([_as_text(table), *lines])


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
    recomputing = [edit for edit in here if edit.writes != "output"]
    if not recomputing:
        why = "head outputs only: the weights are not needed"
        return LayerExplanation(layer.index, names, f"{layer.backend}, then gain and offset", why)
    chosen = [edit.heads_in(info, layer.index) for edit in recomputing]
    every_head = any(heads is None for heads in chosen)
    heads = sorted({head for heads in chosen if heads is not None for head in heads})
    what = ", ".join(f"{edit.method} writes {edit.writes}" for edit in recomputing)
    if _on_gpu(layer):
        sparse = any(edit.writes == "visibility" for edit in recomputing)
        path = "PyTorch, blocks of rows" if sparse else "kernels or epilogue, chosen by call"
    elif every_head or len(heads) == layer.num_heads:
        path = "PyTorch, blocks of rows"
    else:
        shown = ", ".join(map(str, heads))
        path = f"PyTorch, blocks of rows for heads {shown}; {layer.backend} for the others"
    return LayerExplanation(layer.index, names, path, what)


def _on_gpu(layer: LayerInfo) -> bool:
    parameter = next(layer.module.parameters(), None)
    return parameter is not None and parameter.is_cuda


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
            )
        )
    paths = tuple(
        PathReport(phase, path, why, tuple(sorted(layers)))
        for (phase, path, why), layers in wrapping.recorder.paths.items()
    )
    return Report(wrapping.info.model_class, tuple(rows), paths)


def _as_text(table: Table) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")
