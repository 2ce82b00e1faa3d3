"""What a method is: a frozen config that answers an attention call with primitives."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from torch import Tensor

from attn_hooks.call import AttentionCall, Phase
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_kernels import Primitive

Reads = Literal["query", "key", "value", "weights", "output", "tokens", "hidden", "vision"]
Writes = Literal["routing", "visibility", "logits", "weights", "output", "next-token"]
Scope = Literal["per-token", "per-row", "whole-matrix"]

# Methods act in this order whatever the order in which they are listed, as the primitives do.
STAGES: tuple[Writes, ...] = ("routing", "logits", "visibility", "weights", "output", "next-token")


def _head_pairs(value: Any) -> Any:
    """Accepts PASTA's form {layer: [heads]} beside pairs (layer, head)."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(heads, list | tuple) for heads in value.values()):
        raise ValueError("give {layer: [head, ...]} or pairs (layer, head)")
    return tuple((int(layer), head) for layer, heads in value.items() for head in heads)


NonNegative = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Layers = tuple[NonNegative, ...]
Heads = Annotated[tuple[tuple[NonNegative, NonNegative], ...], BeforeValidator(_head_pairs)]
"""Query heads as pairs (layer, head), both counted from 0 over the whole model, or as {layer: [heads]}."""


def _as_tensor(value: Any) -> Tensor:
    """A tensor of the edit's own, so that nobody changes it after it was checked."""
    try:
        tensor = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"is not a tensor: {problem}") from None
    if not torch.isfinite(tensor).all():
        raise ValueError("holds values that are not finite")
    return tensor


TensorField = Annotated[
    Tensor,
    BeforeValidator(_as_tensor),
    PlainSerializer(lambda tensor: tensor.tolist(), when_used="json"),
    WithJsonSchema({"type": "array", "description": "nested lists of floats, or a tensor"}),
]


