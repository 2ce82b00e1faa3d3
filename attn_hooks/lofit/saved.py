"""An adapter that PEFT saved, read without a model."""

from __future__ import annotations

import re
from pathlib import Path

from peft.utils import load_peft_weights
from torch import Tensor

from attn_hooks.errors import error
from attn_hooks.lofit.config import LofitConfig


def read_adapter(path: str | Path) -> tuple[LofitConfig, dict[tuple[int, int], Tensor]]:
    """The config, and the vector ``(head_dim,)`` of each (layer, head), of the folder ``path`` or that repository of the hub.

    Raises ``EditError`` if it is no adapter of LoFiT, or its tensors are not those of its heads.
    """
    try:
        config = LofitConfig.from_pretrained(path)
        tensors = load_peft_weights(path, device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error("bad-adapter", path=path, detail=f"PEFT cannot load it as LOFIT: {problem}") from None
    if not isinstance(config, LofitConfig):
        raise error(
            "bad-adapter", path=path, detail=f"it is an adapter of {config.peft_type}, not of vectors on head outputs"
        )
    by_layer = {_layer_of(name): rows for name, rows in tensors.items() if name.endswith(f".lofit_{config.component}")}
    counted = [[layer, head] for layer, rows in sorted(by_layer.items()) for head in range(len(rows))]
    heads = counted if config.heads is None else config.heads
    if [layer for layer, _ in heads] != [layer for layer, _ in counted]:
        detail = f"its tensors are of the layers {sorted(by_layer)}, its heads of others or of another number"
        raise error("bad-adapter", path=path, detail=detail)
    rows = [row for _, rows in sorted(by_layer.items()) for row in rows]
    return config, {(layer, head): row for (layer, head), row in zip(heads, rows, strict=True)}


def _layer_of(name: str) -> int:
    """The last number in a tensor's path."""
    numbers: list[str] = re.findall(r"\.(\d+)\.", name)
    return int(numbers[-1]) if numbers else 0
