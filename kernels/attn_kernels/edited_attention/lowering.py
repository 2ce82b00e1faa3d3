"""Primitives as the Triton kernels read them: a byte a key, a byte a row, and a few numbers a head.

Every distinct key group gets a bit of the key's byte and every distinct row scope a bit of the row's byte (distinct by
identity of the tensor). A key whose byte is 0 is touched by no edit, so the kernels treat it as plain attention does.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from attn_kernels.inputs import AttentionInputs
from attn_kernels.primitives import Gate, HeadAffine, LogitMap, Order, Primitive, Ranking, Regroup, Sparsity

BITS = 8
# No key has this index.
NO_KEY = 2**30
# In the packed constants below, a term's bit index takes four bits; 15 says that the term has no such bit.
NO_BIT = 15
TILE = 64


class NotLowered(ValueError):
    """These edits need something that the kernels do not have; the message says what."""


@dataclass(frozen=True)
class LoweredEdits:
    """The edits of one call. ``b`` is 1 or B, ``h`` 1 or H, ``m`` the keys that have a byte (later keys count as 0).

    A kernel takes the term constants as compile-time integers, four bits a term: ``map_keys`` holds the key bit of
    each LogitMap, ``map_rows`` its row bit. Coefficients are identity at heads that a term does not select.
    """

    key_codes: Tensor  # (b, h, m) uint8
    row_codes: Tensor | None  # (b, N) uint8; None: no edit has a row scope
    num_maps: int
    map_keys: int
    map_rows: int
    map_coefficients: Tensor  # (num_maps, 3, H) float32: scale, absolute, bias
    num_pairs: int  # of allow and deny, in the order in which they act
    pair_keys: int
    pair_rows: int
    pair_heads: Tensor  # (num_pairs, H) int8: +1 allow, -1 deny, 0 head not selected
    order_values: tuple[Tensor, Tensor] | None  # (b, N) and (b, M)
    order_heads: Tensor | None  # (H,) int8
    regroup: RegroupTerm | None
    gain: Tensor | None  # (b, H) float32
    offset: Tensor | None  # (b, H, Dv) float32
    ranking: Ranking | None  # by which the gain is multiplied in each call
    affine_row: int
    heads: Tensor | None  # (h,) int32: the heads that some edit selects; None: all
    unscoped: LoweredEdits | None  # the edits without a row scope alone, where others have one
    sparsity: Sparsity | None = None  # for the sparse kernel, which takes no other edit of the weights

    @property
    def edits_weights(self) -> bool:
        edits_keys = self.num_maps or self.num_pairs or self.order_values is not None or self.regroup is not None
        return bool(edits_keys) or self.sparsity is not None

    @property
    def edits_logits(self) -> bool:
        return bool(self.num_maps or self.num_pairs)

    @property
    def map_constants(self) -> dict[str, int]:
        """What the kernels know of the LogitMaps when they are compiled, by its name there."""
        return {"NUM_MAPS": self.num_maps, "MAP_KEYS": self.map_keys, "MAP_ROWS": self.map_rows}

    @property
    def pair_constants(self) -> dict[str, int]:
        """The same of the pairs of an Order."""
        return {"NUM_PAIRS": self.num_pairs, "PAIR_KEYS": self.pair_keys, "PAIR_ROWS": self.pair_rows}

    @property
    def regroup_constants(self) -> dict[str, int]:
        """The same of the Regroup."""
        term = self.regroup
        bits = (NO_BIT,) * 5 if term is None else (term.source, term.target, term.gate_of, term.gate_share, term.row)
        names = ("SOURCE", "TARGET", "GATE_OF", "GATE_SHARE", "REGROUP_ROW")
        return {"HAS_REGROUP": term is not None, **dict(zip(names, bits, strict=True))}

    @property
    def affine_constants(self) -> dict[str, int]:
        """The same of the HeadAffine."""
        return {
            "HAS_AFFINE": self.gain is not None,
            "HAS_OFFSET": self.offset is not None,
            "AFFINE_ROW": self.affine_row,
        }

    @property
    def scoped_rows(self) -> int:
        """Bits of all row scopes among the edits."""
        return sum(1 << bit for bit in set(self._row_bits) if bit != NO_BIT)

    @property
    def acts_on_all_rows(self) -> bool:
        """Whether some edit has no row scope."""
        return NO_BIT in self._row_bits or self.order_values is not None or self.row_codes is None

    def touched_rows(self, num_queries: int) -> tuple[int, int]:
        """The rows (first, one past the last) outside which no edit acts. Waits for the device."""
        return (0, num_queries) if self.acts_on_all_rows else self.scoped_range

    @property
    def _row_bits(self) -> list[int]:
        bits = [self.map_rows >> (4 * term) & 15 for term in range(self.num_maps)]
        bits += [self.pair_rows >> (4 * pair) & 15 for pair in range(self.num_pairs)]
        if self.regroup is not None:
            bits.append(self.regroup.row)
        if self.gain is not None:
            bits.append(self.affine_row)
        return bits

    @property
    def first_scoped_row(self) -> int:
        """The first row in any scope; as many as there are rows if there is none. Waits for the device."""
        return 0 if self.row_codes is None else self.scoped_range[0]

    @cached_property
    def scoped_range(self) -> tuple[int, int]:
        """First row in any scope and one past the last; both the number of rows if there is none. Waits for the device."""
        assert self.row_codes is not None
        scoped = (self.row_codes & self.scoped_rows != 0).any(0)
        place, size = torch.arange(len(scoped), device=scoped.device), len(scoped)
        bounds = [torch.where(scoped, place, size).min(), torch.where(scoped, place + 1, 0).max()]
        first, stop = torch.stack(bounds).tolist()
        return first, max(first, stop)

    @cached_property
    def of_last_rows(self) -> LoweredEdits:
        """The same edits for the queries from ``first_scoped_row`` on."""
        rows = None if self.row_codes is None else self.row_codes[:, self.first_scoped_row :].contiguous()
        return replace(self, row_codes=rows)

    def untouched(self, num_keys: int, size: int) -> UntouchedKeys:
        """The untouched keys by tiles of ``size``; made once for each size."""
        place = ("untouched", num_keys, size)
        if place not in self._of_codes:
            self._of_codes[place] = find_untouched(self.key_codes, num_keys, size)
        return self._of_codes[place]

    @cached_property
    def listed(self) -> ListedKeys:
        """The keys that some edit touches, by what Regroup does with them."""
        regroup = self.regroup
        place = ("listed", *((regroup.source, regroup.target) if regroup is not None else ()))
        if place not in self._of_codes:
            make = list_keys
            if self.key_codes.is_cuda:
                from attn_kernels.edited_attention.compact import list_touched_keys as make  # needs Triton
            self._of_codes[place] = make(self)
        return self._of_codes[place]

    @cached_property
    def summary(self) -> TouchedKeys:
        """What the host knows of the touched keys. Waits for the device."""
        if "summary" not in self._of_codes:
            self._of_codes["summary"] = summarize(self)
        return self._of_codes["summary"]

    @cached_property
    def span(self) -> KeySpan | None:
        """The keys that one edit has in common, if it has no Order. Waits for the device."""
        if self.num_pairs or self.order_values is not None or self.key_codes.shape[1] > 1:
            return None
        regroup = self.regroup
        place = (
            "span",
            self.num_maps,
            self.map_keys,
            *((regroup.source, regroup.target) if regroup is not None else ()),
        )
        if place not in self._of_codes:
            self._of_codes[place] = find_span(self)
        return self._of_codes[place]

    @cached_property
    def _of_codes(self) -> dict[Any, Any]:
        """What was made of these codes already, also for another layer's edits."""
        if self.key_codes not in _made_of_codes:
            _made_of_codes[self.key_codes] = {}
        return _made_of_codes[self.key_codes]


