"""Where head outputs leave an attention: the projection that mixes them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from attn_hooks.errors import error
from attn_hooks.model_info import LayerInfo, inspect_model, underlying_model

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
# BERT and its like hold it beside the attention.
NAME_BESIDE = "output.dense"
RESHAPING = {"contiguous", "flatten", "permute", "reshape", "squeeze", "to", "transpose", "unflatten", "view"}


@dataclass(frozen=True)
class OutputProjection:
    """Takes ``(..., num_heads * value_dim)``, one query head after the other. ``name``: its path in the model."""

    name: str
    layer: LayerInfo
    module: nn.Module = field(repr=False, compare=False)


def output_projections(model: nn.Module, method: str) -> tuple[OutputProjection, ...]:
    """The output projection of each causal self-attention of the text decoder, in the order of layers.

    On whatever backend the attention runs. Raises ``UnsupportedModelError`` for a layer where none is found by name and width.
    """
    names = {module: name for name, module in model.named_modules()}
    found = []
    for layer in inspect_model(model, to_edit=False).layers:
        name = _projection_name(model, names[layer.module], layer)
        if name is None:
            raise error(
                "no-output-projection",
                model=type(underlying_model(model)).__name__,
                layer=layer.index,
                module_class=type(layer.module).__name__,
                heads=layer.num_heads,
                method=method,
            )
        found.append(OutputProjection(name, layer, model.get_submodule(name)))
    return tuple(found)


def _projection_name(model: nn.Module, attention: str, layer: LayerInfo) -> str | None:
    inside = [f"{attention}.{name}" for name in NAMES if name in layer.module._modules]
    around = attention.rpartition(".")[0]
    beside = [f"{around}.{NAME_BESIDE}"] if "output" in model.get_submodule(around)._modules else []
    fitting = [name for name in inside + beside if _fits(model.get_submodule(name), layer)]
    return fitting[0] if fitting else None


def _fits(projection: nn.Module, layer: LayerInfo) -> bool:
    """Whether its width is that of all heads; quantised and experts' projections need not tell it."""
    width = getattr(projection, "in_features", None)
    if width is None and hasattr(projection, "nf"):
        # Of transformers' Conv1D, which keeps its weight the other way round.
        width = projection.weight.shape[0]
    return width is None or width == layer.num_heads * layer.value_dim


def takes_head_outputs(layer: LayerInfo) -> bool:
    """Whether the projection is given the head outputs as attention returns them, at most in another shape.

    Told from the forward of the attention's class. Families that gate or normalise them in between give False.
    """
    projection = next((name for name in NAMES if name in layer.module._modules), None)
    return projection is None or _is_given_as_returned(type(layer.module), projection)  # type: ignore[arg-type]


@cache
def _is_given_as_returned(attention: type[nn.Module], projection: str) -> bool:
    forward = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    unchanged: set[str] = set()
    for statement in _statements(forward):
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Attribute) and call.func.attr == projection for call in calls):
            given = next(call.args for call in calls if getattr(call.func, "attr", None) == projection)
            return bool(given) and _source_of(given[0]) in unchanged
        if not isinstance(statement, ast.Assign):
            continue
        targets = [node.id for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Name)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "attention_interface" for call in calls):
            unchanged = {targets[0]}
        elif _source_of(statement.value) in unchanged:
            unchanged |= {targets[0]}
        else:
            unchanged -= set(targets)
    return False


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The simple statements below, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            if any(isinstance(inner, ast.stmt) for inner in ast.iter_child_nodes(child)):
                yield from _statements(child)
            else:
                yield child


def _source_of(expression: ast.expr) -> str | None:
    """The variable of which ``expression`` is a view, a copy or a slice; None if it is anything else."""
    while True:
        if isinstance(expression, ast.Name):
            return expression.id
        if isinstance(expression, ast.Subscript):
            expression = expression.value
        elif (
            isinstance(expression, ast.Call)
            and isinstance(expression.func, ast.Attribute)
            and expression.func.attr in RESHAPING
        ):
            expression = expression.func.value
        else:
            return None