class Edit(BaseModel):
    """Base of every method. Fields are the paper's hyperparameters; class variables declare what it touches.

    The declarations decide where an edit may run (tensor parallelism, other engines) and in which order edits act:
    ``reads`` and ``writes`` of an attention call (``hidden``: what enters the decoder layer, and ``vision``: the class token's
    attention in the vision tower, are handed only to edits that declare them), ``scope`` (what one output row depends on),
    ``head_indexed`` (names single heads), ``needs_lengths`` (counts from a sequence's beginning), ``keeps_state`` (remembers
    the prompt),
    ``crosses_layers`` (one layer's answer depends on another's, which pipelines split), ``fixed_in_decode`` (the primitives
    of a decode step serve all later ones, from where ``is_settled`` on), ``same_in_layers``
    (layers whose heads it does not tell apart get the same primitives), ``constant`` (the primitives depend on the layer
    alone), ``by_pattern`` (answers with a ``Sparsity``, whose kernel takes no other edit of the weights).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False
    )

    method: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[frozenset[Reads]]
    writes: ClassVar[Writes]
    scope: ClassVar[Scope]
    head_indexed: ClassVar[bool] = False
    needs_lengths: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False
    crosses_layers: ClassVar[bool] = False
    fixed_in_decode: ClassVar[bool] = False
    same_in_layers: ClassVar[bool] = False
    constant: ClassVar[bool] = False
    needs_companions: ClassVar[bool] = False
    by_pattern: ClassVar[bool] = False

    def __init__(self, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as invalid:
            raise error("bad-parameters", method=type(self).method, detail=explain_validation(invalid)) from None

    @model_validator(mode="after")
    def _layers_or_heads(self) -> Self:
        if getattr(self, "layers", None) is not None and getattr(self, "heads", None) is not None:
            raise ValueError("give layers or heads, not both: heads already name their layers")
        return self

    @classmethod
    def from_saved(cls, path: str) -> Edit:
        """The edit that ``"name:path"`` stands for; of methods whose tensors are trained or measured elsewhere."""
        raise error("nothing-saved", method=cls.method, path=path)

    def attends_as(self, call: AttentionCall) -> Tensor | None:
        """Of an edit that writes ``routing``, which is asked for this in place of primitives: ``(B,)`` long, the query head with
        whose queries and keys all heads of a sample attend; -1, or None for all samples: each with its own."""
        raise NotImplementedError(f"{type(self).__name__} defines no routing")

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        """The primitives for one call. Never computes attention itself."""
        raise NotImplementedError(f"{type(self).__name__} defines no primitives")

    def is_settled(self, call: AttentionCall) -> bool:
        """Whether no key that comes after this call can join a group; asked in decode where ``fixed_in_decode``."""
        return True

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        """Layers in which this edit acts: its ``heads``' layers, else its ``layers``, else all."""
        heads: Heads | None = getattr(self, "heads", None)
        if heads is not None:
            return tuple(sorted({layer for layer, _ in heads}))
        layers: Layers | None = getattr(self, "layers", None)
        return model.layer_indices if layers is None else tuple(sorted(set(layers)))

    def heads_in(self, model: ModelInfo, layer: int) -> tuple[int, ...] | None:
        """Query heads of ``layer`` that this edit names; None: all of them."""
        heads: Heads | None = getattr(self, "heads", None)
        return None if heads is None else tuple(sorted({head for at, head in heads if at == layer}))

    def check(self, model: ModelInfo) -> None:
        """Raises ``EditError`` if this edit does not fit ``model``. Methods extend it."""
        layers = self.layers_in(model)
        if not layers:
            detail = f"it has {model.num_layers} layers"
            raise error("no-layers", method=self.method, model=model.model_class, detail=detail)
        self.check_layers(layers, model)
        for layer in layers:
            last = model.layer(layer).num_heads - 1
            for head in self.heads_in(model, layer) or ():
                if head > last:
                    raise error(
                        "head-out-of-range",
                        method=self.method,
                        head=head,
                        layer=layer,
                        model=model.model_class,
                        last=last,
                    )

    def check_layers(self, layers: tuple[int, ...], model: ModelInfo) -> None:
        """Raises ``EditError`` for the first layer that ``model`` does not have."""
        for layer in layers:
            if layer not in model.layer_indices:
                raise error(
                    "layer-out-of-range",
                    method=self.method,
                    layer=layer,
                    model=model.model_class,
                    layers=ranges(model.layer_indices),
                )

    def refuse_phase(self, call: AttentionCall, reason: str) -> Exception:
        """The error for a phase in which this method is not defined; the caller raises it."""
        names: dict[Phase, str] = {
            "prefill": "the prompt",
            "chunk": "several new tokens at once after the first forward",
            "decode": "decode",
        }
        return error(
            "phase", method=self.method, phase=names[call.phase], layer=call.layer, model=call.model, reason=reason
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(_same(value, getattr(other, name)) for name, value in self)

    def __hash__(self) -> int:
        return hash((type(self), self.model_dump_json()))

    def __str__(self) -> str:
        defaults = type(self).model_fields
        shown = {name: value for name, value in self if not _same(value, defaults[name].default)}
        return f"{self.method}({', '.join(f'{name}={_short(value)}' for name, value in shown.items())})"


def explain_validation(invalid: ValidationError) -> str:
    """pydantic's findings as one line a user can act on."""
    parts = []
    for problem in invalid.errors():
        place = ".".join(str(step) for step in problem["loc"]) or "parameters"
        given = "" if problem["type"] == "missing" else f" (got {_short(problem['input'])})"
        parts.append(f"{place}: {problem['msg']}{given}")
    return "; ".join(parts)


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and first == second


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def ranges(indices: tuple[int, ...]) -> str:
    """``0-7`` for consecutive indices, else the list."""
    first, last = indices[0], indices[-1]
    return f"{first}-{last}" if 1 < len(indices) == last - first + 1 else ", ".join(map(str, indices))