@dataclass(frozen=True)
class RegroupTerm:
    """The one Regroup of a call. Bits as in ``LoweredEdits``; ``target`` NO_BIT: every key outside the source."""

    source: int
    target: int
    gate_of: int
    gate_share: int
    row: int
    coefficients: Tensor  # (3, H) float32: keep, at_least, at_most


@dataclass(frozen=True)
class ListedKeys:
    """Indices of the touched keys, ascending, in three lists: 0 neither source nor target, 1 source, 2 target."""

    indices: Tensor  # (b, h, 3, m) int32
    counts: Tensor  # (b, h, 3) int32
    tile_flags: Tensor  # (b, h, tiles of 64 keys) int8: 0 no key touched, 1 some, 2 all


@dataclass(frozen=True)
class KeySpan:
    """The most keys that all get one edit and are no source."""

    is_target: bool
    code: int  # their byte
    term: int  # the place of their LogitMap, or NO_BIT
    start: int
    stop: int
    members: Tensor  # (b, m) bool
    runs: list[tuple[int, int]]  # of keys that no edit touches in any sample, up to the last key with a byte
    _others: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def bias(self) -> Tensor:
        """``(b, keys from start to stop)`` float32: 0 for a member, minus infinity for another."""
        return torch.where(self.members[:, self.start : self.stop], 0.0, float("-inf"))

    @cached_property
    def has_holes(self) -> bool:
        """Whether other keys lie between. Waits for the device."""
        return not bool(self.members[:, self.start : self.stop].all())

    def longest_run(self, before: int) -> tuple[int, int]:
        """Of the runs, cut off at ``before``; (0, 0) if there is none."""
        runs = [(first, min(stop, before)) for first, stop in self.runs if first < before]
        return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))

    def others_without(self, first: int, stop: int, num_keys: int) -> Tensor:
        """``(b, n)`` int32: the keys that are no members, and not from ``first`` to ``stop``, ascending, filled up with NO_KEY.

        Of ``num_keys`` keys. Waits for the device the first time.
        """
        place = (first, stop, num_keys)
        if place not in self._others:
            others = ~functional.pad(self.members, (0, max(0, num_keys - self.members.shape[1])))[:, :num_keys]
            others[:, first:stop] = False
            self._others[place] = _places(others)
        return self._others[place]


