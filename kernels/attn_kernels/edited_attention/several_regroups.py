"""Several Regroups one after the other: once over the keys for the masses, once for the output.

A Regroup multiplies the weights of a row by one number for the source and by another for the target, and leaves their sum as it
is. So do several, with a number for each class of keys that they treat alike. The first pass is attention to values that say
each key's class: its output are the classes' masses, from which the numbers follow (``edit_algebra``: Regroup). The second adds
their logarithms to the logits, from which the softmax makes the weights again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from attn_kernels.edited_attention.edited_flash import KeyClasses, edited_flash
from attn_kernels.edited_attention.lowering import NO_BIT, LoweredEdits, NotLowered, lower
from attn_kernels.inputs import AttentionInputs
from attn_kernels.primitives import SMALLEST_TARGET, HeadAffine, LogitMap, Primitive, Regroup

# As many as a product of tiles in Triton has columns at least; the keys of no group are one.
MOST_CLASSES = 16
# Of keys that hold none of a row's mass: only that it stays a number matters.
LARGEST_FACTOR = 1e30


@dataclass(frozen=True)
class _Bits:
    """Where a Regroup's groups stand in the keys' codes. Without a target: every key outside the source."""

    source: int
    target: int = NO_BIT
    gate_of: int = NO_BIT
    gate_share: int = NO_BIT


@dataclass(frozen=True)
class _Classes:
    """What is known of the classes whatever the layer. ``codes[0]`` is 0, the keys of no group.

    Attributes:
        value: ``(b, 1, M, 16)``: 1 where a key is in the class, else 0.
        members: for each Regroup ``(4, C)`` float32: which classes are its source, target, gate's group and share.
        changes: for each Regroup ``(C,)``: 0 for classes that it leaves alone, 1 for its source, 2 for its target.
    """

    bits: int
    codes: Tensor
    value: Tensor
    members: list[Tensor]
    changes: list[Tensor]


def several_regroups(inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
    """Output ``(B, H, N, Dv)`` in the value's dtype under all edits.

    Raises:
        NotLowered: groups by head, sink logits, more than 16 classes of keys, or what ``lower`` can't lower.
    """
    regroups = [edit for edit in edits if isinstance(edit, Regroup)]
    others = [edit for edit in edits if not isinstance(edit, Regroup)]
    groups = list({id(group): group for edit in regroups for group in _groups_of(edit) if group is not None}.values())
    if inputs.sink_logits is not None:
        raise NotLowered("several Regroups beside sink logits")
    if any(group.shape[1] > 1 for group in groups):
        raise NotLowered("several Regroups of keys by head")
    # An identity map gives a group its bit among the keys' codes, and its keys a place in the list of touched ones.
    num_maps = sum(isinstance(edit, LogitMap) for edit in others)
    lowered = lower(inputs, [*others, *(LogitMap(group) for group in groups)])
    bit_of = {id(group): lowered.map_keys >> (4 * (num_maps + place)) & 15 for place, group in enumerate(groups)}
    classes = _classes_of(
        inputs, lowered, [_Bits(*(bit_of.get(id(group), NO_BIT) for group in _groups_of(edit))) for edit in regroups]
    )
    plain = [edit for edit in others if not isinstance(edit, HeadAffine)]
    factors = _factors(regroups, classes, _masses(inputs, lower(inputs, plain), classes))
    # Over that of the keys in no group, which the second pass leaves alone; it is never 0, since no source has them.
    relative = factors[:, :, 1:] / factors[:, :, :1]
    added = KeyClasses(classes.bits, classes.codes[1:], relative.log2().contiguous())
    return edited_flash(inputs, lowered, classes=added)[0]


def _groups_of(edit: Regroup) -> tuple[Tensor | None, ...]:
    """In the order of ``_Bits``."""
    gate = edit.gate
    return edit.source, edit.target, None if gate is None else gate.of, None if gate is None else gate.share


def _classes_of(inputs: AttentionInputs, lowered: LoweredEdits, regroups: Sequence[_Bits]) -> _Classes:
    """Waits for the device once for all layers with these groups."""
    half = inputs.query.dtype != torch.float32
    place = ("classes", *regroups, inputs.num_keys, half)
    if place not in lowered._of_codes:
        lowered._of_codes[place] = _find_classes(inputs, lowered, regroups, torch.bfloat16 if half else torch.float32)
    found: _Classes = lowered._of_codes[place]
    return found


def _find_classes(
    inputs: AttentionInputs, lowered: LoweredEdits, regroups: Sequence[_Bits], dtype: torch.dtype
) -> _Classes:
    named = {bit for edit in regroups for bit in (edit.source, edit.target, edit.gate_of, edit.gate_share)} - {NO_BIT}
    bits = sum(1 << bit for bit in named)
    # Keys after the groups' end are in none.
    of_keys = functional.pad(lowered.key_codes[:, 0] & bits, (0, inputs.num_keys - lowered.key_codes.shape[-1])).int()
    codes = [0, *(code for code in torch.unique(of_keys).tolist() if code)]
    if len(codes) > MOST_CLASSES:
        raise NotLowered(f"several Regroups of {len(codes)} classes of keys")
    device = of_keys.device
    columns = torch.tensor([*codes, *[-1] * (MOST_CLASSES - len(codes))], device=device)
    members, changes = [], []
    for edit in regroups:
        of_bits = [[bit != NO_BIT and code >> bit & 1 for code in codes] for bit in (edit.gate_of, edit.gate_share)]
        source = [code >> edit.source & 1 for code in codes]
        target = [
            not of_source and (edit.target == NO_BIT or code >> edit.target & 1)
            for of_source, code in zip(source, codes, strict=True)
        ]
        member = torch.tensor([source, target, *of_bits], dtype=torch.float32, device=device)
        members.append(member)
        changes.append((member[0] + 2 * member[1]).long())
    value = (of_keys[:, None, :, None] == columns).to(dtype)
    return _Classes(bits, columns[: len(codes)].int(), value, members, changes)


def _masses(inputs: AttentionInputs, lowered: LoweredEdits, classes: _Classes) -> Tensor:
    """``(B, H, C, N)`` float32: each row's weight on the keys of each class before the Regroups."""
    batch, num_heads, num_queries = inputs.query.shape[:3]
    value = classes.value.expand(batch, inputs.key.shape[1], -1, -1)
    output = inputs.query.new_empty(batch, num_heads, num_queries, MOST_CLASSES, dtype=torch.float32)
    edited_flash(replace(inputs, value=value), lowered, output=output)
    return output[..., : len(classes.codes)].transpose(2, 3)


def _factors(regroups: Sequence[Regroup], classes: _Classes, masses: Tensor) -> Tensor:
    """``(B, H, C, N)``: by what all Regroups together multiply each row's weights of each class."""
    factors = torch.ones_like(masses)
    for edit, member, change in zip(regroups, classes.members, classes.changes, strict=True):
        source, target, whole, share = (member @ (factors * masses)).unbind(2)
        acts = target > SMALLEST_TARGET
        if edit.gate is not None:
            acts = acts & (whole >= edit.gate.at_least)
            if edit.gate.share is not None:
                acts = acts & (share <= edit.gate.at_most * whole)
        if edit.heads is not None:
            acts = acts & edit.heads[None, :, None]
        if edit.rows is not None:
            acts = acts & edit.rows[:, None, :]
        keep = edit.keep[:, None].to(source) if isinstance(edit.keep, Tensor) else edit.keep
        kept = torch.where(acts, keep, 1.0)
        gained = 1 + (1 - kept) * source / torch.where(acts, target, 1.0)
        of_kinds = torch.stack([torch.ones_like(gained), kept.expand_as(gained), gained], dim=2)
        factors = (factors * of_kinds.index_select(2, change)).clamp_(max=LARGEST_FACTOR)
    return factors
