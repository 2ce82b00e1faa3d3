"""Parameters of a LoFiT adapter, as they stand in adapter_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from peft import PeftConfig
from pydantic import TypeAdapter, ValidationError

from attn_hooks.edit import Heads, explain_validation
from attn_hooks.errors import error
from attn_hooks.lofit.peft_type import own_peft_type

METHOD = "lofit"
PEFT_NAME = "LOFIT"
COMPONENTS = ("offset", "scale")
FORMAT_VERSION = 1


@dataclass
class LofitConfig(PeftConfig):
    """LoFiT on the query heads ``heads`` (arXiv 2406.01563, equation 2; the defaults are the paper's).

        z[l, h] <- (1 + A[l, h]) * z[l, h] + v[l, h]        elementwise, on every position, before the output projection

    ``component`` says which of the two vectors of ``head_dim`` numbers a head is trained: ``"offset"`` trains v (the paper's second
    stage, bias tuning), ``"scale"`` trains A (its first, head selection); the other one is zero.

    Raises ``EditError`` for heads that are not pairs and for values out of range; whether the model has those heads is checked
    by ``get_peft_model``.
    """

    heads: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "Query heads as pairs [layer, head] or {layer: [heads]}, both counted from 0; None: all heads of all layers. "
            "Kept sorted: the rows of the saved vectors are in this order."
        },
    )
    component: str = field(default="offset", metadata={"help": "'offset' trains v, 'scale' trains A."})
    init_std: float = field(
        default=1e-3, metadata={"help": "Standard deviation of the normal start values; 0 starts at the base model."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the adapter's file; filled in."})
    attn_hooks_version: str | None = field(
        default=None, metadata={"help": "The package that defines this method; filled in."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = own_peft_type(PEFT_NAME, LofitConfig)
        # Found in the model, not chosen: PEFT reads it from the object, and it is not part of the file.
        self.target_modules: frozenset[str] | None = None
        if self.format_version > FORMAT_VERSION:
            raise error("adapter-format", found=self.format_version, known=FORMAT_VERSION)
        if self.component not in COMPONENTS:
            raise error(
                "bad-parameters", method=METHOD, detail=f"component: {self.component!r} is none of {COMPONENTS}"
            )
        if not 0 <= self.init_std < float("inf"):
            raise error("bad-parameters", method=METHOD, detail=f"init_std: must be 0 or more (got {self.init_std})")
        if self.heads is not None:
            self.heads = _sorted_pairs(self.heads)
        if self.attn_hooks_version is None:
            self.attn_hooks_version = version("attn-hooks")

    def heads_in(self, layer: int, num_heads: int) -> list[int]:
        """The heads of ``layer`` that are trained, in the order of the vectors' rows."""
        if self.heads is None:
            return list(range(num_heads))
        return [head for at, head in self.heads if at == layer]


def _sorted_pairs(heads: Iterable[Any] | Mapping[int, Any]) -> list[list[int]]:
    try:
        pairs = TypeAdapter(Heads).validate_python(heads if isinstance(heads, Mapping) else tuple(map(tuple, heads)))
    except ValidationError as invalid:
        raise error("bad-parameters", method=METHOD, detail=f"heads: {explain_validation(invalid)}") from None
    except TypeError:
        raise error("bad-parameters", method=METHOD, detail=f"heads: give pairs (layer, head), got {heads!r}") from None
    if not pairs:
        raise error("bad-parameters", method=METHOD, detail="heads: the list is empty, so nothing would be trained")
    if len(set(pairs)) < len(pairs):
        raise error("bad-parameters", method=METHOD, detail="heads: a head is listed twice")
    return [list(pair) for pair in sorted(pairs)]
