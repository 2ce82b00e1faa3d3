"""Lists of the touched keys in one launch, as ``lowering.list_keys`` says them.

A program owns some consecutive keys of one row of codes. How many keys of each list lie before its own it counts itself:
that reads the row's first bytes again, but nobody waits for another program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attn_kernels.edited_attention.launch import ceil_div, launch
from attn_kernels.edited_attention.lowering import NO_BIT, TILE, ListedKeys, LoweredEdits
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.edited_attention.tiles import has_bit

# Keys of a program (whole tiles), keys before them that it counts at once, and warps.
OWN_KEYS = 1024
COUNTED_KEYS = 4096
WARPS = 8

# With several lists, their counts share one number: so many bits each.
COUNT_BITS = 21
COUNT_BITS_IN_KERNEL = tl.constexpr(COUNT_BITS)
FULL_COUNT = tl.constexpr(2**COUNT_BITS - 1)


@triton.jit
def _list_of(code, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    """0 neither source nor target, 1 source, 2 target and not source."""
    which = tl.zeros(code.shape, tl.int32)
    if TARGET != NO_BIT_IN_KERNEL:
        which = tl.where(has_bit(code, TARGET), 2, which)
    if SOURCE != NO_BIT_IN_KERNEL:
        which = tl.where(has_bit(code, SOURCE), 1, which)
    return which


@triton.jit
def _as_counts(code, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    """A touched key as a one in its list's count."""
    touched = (code != 0).to(tl.int32)
    if SOURCE != NO_BIT_IN_KERNEL:
        touched = touched.to(tl.int64) << (_list_of(code, SOURCE, TARGET).to(tl.int64) * COUNT_BITS_IN_KERNEL)
    return touched


@triton.jit
def _count_of(counts, which, SOURCE: tl.constexpr):
    if SOURCE != NO_BIT_IN_KERNEL:
        count = ((counts >> (which.to(tl.int64) * COUNT_BITS_IN_KERNEL)) & FULL_COUNT).to(tl.int32)
    else:
        count = tl.where(which == 0, counts, 0)
    return count


@triton.jit
def _list_touched_keys(
    codes,
    codes_b,
    codes_h,
    codes_m,
    num_keys,
    indices,
    counts,
    tile_flags,
    num_flags,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    OWN: tl.constexpr,
    COUNTED: tl.constexpr,
    FLAG_TILE: tl.constexpr,
):
    own = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    codes_base = codes + tl.program_id(2).to(tl.int64) * codes_b + tl.program_id(1).to(tl.int64) * codes_h

    before = _as_counts(tl.zeros([COUNTED], tl.int32), SOURCE, TARGET)
    for first in tl.range(0, own * OWN, COUNTED):
        at = first + tl.arange(0, COUNTED)
        code = tl.load(codes_base + at * codes_m, mask=at < own * OWN, other=0).to(tl.int32)
        before += _as_counts(code, SOURCE, TARGET)
    start = tl.sum(before, 0)

    keys = own * OWN + tl.arange(0, OWN)
    code = tl.load(codes_base + keys * codes_m, mask=keys < num_keys, other=0).to(tl.int32)
    ones = _as_counts(code, SOURCE, TARGET)
    which = _list_of(code, SOURCE, TARGET)
    # Counted with the key itself, whose place is one less.
    place = _count_of(start + tl.cumsum(ones, 0), which, SOURCE) - 1
    tl.store(indices + (row * 3 + which) * num_keys + place, keys, mask=code != 0)

    touched = tl.sum(tl.reshape((code != 0).to(tl.int32), [OWN // FLAG_TILE, FLAG_TILE]), 1)
    flag = tl.where(touched == FLAG_TILE, 2, (touched > 0).to(tl.int32)).to(tl.int8)
    tile = own * (OWN // FLAG_TILE) + tl.arange(0, OWN // FLAG_TILE)
    tl.store(tile_flags + row * num_flags + tile, flag, mask=tile < num_flags)

    if own == tl.num_programs(0) - 1:
        in_lists = tl.arange(0, 4)
        listed = _count_of(start + tl.sum(ones, 0), in_lists, SOURCE)
        tl.store(counts + row * 3 + in_lists, listed, mask=in_lists < 3)


def list_touched_keys(lowered: LoweredEdits) -> ListedKeys:
    """The touched keys of ``lowered``. Indices beyond a list's count are not written.

    Raises ValueError for 2 million keys or more under a Regroup.
    """
    codes, regroup = lowered.key_codes, lowered.regroup
    batch, heads, num_keys = codes.shape
    num_flags = ceil_div(num_keys, TILE)
    if regroup is not None and num_keys >= 2**COUNT_BITS:
        raise ValueError(f"lists of {num_keys} keys for a Regroup; at most {2**COUNT_BITS - 1}")
    indices = torch.empty(batch, heads, 3, num_keys, dtype=torch.int32, device=codes.device)
    tile_flags = torch.empty(batch, heads, num_flags, dtype=torch.int8, device=codes.device)
    if num_keys == 0:
        return ListedKeys(indices, torch.zeros(batch, heads, 3, dtype=torch.int32, device=codes.device), tile_flags)
    counts = torch.empty(batch, heads, 3, dtype=torch.int32, device=codes.device)
    launch(
        _list_touched_keys,
        (ceil_div(num_keys, OWN_KEYS), heads, batch),
        (
            codes,
            *codes.stride(),
            num_keys,
            indices,
            counts,
            tile_flags,
            num_flags,
        ),
        {
            "SOURCE": NO_BIT if regroup is None else regroup.source,
            "TARGET": NO_BIT if regroup is None else regroup.target,
            "OWN": OWN_KEYS,
            "COUNTED": COUNTED_KEYS,
            "FLAG_TILE": TILE,
        },
        WARPS,
    )
    return ListedKeys(indices, counts, tile_flags)
