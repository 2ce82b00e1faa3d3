"""Everything about a model that a wrap must give back, and what differs from it later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _Same:
    """Stands for an object in a comparison: equal only to itself."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


def _frozen(value: Any) -> Any:
    """A value as it is now: containers by their contents, other objects by identity."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {key: _frozen(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return _Same(value)


@dataclass(frozen=True)
class Snapshot:
    """Weights by value; class, attributes and hooks of each module; its config by identity and by content."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]


def take(model: nn.Module) -> Snapshot:
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    facts: dict[str, Any] = {
        "sdpa function": _Same(functional.scaled_dot_product_attention),
        "sdpa entry": _Same(ALL_ATTENTION_FUNCTIONS["sdpa"]),
    }
    for name, module in model.named_modules():
        facts[f"{name}: class"] = _Same(type(module))
        facts[f"{name}: class attributes"] = {key: _Same(value) for key, value in vars(type(module)).items()}
        for attribute, value in vars(module).items():
            facts[f"{name}.{attribute}"] = _frozen(value)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            facts[f"{name}: config content"] = config.to_dict()
            facts[f"{name}: config attributes"] = _frozen(vars(config))
            facts[f"{name}: implementation"] = config._attn_implementation
    return Snapshot(weights, facts)


def changes(before: Snapshot, model: nn.Module) -> list[str]:
    """What differs from ``before``, one line each; empty if nothing does."""
    now = take(model)
    missing = object()
    found = [
        f"{fact}: {before.facts.get(fact, 'absent')} -> {now.facts.get(fact, 'absent')}"
        for fact in before.facts | now.facts
        if before.facts.get(fact, missing) != now.facts.get(fact, missing)
    ]
    found += [f"weights of {name}" for name in before.weights.keys() ^ now.weights.keys()]
    found += [
        f"weights of {name}"
        for name in before.weights.keys() & now.weights.keys()
        if not torch.equal(before.weights[name], now.weights[name])
    ]
    return found