@dataclass(frozen=True)
class TouchedKeys:
    """What the host knows of the lists."""

    at_most: int  # the largest number of touched keys of a head
    end: int  # one past the last touched key of any head


@dataclass(frozen=True)
class UntouchedKeys:
    """What the plain loop visits, for codes that all heads share."""

    skips: Tensor  # (b, 2) int32: first and one past the last tile of the longest run of tiles that are touched in full
    bias: Tensor  # (b, keys up to a whole tile) float32: 0 for an untouched key, minus infinity for a touched one

    @cached_property
    def leaves_out(self) -> bool:
        """Whether any tile is left out. Waits for the device."""
        return bool((self.skips[:, 1] > self.skips[:, 0]).any())


class _Bits:
    """Hands out a bit for each distinct tensor."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.tensors: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return NO_BIT
        for bit, known in enumerate(self.tensors):
            if known is tensor:
                return bit
        if len(self.tensors) == BITS:
            raise NotLowered(f"more than {BITS} different {self.what}")
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def packed(self) -> Tensor | None:
        """One uint8 tensor over the broadcast of all tensors, shorter ones filled with 0 at the end."""
        if not self.tensors:
            return None
        length = max(tensor.shape[-1] for tensor in self.tensors)
        code: Tensor | None = None
        for bit, tensor in enumerate(self.tensors):
            # Always a copy: a view would keep the group alive, and with it the caches below.
            part = tensor.to(torch.uint8, copy=True)
            if tensor.shape[-1] < length:
                part = functional.pad(part, (0, length - tensor.shape[-1]))
            part = part << bit if bit else part
            code = part if code is None else code | part
        assert code is not None
        return code.contiguous()


# Layers share their groups: the same tensor gives the same codes, and the same codes the same lists.
_codes_of_group: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
_made_of_codes: MutableMapping[Tensor, dict[Any, Any]] = WeakTensorKeyDictionary()


def lower(inputs: AttentionInputs, edits: Sequence[Primitive]) -> LoweredEdits:
    """The primitives of a call for the kernels. Raises ``NotLowered`` for what only the PyTorch path can do."""
    num_heads, device = inputs.num_heads, inputs.query.device
    if not edits:
        return _without_edits(device)
    keys, rows = _Bits("key groups"), _Bits("row scopes")
    everywhere = [edit for edit in edits if not _is_scoped(edit)]
    maps = [edit for edit in edits if isinstance(edit, LogitMap)]
    orders = [edit for edit in edits if isinstance(edit, Order)]
    regroups = [edit for edit in edits if isinstance(edit, Regroup)]
    if any(isinstance(edit, Sparsity) for edit in edits):
        raise NotLowered("a Sparsity pattern")
    if len(regroups) > 1:
        raise NotLowered("more than one Regroup")
    if any(isinstance(edit.bias, Tensor) and edit.bias.ndim == 3 for edit in maps):
        raise NotLowered("a bias by key")
    map_keys = _nibbles([keys.of(edit.keys) for edit in maps])
    map_rows = _nibbles([rows.of(edit.rows) for edit in maps])
    coefficients = [
        _coefficients((edit.scale, edit.absolute, edit.bias), (1.0, 0.0, 0.0), edit.heads, num_heads, device)
        for edit in maps
    ]
    pairs = [
        (row, key, sign, edit.heads)
        for edit in orders
        for sign, listed in ((1.0, edit.allow), (-1.0, edit.deny))
        for row, key in listed
    ]
    values = [edit for edit in orders if edit.query_value is not None]
    if len(values) > 1 or (values and values[0] is not orders[0]):
        raise NotLowered("an Order by value that is not the only one and the first")
    regroup = None
    if regroups:
        edit = regroups[0]
        gate = edit.gate or Gate(of=edit.source, at_least=-1.0)
        regroup = RegroupTerm(
            source=keys.of(edit.source),
            target=keys.of(edit.target),
            gate_of=keys.of(gate.of if edit.gate else None),
            gate_share=keys.of(gate.share),
            row=rows.of(edit.rows),
            # The gate of a head that is not selected does not matter: it keeps all.
            coefficients=_coefficients(
                (edit.keep, gate.at_least, gate.at_most), (1.0, 0.0, 0.0), edit.heads, num_heads, device
            ),
        )
    affine = [edit for edit in edits if isinstance(edit, HeadAffine)]
    ranking = _one_ranking(affine, inputs)
    gain, offset, affine_rows = _one_affine(affine, num_heads, device)
    if ranking is not None and gain is not None:
        # As wide as what it is going to be multiplied by.
        gain = gain.expand(inputs.query.shape[0], -1).contiguous()
    affine_row = rows.of(affine_rows)
    pair_keys = _nibbles([keys.of(key) for _, key, _, _ in pairs])
    pair_rows = _nibbles([rows.of(row) for row, _, _, _ in pairs])
    key_codes = _packed_keys(keys)
    return LoweredEdits(
        key_codes=torch.zeros(1, 1, 0, dtype=torch.uint8, device=device) if key_codes is None else key_codes,
        row_codes=rows.packed(),
        num_maps=len(maps),
        map_keys=map_keys,
        map_rows=map_rows,
        map_coefficients=_stacked(coefficients) if maps else _nothing(device, torch.float32),
        num_pairs=len(pairs),
        pair_keys=pair_keys,
        pair_rows=pair_rows,
        pair_heads=_pair_heads([(sign, heads) for _, _, sign, heads in pairs], num_heads, device),
        order_values=(values[0].query_value, values[0].key_value) if values else None,
        order_heads=None if not values or values[0].heads is None else values[0].heads.to(torch.int8),
        regroup=regroup,
        gain=gain,
        offset=offset,
        ranking=ranking,
        affine_row=affine_row,
        heads=selected_heads(edits),
        unscoped=lower(inputs, everywhere) if 0 < len(everywhere) < len(edits) else None,
    )


@functools.cache
@torch.inference_mode(False)
def _without_edits(device: torch.device) -> LoweredEdits:
    nothing, no_heads = _nothing(device, torch.float32), _nothing(device, torch.int8)
    return LoweredEdits(
        key_codes=torch.zeros(1, 1, 0, dtype=torch.uint8, device=device),
        row_codes=None,
        num_maps=0,
        map_keys=0,
        map_rows=0,
        map_coefficients=nothing,
        num_pairs=0,
        pair_keys=0,
        pair_rows=0,
        pair_heads=no_heads,
        order_values=None,
        order_heads=None,
        regroup=None,
        gain=None,
        offset=None,
        ranking=None,
        affine_row=NO_BIT,
        heads=None,
        unscoped=None,
    )


def list_keys(lowered: LoweredEdits) -> ListedKeys:
    """The touched keys in plain PyTorch; ``compact.py`` does it in one launch."""
    codes = lowered.key_codes
    touched = codes != 0
    kind = _list_of(lowered)
    lists, counts = [], []
    place = torch.arange(codes.shape[-1], device=codes.device, dtype=torch.int32).expand(codes.shape)
    for which in range(3):
        chosen = touched & (kind == which)
        # A stable sort brings the chosen ones to the front in ascending order.
        order = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices
        lists.append(place.gather(-1, order).to(torch.int32))
        counts.append(chosen.sum(-1, dtype=torch.int32))
    tiled = functional.pad(touched, (0, -codes.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    flags = torch.where(tiled.all(-1), 2, tiled.any(-1).to(torch.int8)).to(torch.int8)
    return ListedKeys(
        torch.stack(lists, dim=2).contiguous(), torch.stack(counts, dim=2).contiguous(), flags.contiguous()
    )


def _list_of(lowered: LoweredEdits) -> Tensor:
    """Which list each key is in if it is touched ``(b, h, m)`` uint8."""
    codes = lowered.key_codes
    kind = torch.zeros_like(codes)
    if lowered.regroup is not None:
        if lowered.regroup.target != NO_BIT:
            kind = torch.where((codes >> lowered.regroup.target) & 1 == 1, 2, kind)
        kind = torch.where((codes >> lowered.regroup.source) & 1 == 1, 1, kind)
    return kind


def summarize(lowered: LoweredEdits) -> TouchedKeys:
    """From the codes, in one transfer."""
    codes = lowered.key_codes
    if not codes.numel():
        return TouchedKeys(0, 0)
    touched = codes != 0
    ends = torch.where(touched, torch.arange(1, codes.shape[-1] + 1, device=codes.device), 0)
    at_most, end = torch.stack([touched.sum(-1).max(), ends.max()]).tolist()
    return TouchedKeys(at_most, end)


def find_span(lowered: LoweredEdits) -> KeySpan | None:
    """Of codes ``(b, 1, m)``."""
    codes, kind = lowered.key_codes[:, 0], _list_of(lowered)[:, 0]
    of_codes = torch.bincount(torch.where(kind == 1, 0, codes).flatten().long(), minlength=2)
    of_codes[0] = 0
    most, code = (int(found) for found in of_codes.max(0))
    terms = [term for term in range(lowered.num_maps) if code >> (lowered.map_keys >> (4 * term) & 15) & 1]
    if most == 0 or len(terms) > 1:
        return None
    members = codes == code
    regroup = lowered.regroup
    is_target = regroup is not None and regroup.target != NO_BIT and code >> regroup.target & 1 == 1
    of_any = members.any(0).tolist()
    return KeySpan(
        is_target=is_target,
        code=code,
        term=terms[0] if terms else NO_BIT,
        start=of_any.index(True),
        stop=len(of_any) - of_any[::-1].index(True),
        members=members,
        runs=_runs((codes == 0).all(0).tolist()),
    )


def _runs(chosen: list[bool]) -> list[tuple[int, int]]:
    """(first, one past the last) of each run of True."""
    edges = [place for place, (left, right) in enumerate(pairwise([False, *chosen, False])) if left != right]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _places(chosen: Tensor) -> Tensor:
    """``(b, n)`` int32 from ``(b, m)`` bool: where it holds, ascending, then NO_KEY. Waits for the device."""
    counts = chosen.sum(-1, keepdim=True)
    order = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices
    places = torch.where(torch.arange(chosen.shape[-1], device=chosen.device) < counts, order, NO_KEY)
    return places[:, : int(counts.max())].to(torch.int32).contiguous()


def selected_heads(edits: Sequence[Primitive]) -> Tensor | None:
    """Indices of the heads that some edit selects; None for all. Waits for the device if nobody knows the selection here."""
    selections = []
    for edit in edits:
        heads = _heads_of(edit)
        if heads is None:
            return None
        selections.append(heads)
    if not selections:
        return None
    known = {_known_selections.get(heads, heads) for heads in selections}
    if len(known) == 1:
        return indices_of_heads(selections[0])
    named = tuple(chosen for chosen in known if isinstance(chosen, tuple))
    if len(named) == len(known):
        return indices_of_heads(_union(named, selections[0].device))
    return indices_of_heads(functools.reduce(torch.logical_or, selections))


@functools.lru_cache(maxsize=1024)
def _union(selections: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    return head_selection([any(chosen) for chosen in zip(*selections, strict=True)], device)


def indices_of_heads(heads: Tensor) -> Tensor:
    """``(h,)`` int32 from a head selection ``(H,)``. Waits for the device the first time that it sees a tensor."""
    if heads not in _indices_of_heads:
        _indices_of_heads[heads] = heads.nonzero().squeeze(-1).to(torch.int32)
    return _indices_of_heads[heads]


def head_selection(chosen: Sequence[bool], device: torch.device) -> Tensor:
    """``(H,)`` bool on ``device`` whose indices are known already: nothing waits for the device, now or later."""
    # What is made under inference_mode could not serve training later.
    with torch.inference_mode(False):
        selection = torch.tensor(chosen, device="cpu")
        indices = selection.nonzero().squeeze(-1).to(torch.int32)
        if device.type == "cuda":
            # Copies from pageable memory would wait.
            selection, indices = selection.pin_memory(), indices.pin_memory()
        selection = selection.to(device, non_blocking=True)
        _indices_of_heads[selection] = indices.to(device, non_blocking=True)
    _known_selections[selection] = tuple(chosen)
    return selection


_indices_of_heads: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
_known_selections: MutableMapping[Tensor, tuple[bool, ...]] = WeakTensorKeyDictionary()


def _heads_of(edit: Primitive) -> Tensor | None:
    if not isinstance(edit, HeadAffine) or edit.heads is not None:
        return edit.heads
    if isinstance(edit.gain, Ranking):
        return None
    touched: Tensor | None = edit.replace
    if edit.gain is not None:
        changed = (edit.gain != 1).reshape(-1, edit.gain.shape[-1]).any(0)
        touched = changed if touched is None else touched | changed
    if edit.offset is not None:
        changed = (edit.offset != 0).any(-1).reshape(-1, edit.offset.shape[-2]).any(0)
        touched = changed if touched is None else touched | changed
    return touched


def find_untouched(key_codes: Tensor, num_keys: int, size: int) -> UntouchedKeys:
    """From codes ``(b, 1, m)``, for tiles of ``size`` keys."""
    touched = functional.pad(key_codes[:, 0] != 0, (0, num_keys - key_codes.shape[-1] + -num_keys % size))
    bias = torch.where(touched, float("-inf"), 0.0)
    full = touched.unflatten(-1, (-1, size)).all(-1)
    # The length of the run of full tiles that ends at each tile: tiles so far, less those before the last break.
    tiles = torch.arange(1, full.shape[-1] + 1, device=full.device).expand(full.shape)
    length = tiles - torch.where(full, 0, tiles).cummax(-1).values
    longest, last = length.max(-1)
    skips = torch.stack([last + 1 - longest, last + 1], dim=-1).to(torch.int32)
    return UntouchedKeys(skips.contiguous(), bias)


def _packed_keys(keys: _Bits) -> Tensor | None:
    """Codes ``(b, h, m)``; those of a single group are made once for all layers that share it."""
    only = keys.tensors[0] if len(keys.tensors) == 1 else None
    keys.tensors = [tensor if tensor.ndim == 3 else tensor[:, None] for tensor in keys.tensors]
    if only is None:
        return keys.packed()
    if only.ndim == 3 and only.shape[1] > 1 and only.dtype == torch.bool and only.is_contiguous():
        # A group by head is found anew in every layer, and its bytes are the code of bit 0 already.
        return only.view(torch.uint8)
    if only not in _codes_of_group:
        packed = keys.packed()
        assert packed is not None
        _codes_of_group[only] = packed
    return _codes_of_group[only]


def _is_scoped(edit: Primitive) -> bool:
    """Whether an edit names the rows on which it acts."""
    return not isinstance(edit, Order | Sparsity) and edit.rows is not None


def _nibbles(bits: Sequence[int]) -> int:
    return sum(bit << (4 * place) for place, bit in enumerate(bits))


def _coefficients(
    values: tuple[float | Tensor, ...],
    identities: tuple[float, ...],
    heads: Tensor | None,
    num_heads: int,
    device: torch.device,
) -> Tensor:
    """``(len(values), H)`` float32; of numbers they are made once for each head selection."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or any(isinstance(value, Tensor) for value in values):
        # A captured graph's memory is its own.
        pairs = zip(values, identities, strict=True)
        return torch.stack([_of_heads(value, identity, heads, num_heads, device) for value, identity in pairs])
    # What is made under inference_mode could not serve training later.
    with torch.inference_mode(False):
        if heads is None:
            return _coefficients_of_all_heads(values, num_heads, device)
        known = _coefficients_of_selection.setdefault(heads, {})
        if (values, identities) not in known:
            # A tensor made of numbers waits for the device: those of all heads are there from the first layer on.
            edited, unedited = (_coefficients_of_all_heads(row, num_heads, device) for row in (values, identities))
            known[values, identities] = torch.where(heads, edited, unedited)
        return known[values, identities]


