"""Several Regroups one after the other: once over the keys for the masses, once for the output.

A Regroup multiplies the weights of a row by one number for the source and by another for the target, and leaves their sum as it
is. So do several, with a number for each class of keys that they treat alike. The first pass is attention to values that say
each key's class, in float32: its output are the classes' masses, from which the numbers follow (``edit_algebra``: Regroup). The
second adds their logarithms to the logits, from which the softmax makes the weights again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from attn_kernels.edited_attention.edited_flash import KeyClasses, edited_flash
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered, lower
from attn_kernels.inputs import AttentionInputs
from attn_kernels.primitives import SMALLEST_TARGET, HeadAffine, LogitMap, Primitive, Regroup

# As many as a product of tiles in Triton has columns at least; the keys of no group are one.
MOST_CLASSES = 16
# Of keys that hold none of a row's mass: only that it stays a number matters.
LARGEST_FACTOR = 1e30


def several_regroups(inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
    """Output ``(B, H, N, Dv)`` in the value's dtype under all edits.

    Raises:
        NotLowered: groups by head, sink logits, more than 16 classes of keys, or what ``lower`` can't lower.
    """
    regroups = [edit for edit in edits if isinstance(edit, Regroup)]
    others = [edit for edit in edits if not isinstance(edit, Regroup)]
    groups = list({id(group): group for edit in regroups for group in _groups_of(edit)}.values())
    if inputs.sink_logits is not None:
        raise NotLowered("several Regroups beside sink logits")
    if any(group.shape[1] > 1 for group in groups):
        raise NotLowered("several Regroups of keys by head")
    # An identity map gives a group its bit among the keys' codes, and its keys a place in the list of touched ones.
    num_maps = sum(isinstance(edit, LogitMap) for edit in others)
    lowered = lower(inputs, [*others, *(LogitMap(group) for group in groups)])
    bit_of = {id(group): lowered.map_keys >> (4 * (num_maps + place)) & 15 for place, group in enumerate(groups)}
    bits = sum(1 << bit for bit in set(bit_of.values()))
    codes = _classes_of(lowered, bits)
    plain = [edit for edit in others if not isinstance(edit, HeadAffine)]
    masses = _masses(inputs, lower(inputs, plain), lowered.key_codes & bits, codes)
    factors = _factors(regroups, masses, [{name for name, bit in bit_of.items() if code >> bit & 1} for code in codes])
    # Of the keys in no group, which the second pass leaves alone; their number is never 0, since no source has them.
    relative = (factors / factors[:, :, :1])[:, :, 1:]
    classes = KeyClasses(
        bits=bits,
        codes=torch.tensor(codes[1:], dtype=torch.int32, device=masses.device),
        bias=relative.log2().contiguous(),
    )
    return edited_flash(inputs, lowered, classes=classes)[0]


def _groups_of(edit: Regroup) -> list[Tensor]:
    gate = edit.gate
    listed = [edit.source, edit.target, *((gate.of, gate.share) if gate is not None else ())]
    return [group for group in listed if group is not None]


def _classes_of(lowered: LoweredEdits, bits: int) -> list[int]:
    """The codes that keys have, 0 first. Waits for the device once for all layers with these groups."""
    place = ("classes", bits)
    if place not in lowered._of_codes:
        lowered._of_codes[place] = [0, *(code for code in torch.unique(lowered.key_codes & bits).tolist() if code)]
    codes: list[int] = lowered._of_codes[place]
    if len(codes) > MOST_CLASSES:
        raise NotLowered(f"several Regroups of {len(codes)} classes of keys")
    return codes


def _masses(inputs: AttentionInputs, lowered: LoweredEdits, key_codes: Tensor, codes: list[int]) -> Tensor:
    """``(B, H, C, N)`` float32: each row's weight on the keys of each class before the Regroups."""
    batch, num_heads, num_queries = inputs.query.shape[:3]
    # Keys after the groups' end are in none.
    key_codes = functional.pad(key_codes[:, 0], (0, inputs.num_keys - key_codes.shape[-1]))
    of_class = torch.tensor([*codes, *[-1] * (MOST_CLASSES - len(codes))], device=key_codes.device)
    is_in = (key_codes[:, None, :, None].int() == of_class).float().expand(batch, 1, -1, -1).contiguous()
    value = is_in.expand(-1, inputs.key.shape[1], -1, -1)
    output = value.new_empty(batch, num_heads, num_queries, MOST_CLASSES)
    edited_flash(replace(inputs, value=value), lowered, output=output)
    return output[..., : len(codes)].transpose(2, 3)


def _factors(regroups: Sequence[Regroup], masses: Tensor, groups: Sequence[set[int]]) -> Tensor:
    """``(B, H, C, N)``: by what all Regroups together multiply each row's weights of each class."""
    factors = torch.ones_like(masses)
    for edit in regroups:
        now = factors * masses

        def mass(group: Tensor | None, now: Tensor = now) -> Tensor:
            return sum((now[:, :, place] for place, of in enumerate(groups) if id(group) in of), 0.0 * now[:, :, 0])

        in_source = [id(edit.source) in of for of in groups]
        in_target = [
            not source and (edit.target is None or id(edit.target) in of)
            for source, of in zip(in_source, groups, strict=True)
        ]
        source, target = (now[:, :, which].sum(2) for which in (in_source, in_target))
        acts = target > SMALLEST_TARGET
        if edit.gate is not None:
            whole = mass(edit.gate.of)
            acts = acts & (whole >= edit.gate.at_least)
            if edit.gate.share is not None:
                acts = acts & (mass(edit.gate.share) <= edit.gate.at_most * whole)
        if edit.heads is not None:
            acts = acts & edit.heads[None, :, None]
        if edit.rows is not None:
            acts = acts & edit.rows[:, None, :]
        keep = edit.keep[:, None].to(now) if isinstance(edit.keep, Tensor) else edit.keep
        gained = 1 + (1 - keep) * source / torch.where(acts, target, 1.0)
        kept = torch.ones_like(source) * keep
        for place in range(len(groups)):
            change = kept if in_source[place] else gained if in_target[place] else None
            if change is not None:
                factors[:, :, place] *= torch.where(acts, change, 1.0)
        factors.clamp_(max=LARGEST_FACTOR)
    return factors
