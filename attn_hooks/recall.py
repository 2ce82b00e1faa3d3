"""How much of a model's dense attention the visited keys of sparse methods hold, measured on a prompt, layer by layer.

The model runs dense, once: every method chooses from the same queries and keys, and what one layer loses does not reach the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import nn

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo, inspect_model
from attn_hooks.registry import resolve_edits
from attn_hooks.wrapping import EditNeverActedWarning, editing
from attn_kernels import HeadAffine, Primitive, Recall, SinkAndWindow, Sparsity, Tap, measure_recall


@dataclass(frozen=True)
class ModelRecall:
    """``by_edit[e][layer]`` is what edit ``edits[e]`` keeps in a layer; everything where it does not act.

    ``tokens`` counts the prompts' real tokens, ``rows`` the places in each prompt that were measured.
    """

    model: str
    edits: tuple[Edit, ...]
    by_edit: tuple[dict[int, Recall], ...]
    tokens: int
    rows: int

    def of(self, edit: int) -> Recall:
        """All layers' heads, one behind the other."""
        return Recall.joined(list(self.by_edit[edit].values()))


class _Measurement(Edit):
    """Asks each edit for its pattern in every call, measures it, and edits nothing; sees the edits in force."""

    method: ClassVar[str] = "recall"
    source: ClassVar[str] = "a measurement"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "value"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"

    edits: tuple[Edit, ...]
    rows: int

    _found: list[dict[int, Recall]] = PrivateAttr(default_factory=list)
    _counts: list[int] = PrivateAttr(default_factory=list)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        for edit in self.edits:
            if not edit.by_pattern:
                raise error("no-pattern", method=edit.method)
            edit.check(model)

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        inputs = call.inputs
        # Not in step with the size of any tile.
        rows = torch.linspace(0, inputs.num_queries - 1, min(self.rows, inputs.num_queries)).round().long()
        self._counts[:] = int(call.layout.valid.sum()), len(rows)
        self._found.extend({} for _ in self.edits[len(self._found) :])
        everything = Sparsity(SinkAndWindow(0, inputs.num_keys))
        for number, (edit, found) in enumerate(zip(self.edits, self._found, strict=True)):
            answered: list[Primitive] = []
            if call.info is None or call.layer in edit.layers_in(call.info):
                answered = edit.primitives(replace(call, state=call.state.setdefault(str(number), {})))
            patterns = [primitive for primitive in answered if isinstance(primitive, Sparsity)]
            others: list[Primitive] = [one for one in answered if not isinstance(one, Sparsity | HeadAffine | Tap)]
            others += [one for one in call.earlier if not isinstance(one, HeadAffine | Tap)]
            found[call.layer] = measure_recall(inputs, patterns[0] if patterns else everything, rows, others)
        return []


@torch.no_grad()
def recall_of(model: nn.Module, edits: Sequence[object], rows: int = 512, **inputs: Any) -> ModelRecall:
    """Runs ``model(**inputs)`` once, what a tokenizer or processor gave, and measures what sparse ``edits`` would keep.

    Args:
        model: under the edits in force on it, which act on both sides.
        edits: each is measured by itself; anything that ``wrap`` takes, of methods that choose keys. What a method does beside
            that acts on both sides, too.
        rows: so many of each prompt's places, evenly spaced, the last one among them.

    Raises:
        EditError: a method chooses no keys, or does not fit the model.
    """
    resolved = resolve_edits(tuple(edits))
    # Some methods are handed more than queries and keys, if an edit in force says that it reads it.
    read = _Measurement.reads.union(*(edit.reads for edit in resolved))
    measurement = type("_Measurement", (_Measurement,), {"reads": read, "__annotations__": {"reads": ClassVar}})(
        edits=resolved, rows=rows
    )
    with warnings.catch_warnings():
        # It reads only, which is not acting.
        warnings.simplefilter("ignore", EditNeverActedWarning)
        with editing(model, measurement):
            model(**inputs)
    by_edit = tuple(dict(sorted(found.items())) for found in measurement._found)
    return ModelRecall(inspect_model(model).model_class, resolved, by_edit, *measurement._counts)
