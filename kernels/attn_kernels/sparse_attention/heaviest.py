"""The heaviest entries of many rows: until they hold a share of the row, or so many. Without a sort, and without waiting.

Numbers that are not negative have the order of their bits. A program owns a row and looks for the bits of its smallest kept number
by bisection, 31 sums over the row. Of equal numbers at that border the first are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.launch import launch, power_of_two

# Numbers of a row looked at together at most, and warps.
LARGEST_BLOCK, WARPS = 4096, 4
# Those of infinity.
LARGEST_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _heaviest(
    numbers,
    kept,
    places,
    length,
    room,
    share,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``kept`` in: those kept at any rate; out: all that are. By count: ``places`` of ``room`` kept numbers, instead."""
    row = tl.program_id(0).to(tl.int64)
    numbers += row * length
    if not BY_COUNT:
        kept += row * length
    in_block = tl.arange(0, BLOCK)
    needed = share * room
    if not BY_COUNT:
        everything, forced = 0.0, 0.0
        for begin in range(0, length, BLOCK):
            inside = begin + in_block < length
            number = tl.load(numbers + begin + in_block, mask=inside, other=0.0)
            is_forced = tl.load(kept + begin + in_block, mask=inside, other=0) != 0
            everything += tl.sum(number, 0)
            forced += tl.sum(tl.where(is_forced, number, 0.0), 0)
        needed = share * everything - forced
    # The largest border from which on the numbers reach what is needed.
    low, high = 0, LARGEST_BITS
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        reached = 0.0
        for begin in range(0, length, BLOCK):
            inside = begin + in_block < length
            number = tl.load(numbers + begin + in_block, mask=inside, other=-1.0)
            counts = number.to(tl.int32, bitcast=True) >= middle
            if BY_COUNT:
                reached += tl.sum(counts.to(tl.float32), 0)
            else:
                is_forced = tl.load(kept + begin + in_block, mask=inside, other=0) != 0
                reached += tl.sum(tl.where(counts & (is_forced == 0), number, 0.0), 0)
        enough = reached >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = 0.0
    for begin in range(0, length, BLOCK):
        inside = begin + in_block < length
        number = tl.load(numbers + begin + in_block, mask=inside, other=-1.0)
        counts = number.to(tl.int32, bitcast=True) > low
        if BY_COUNT:
            above += tl.sum(counts.to(tl.float32), 0)
        else:
            is_forced = tl.load(kept + begin + in_block, mask=inside, other=0) != 0
            above += tl.sum(tl.where(counts & (is_forced == 0), number, 0.0), 0)
    border = tl.cast(tl.minimum(low, LARGEST_BITS - 1), tl.float32, bitcast=True)
    equal_before, kept_before = 0, 0
    for begin in range(0, length, BLOCK):
        inside = begin + in_block < length
        number = tl.load(numbers + begin + in_block, mask=inside, other=-1.0)
        bits = number.to(tl.int32, bitcast=True)
        if BY_COUNT:
            is_equal = (bits == low).to(tl.int32)
            before = above + (equal_before + tl.cumsum(is_equal, 0) - is_equal)
            is_kept = ((bits > low) | ((is_equal != 0) & (before < needed))).to(tl.int32)
            tl.store(places + row * room + kept_before + tl.cumsum(is_kept, 0) - 1, begin + in_block, mask=is_kept != 0)
            kept_before += tl.sum(is_kept, 0)
        else:
            is_forced = tl.load(kept + begin + in_block, mask=inside, other=0) != 0
            is_equal = ((bits == low) & (low > 0) & (is_forced == 0)).to(tl.int32)
            before = above + (equal_before + tl.cumsum(is_equal, 0) - is_equal) * border
            is_kept = is_forced | (bits > low) | ((is_equal != 0) & (before < needed))
            tl.store(kept + begin + in_block, is_kept.to(tl.uint8), mask=inside)
        equal_before += tl.sum(is_equal, 0)
    if BY_COUNT:
        for begin in range(kept_before, room, BLOCK):
            tl.store(places + row * room + begin + in_block, length, mask=begin + in_block < room)


def keep_heaviest_(kept: Tensor, mass: Tensor, threshold: float) -> Tensor:
    """Sets in ``kept`` ``(..., U)`` bool, contiguous, which says what is kept at any rate, the heaviest others of ``mass``
    ``(..., U)`` float32, none negative, until all that are kept hold ``threshold`` of the row. Returns it."""
    mass = mass.contiguous()
    length = mass.shape[-1]
    _launch(mass, kept.view(torch.uint8), None, length, 1, threshold, by_count=False)
    return kept


def heaviest_places(numbers: Tensor, count: int) -> Tensor:
    """``(..., count)`` int64, ascending: the places of the ``count`` largest of ``numbers`` ``(..., M)`` float32. Negative ones are
    never kept; M stands where there are too few others."""
    numbers = numbers.contiguous()
    places = torch.empty(*numbers.shape[:-1], count, dtype=torch.int64, device=numbers.device)
    _launch(numbers, None, places, numbers.shape[-1], count, 1.0, by_count=True)
    return places


def _launch(
    numbers: Tensor, kept: Tensor | None, places: Tensor | None, length: int, room: int, share: float, by_count: bool
) -> None:
    launch(
        _heaviest,
        (numbers.numel() // length, 1, 1),
        (numbers, kept, places, length, room, float(share)),
        {"BY_COUNT": by_count, "BLOCK": min(LARGEST_BLOCK, power_of_two(length))},
        WARPS,
    )
