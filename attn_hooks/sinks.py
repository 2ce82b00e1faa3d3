"""Which hidden dimensions of a language model carry massive activations: what VAR needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_hooks.errors import error
from attn_hooks.model_info import inspect_model, underlying_model

FIRST_LAYER = 2
# A dimension that is massive in more of the tokens than this is so in any token, and tells no sinks.
MOST_TOKENS = 0.25


@dataclass(frozen=True)
class SinkDim:
    """A dimension with a massive activation. ``layers``: those that some token enters with at least tau in it; ``share`` of the
    tokens, where most do.

    ``strongest``: the largest |x[dim]| / rms(x), in layer ``layer``, of the token ``token_id`` at ``position`` of row ``row``.
    """

    dim: int
    layers: tuple[int, ...]
    share: float
    strongest: float
    layer: int
    row: int
    position: int
    token_id: int


@dataclass(frozen=True)
class SinkDims:
    """What ``find_sink_dims`` measured: ``found``, strongest first, of ``hidden_size`` dimensions in ``layers``.

    ``strongest`` is the largest |x[d]| / rms(x) of all; where it is under tau, nothing was found.
    """

    model: str
    hidden_size: int
    tau: float
    layers: tuple[int, ...]
    found: tuple[SinkDim, ...]
    strongest: float
    tokens: int

    @property
    def dims(self) -> tuple[int, ...]:
        """For VAR's ``dims``, in ascending order: found in at least half of the layers, and nowhere in most of the tokens."""
        return tuple(sorted(about.dim for about in self.found if self.tells_sinks(about)))

    def tells_sinks(self, about: SinkDim) -> bool:
        return 2 * len(about.layers) >= len(self.layers) and about.share <= MOST_TOKENS


@torch.no_grad()
def find_sink_dims(model: nn.Module, tau: float = 20.0, **inputs: Any) -> SinkDims:
    """Runs ``model(**inputs)`` and looks at what enters each decoder layer from 2 on.

    ``inputs`` are what the tokenizer or processor gave: ``input_ids`` ``(B, N)``, perhaps ``attention_mask``, perhaps images.
    A dimension is found where |x[d]| / sqrt(mean(x^2) + 1e-6) of a real token is at least ``tau``. Others cannot make a token
    a sink at this ``tau``. Raises ``EditError`` for a model without such layers.
    """
    info = inspect_model(model)
    target = underlying_model(model)
    names = {layer.decoder_layer: layer.index for layer in info.layers if layer.index >= FIRST_LAYER}
    if not names or None in names:
        detail = f"it has {info.num_layers} layers" if not names else "its decoder layers carry no number"
        raise error("no-layers", method="find_sink_dims", model=info.model_class, detail=detail)
    seen = _LargestByDim(inputs.get("attention_mask"), tau)
    handles = [
        target.get_submodule(str(name)).register_forward_pre_hook(seen.hook(index), with_kwargs=True)
        for name, index in names.items()
    ]
    try:
        target(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen.summary(info.model_class, inputs["input_ids"])


class _LargestByDim:
    """Of each layer and dimension ``(E,)``: the largest relative activation, the token that has it, how many reach tau."""

    def __init__(self, mask: Tensor | None, tau: float) -> None:
        self.mask, self.tau = mask, tau
        self.by_layer: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.tokens = 0

    def hook(self, layer: int) -> Any:
        def before_layer(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read(layer, args[0] if args else kwargs["hidden_states"])

        return before_layer

    def _read(self, layer: int, hidden: Tensor) -> None:
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        relative = hidden.abs() / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if self.mask is not None and self.mask.ndim == 2:
            relative = relative * self.mask.to(relative)[..., None]
        tokens = relative.flatten(0, 1)
        largest, place = tokens.max(0)
        self.by_layer[layer] = (largest.cpu(), place.cpu(), (tokens >= self.tau).sum(0).cpu())
        self.tokens = len(tokens) if self.mask is None else int(self.mask.sum())

    def summary(self, model: str, input_ids: Tensor) -> SinkDims:
        layers = tuple(sorted(self.by_layer))
        largest = torch.stack([self.by_layer[layer][0] for layer in layers])  # (layers, E)
        share = torch.stack([self.by_layer[layer][2] for layer in layers]).amax(0) / self.tokens
        length = input_ids.shape[1]
        found = []
        for dim in (largest.amax(0) >= self.tau).nonzero().flatten().tolist():
            strongest, at = largest[:, dim].max(0)
            row, position = divmod(int(self.by_layer[layers[int(at)]][1][dim]), length)
            reaching = tuple(layer for layer, value in zip(layers, largest[:, dim], strict=True) if value >= self.tau)
            token = int(input_ids[row, position])
            found.append(
                SinkDim(dim, reaching, float(share[dim]), float(strongest), layers[int(at)], row, position, token)
            )
        found.sort(key=lambda about: -about.strongest)
        size = largest.shape[1]
        return SinkDims(model, size, self.tau, layers, tuple(found), float(largest.max()), self.tokens)
