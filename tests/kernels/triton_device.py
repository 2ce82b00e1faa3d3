"""Where the Triton kernels run in the tests: the GPU if there is one, else Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = TypeVar("T")


def on_device(case: T, device: str = DEVICE) -> T:
    """The same inputs and primitives with every tensor on ``device``; one tensor stays one tensor."""
    moved: dict[int, Tensor] = {}

    def move(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return moved.setdefault(id(thing), thing.to(device))
        if isinstance(thing, tuple):
            return tuple(move(part) for part in thing)
        if isinstance(thing, list):
            return [move(part) for part in thing]
        if is_dataclass(thing) and not isinstance(thing, type):
            return replace(thing, **{field.name: move(getattr(thing, field.name)) for field in fields(thing)})
        return thing

    return move(case)
