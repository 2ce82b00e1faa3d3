"""Where head outputs leave an attention: the projection that mixes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from attn_hooks.errors import error
from attn_hooks.model_info import LayerInfo, inspect_model, underlying_model

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
# BERT and its like hold it beside the attention.
NAME_BESIDE = "output.dense"


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
