"""Vectors on head outputs, folded into the output projection behind them.

    W ((1 + A) * z + v) + b = (W diag(1 + A)) z + (b + W v)

It is exact for every position. What is merged has to survive saving: an offset becomes a bias, which loading drops in silence
where the family's modeling file builds the projection without one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attn_hooks.errors import error


@dataclass(frozen=True)
class Folded:
    """Weight and bias of a projection; ``by_input``: the weight is ``(in, out)``, as Conv1D's."""

    weight: Tensor
    bias: Tensor | None
    by_input: bool

    @classmethod
    def of(cls, projection: nn.Module) -> Folded:
        bias = projection.bias
        return cls(projection.weight.data, None if bias is None else bias.data, isinstance(projection, Conv1D))

    def put(self, projection: nn.Module) -> None:
        """On the device and in the dtype that the projection has by now."""
        projection.weight.data = self.weight.to(projection.weight)
        if self.bias is None:
            projection.bias = None
        elif projection.bias is None:
            projection.bias = nn.Parameter(self.bias.to(projection.weight), requires_grad=False)
        else:
            projection.bias.data = self.bias.to(projection.bias)

    def is_finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in (self.weight, self.bias) if part is not None)


def fold(base: Folded, gain: Tensor | None, offset: Tensor | None) -> Folded:
    """``base`` behind ``z -> gain * z + offset``, both ``(heads, head_dim)``; sums in float32 at least."""
    precise = torch.promote_types(base.weight.dtype, torch.float32)
    # Rows of inputs, whichever way it is stored.
    by_input = (base.weight if base.by_input else base.weight.T).to(precise)
    weight, bias = base.weight, base.bias
    if gain is not None:
        scaled = (by_input * gain.flatten().to(precise)[:, None]).to(base.weight.dtype)
        weight = scaled if base.by_input else scaled.T.contiguous()
    if offset is not None:
        shift = offset.flatten().to(precise) @ by_input
        bias = (shift if bias is None else bias.to(precise) + shift).to(base.weight.dtype)
    return Folded(weight, bias, base.by_input)


def check_mergeable(projection: nn.Module, name: str, adapters: list[str]) -> None:
    """Raises ``EditError`` unless the projection's weight is plain numbers, whole and of this module alone."""
    reason = None
    if isinstance(projection, BaseTunerLayer):
        reason = f"another adapter ({type(projection).__name__}) lies around it"
    elif type(projection) not in (nn.Linear, Conv1D):
        reason = f"it is a {type(projection).__name__}, perhaps quantised, and no Linear or Conv1D"
    elif type(projection.weight.data) is not Tensor or not projection.weight.dtype.is_floating_point:
        reason = f"its weight is a {type(projection.weight.data).__name__} of {projection.weight.dtype}"
    elif projection.weight.dtype.itemsize < 2:
        reason = f"its weight is quantised to {projection.weight.dtype}"
    if reason is not None:
        raise error("not-mergeable", adapters=", ".join(adapters), module=name, reason=reason)


def keep_new_biases(model: nn.Module, projections: list[str]) -> None:
    """Makes a merged model whose ``projections`` got biases load again as it is, or refuse to be saved.

    Where a setting of the family's config brings these biases, it is set, and what else it brings is filled with zeros. Where
    none does, ``save_pretrained`` raises from now on.
    """
    if not isinstance(model, PreTrainedModel) or not projections:
        return
    for settings in _bias_settings(model.config):
        config = _with_settings(model.config, settings)
        missing = None if config is None else _missing_beside(model, config, projections)
        if missing is not None and all(_may_have_bias(model, name) for name in missing):
            for name in missing:
                owner: Any = model.get_submodule(name.removesuffix(".bias"))
                owner.bias = nn.Parameter(owner.weight.new_zeros(owner.out_features), requires_grad=False)
            for setting in settings:
                setattr(model.config.get_text_config(decoder=True), setting, True)
            return
    vars(model)["save_pretrained"] = _RefusedSave(type(model).__name__, projections[0])


def _bias_settings(config: Any) -> list[tuple[str, ...]]:
    """Each setting that might bring biases, then all of them at once."""
    text_config = config.get_text_config(decoder=True)
    names = [name for name, value in vars(text_config).items() if "bias" in name and value is False]
    return [(name,) for name in names] + ([tuple(names)] if len(names) > 1 else [])


def _with_settings(config: Any, settings: tuple[str, ...]) -> Any:
    """A copy of ``config`` with these set; None if its class refuses the combination."""
    changed = copy.deepcopy(config)
    try:
        for setting in settings:
            setattr(changed.get_text_config(decoder=True), setting, True)
        changed.validate()
    except (ValueError, StrictDataclassError):
        return None
    return changed


def _missing_beside(model: PreTrainedModel, config: Any, projections: list[str]) -> set[str] | None:
    """What a model of ``config`` has beyond ``model``'s parameters; None if it lacks the biases of ``projections``."""
    with torch.device("meta"):
        skeleton = type(model)._from_config(config)
    known = {name for name, _ in skeleton.named_parameters()}
    present = {name for name, _ in model.named_parameters()}
    return known - present if known >= {f"{name}.bias" for name in projections} else None


def _may_have_bias(model: nn.Module, parameter: str) -> bool:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return parameter.endswith(".bias") and type(owner) is nn.Linear and owner.bias is None


class _RefusedSave:
    """In the place of a merged model's ``save_pretrained``."""

    def __init__(self, model_class: str, projection: str) -> None:
        self.model_class, self.projection = model_class, projection

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise error("merged-bias-lost", model=self.model_class, module=self.projection)
