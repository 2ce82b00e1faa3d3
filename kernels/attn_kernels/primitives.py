"""The primitives that an edit is made of, as plain tensors for one attention call.

Order of application, fixed: scale, softcap, LogitMap, Order and Sparsity, softmax, Regroup, HeadAffine. Primitives of
one kind apply in list order.

Shapes: B batch, H query heads, N queries, M keys, D head_dim of the value. A dimension written ``B|1`` may be 1 and is
then broadcast. A key group is a bool tensor ``(B|1, H|1, M)``; a row scope is a bool tensor ``(B|1, N)``; a head
selection is a bool tensor ``(H,)``. ``None`` means all. A key group may be shorter than M: later keys are outside it, so
that the groups of a prompt serve every decode step. Groups, scopes and selections must not be changed in place once they
have been used: what the kernels read is made of them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.nn import functional

from attn_kernels.inputs import AttentionInputs, Rows
from attn_kernels.patterns import HeaviestKeys, KeyTiles, Pattern

# A target below this share of the row's mass counts as none: float32 does not tell it from one without mass.
SMALLEST_TARGET = 1e-30


@dataclass(frozen=True)
class LogitMap:
    """Before softmax, on the keys of a group: ``s <- scale * s + absolute * |s| + bias``. Identity: 1, 0, 0.

    Coefficients are floats or tensors ``(H,)``; a bias may be by key, too, ``(B|1, H|1, M)``. A bias of minus infinity
    removes the keys for good: a later map does not bring them back.
    """

    keys: Tensor
    scale: float | Tensor = 1.0
    absolute: float | Tensor = 0.0
    bias: float | Tensor = 0.0
    heads: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """Who may see whom. Identity: causal by index, no pairs.

    With values given, a query sees a key iff ``key_value <= query_value``, in place of the causal test by index. Then
    each pair ``(rows, keys)`` of ``allow`` is added and each of ``deny`` taken away; padding stays invisible.
    """

    query_value: Tensor | None = None  # (B|1, N)
    key_value: Tensor | None = None  # (B|1, M)
    allow: tuple[tuple[Tensor, Tensor], ...] = ()  # of (B|1, N) and (B|1, M)
    deny: tuple[tuple[Tensor, Tensor], ...] = ()
    heads: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.query_value is None) != (self.key_value is None):
            raise ValueError("Order needs query_value and key_value together, or neither")


@dataclass(frozen=True)
class Sparsity:
    """A query visits only the keys that the pattern shows, out of those it may see. Identity: no Sparsity.

    The last ``dense_rows`` of each sample's real queries in the call visit everything.
    """

    pattern: Pattern | KeyTiles | HeaviestKeys
    heads: Tensor | None = None
    dense_rows: int = 0

    def shown(self, inputs: AttentionInputs, rows: Rows) -> Tensor:
        """``(B|1, H|1, n, M)`` bool: what the pattern shows to some of the queries, before the model's own rules."""
        if isinstance(self.pattern, KeyTiles | HeaviestKeys):
            shown = self.pattern.shown(inputs, rows)
        else:
            query_position = inputs.query_position[:, None, rows, None]
            shown = self.pattern.visible(query_position, inputs.key_position[:, None, None, :])
        if not self.dense_rows:
            return shown
        from_here_on = inputs.query_valid.flip(-1).cumsum(-1).flip(-1)
        return shown | (from_here_on <= self.dense_rows)[:, None, rows, None]


@dataclass(frozen=True)
class Gate:
    """Lets a Regroup act on a row: ``mass(of) >= at_least`` and ``mass(share) <= at_most * mass(of)``."""

    of: Tensor
    at_least: float = 0.0
    share: Tensor | None = None
    at_most: float = 1.0


@dataclass(frozen=True)
class Regroup:
    """After softmax, keys of ``source`` keep the factor ``keep`` of their weight; the freed mass goes to ``target``.

    The target's keys receive it in proportion to their weight; ``None`` means every key outside the source. Keys in
    both groups count as source. Row sums do not change. A row whose target holds no more than ``SMALLEST_TARGET`` of its mass,
    or whose gate is shut, is left as it is. Identity: keep 1.
    """

    source: Tensor
    keep: float | Tensor
    target: Tensor | None = None
    gate: Gate | None = None
    heads: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """A gain by each row's own query: 1 for the ``kept`` heads whose queries go along most, ``otherwise`` for the others.

    A head's score is the product of its query, as given to the call, with ``along`` of its key and value head. Of equal
    heads the first counts as larger. Samples outside ``where`` keep all heads.
    """

    along: Tensor  # (B, K, D) float
    kept: int
    otherwise: float
    where: Tensor | None = None  # (B,) bool


@dataclass(frozen=True)
class HeadAffine:
    """On a head's output, before o_proj: ``z <- gain * z + offset``. Identity: 1, 0.

    ``replace`` ``(H,)`` drops the head's own output first, so that only the offset remains. ``heads`` ``(H,)`` bool are the only
    heads that this changes, if the caller knows; else the values tell, and looking at them waits for the device.
    """

    gain: Tensor | Ranking | None = None  # (H,) or (B, H)
    offset: Tensor | None = None  # (H, D) or (B, H, D)
    replace: Tensor | None = None
    rows: Tensor | None = None
    heads: Tensor | None = None


TapKind = Literal["log_sum_exp", "group_mass", "column_sum", "column_mean", "row_weights", "entropy"]


@dataclass(frozen=True)
class Tap:
    """Reads the final weights (after Regroup) as a reduction that needs no N x M memory, and edits nothing.

    ``receive`` gets one tensor for the heads selected, h of them, in float32:

    - ``log_sum_exp``: ``(B, h, N)`` of the edited logits, natural log.
    - ``group_mass``: ``(B, h, N)``, the weight on ``keys``.
    - ``column_sum``: ``(B, h, M)``, the weight that each key receives, summed over the rows of ``rows``.
    - ``column_mean``: ``(B, h, M)``, that sum over the number of those rows that may see the key; 0 where none may.
    - ``row_weights``: ``(B, h, M)``, the weights of the last query.
    - ``entropy``: ``(B, h, N)``, in nats.
    """

    kind: TapKind
    receive: Callable[[Tensor], None]
    keys: Tensor | None = None
    heads: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind == "group_mass" and self.keys is None:
            raise ValueError("a group_mass Tap needs keys")


Primitive = LogitMap | Order | Sparsity | Regroup | HeadAffine | Tap


def filled_to(edit: Primitive, num_keys: int) -> Primitive:
    """The same primitive with every key group as long as the keys."""

    def fill(group: Tensor | None) -> Tensor | None:
        if group is None or group.shape[-1] == num_keys:
            return group
        return functional.pad(group, (0, num_keys - group.shape[-1]))

    if isinstance(edit, LogitMap):
        by_key = isinstance(edit.bias, Tensor) and edit.bias.ndim == 3
        return replace(edit, keys=fill(edit.keys), bias=fill(edit.bias) if by_key else edit.bias)
    if isinstance(edit, Order):
        allow, deny = (tuple((rows, fill(keys)) for rows, keys in pairs) for pairs in (edit.allow, edit.deny))
        return replace(edit, allow=allow, deny=deny)
    if isinstance(edit, Regroup):
        gate = edit.gate
        if gate is not None:
            gate = replace(gate, of=fill(gate.of), share=fill(gate.share))
        return replace(edit, source=fill(edit.source), target=fill(edit.target), gate=gate)
    if isinstance(edit, Tap):
        return replace(edit, keys=fill(edit.keys))
    return edit