@functools.lru_cache(maxsize=256)
def _coefficients_of_all_heads(values: tuple[float, ...], num_heads: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None].expand(-1, num_heads).contiguous()


_coefficients_of_selection: MutableMapping[Tensor, dict[Any, Tensor]] = WeakTensorKeyDictionary()


def _of_heads(
    value: float | Tensor, identity: float, heads: Tensor | None, num_heads: int, device: torch.device
) -> Tensor:
    """``(H,)`` float32: the value at the selected heads, the identity at the others."""
    if isinstance(value, Tensor):
        full = value.to(device, torch.float32).expand(num_heads)
    else:
        full = torch.full((num_heads,), float(value), device=device)
    return full if heads is None else torch.where(heads, full, identity)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _pair_heads(pairs: Sequence[tuple[float, Tensor | None]], num_heads: int, device: torch.device) -> Tensor:
    rows = [_of_heads(sign, 0.0, heads, num_heads, device).to(torch.int8) for sign, heads in pairs]
    return torch.stack(rows) if rows else _nothing(device, torch.int8)


@functools.cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


@functools.cache
def _no_gain(num_heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, num_heads, device=device)


def _one_ranking(edits: Sequence[HeadAffine], inputs: AttentionInputs) -> Ranking | None:
    """The ranking among the gains. It multiplies what the edits so far made of the output, so that it has to be the first."""
    rankings = [edit.gain for edit in edits if isinstance(edit.gain, Ranking)]
    if not rankings:
        return None
    if inputs.num_queries > 1:
        raise NotLowered("a Ranking of heads for several queries")
    if len(rankings) > 1 or any(edit.offset is not None for edit in edits):
        raise NotLowered("a Ranking of heads beside another one or an offset")
    return rankings[0]


def _one_affine(
    edits: Sequence[HeadAffine], num_heads: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All HeadAffines as one gain ``(b, H)`` and offset ``(b, H, D)``, and the rows that they share."""
    if not edits:
        return None, None, None
    if any(edit.rows is not edits[0].rows for edit in edits):
        raise NotLowered("HeadAffines with different row scopes")
    gain: Tensor | None = None
    offset: Tensor | None = None
    for edit in edits:
        factor = _no_gain(num_heads, device)
        if isinstance(edit.gain, Tensor):
            factor = edit.gain.to(device, torch.float32).reshape(-1, num_heads)
        if edit.replace is not None:
            factor = torch.where(edit.replace.to(device), 0.0, factor)
        gain = factor if gain is None else gain * factor
        if offset is not None:
            offset = offset * factor[..., None]
        if edit.offset is not None:
            added = edit.offset.to(device, torch.float32).reshape(-1, num_heads, edit.offset.shape[-1])
            offset = added if offset is None else offset + added
    assert gain is not None
    return gain.contiguous(), None if offset is None else offset.contiguous(), edits[0].rows
