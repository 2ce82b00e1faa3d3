"""Gain and offset on head outputs, in place, on the heads that have one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.launch import batch_stride, ceil_div, launch, power_of_two
from attn_kernels.edited_attention.lowering import LoweredEdits
from attn_kernels.edited_attention.tiles import NO_BIT, has_bit

# Rows of a tile and warps.
ROWS = 64
WARPS = 4


@triton.jit
def _head_affine(
    output,
    o_b,
    o_h,
    o_n,
    heads,
    num_queries,
    row_codes,
    row_codes_stride,
    gain,
    gain_b,
    offset,
    offset_b,
    HAS_HEADS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Heads lie side by side in memory, so programs of one row tile follow each other.
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(0)).to(tl.int64)
    else:
        head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_dv = tl.arange(0, BLOCK_DV)
    row_inside = rows < num_queries
    inside = row_inside[:, None] & (in_dv[None, :] < DV)
    if AFFINE_ROW != NO_BIT:
        code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0).to(tl.int32)
        inside = inside & has_bit(code, AFFINE_ROW)[:, None]
    place = output + batch * o_b + head * o_h + rows[:, None].to(tl.int64) * o_n + in_dv[None, :]
    scale = tl.load(gain + batch * gain_b + head)
    # A gain of 0 replaces the output, whatever it was, and need not read it.
    read = rows < tl.where(scale == 0, 0, num_queries)
    plain = tl.load(place, mask=inside & read[:, None], other=0.0)
    edited = plain.to(tl.float32) * scale
    if HAS_OFFSET:
        edited += tl.load(offset + batch * offset_b + head * DV + in_dv, mask=in_dv < DV, other=0.0)[None, :]
    tl.store(place, edited.to(output.dtype.element_ty), mask=inside)


def head_affine_(output: Tensor, lowered: LoweredEdits, heads: Tensor | None = None) -> Tensor:
    """``z <- gain * z + offset`` in place on ``output`` ``(B, H, N, Dv)``, in the rows of the edits; returns it.

    ``heads`` (h,) int32 are the only ones read and written; None: all. Without HeadAffine among the edits nothing is done.
    Computes in float32. Raises ValueError if the last dimension is not contiguous; the other strides may be any.
    """
    gain, offset, rows = lowered.gain, lowered.offset, lowered.row_codes
    if gain is None:
        return output
    batch, num_heads, num_queries, value_dim = output.shape
    if output.stride(-1) != 1:
        raise ValueError("head outputs need a contiguous last dimension")
    used_heads = num_heads if heads is None else len(heads)
    if used_heads == 0 or output.numel() == 0:
        return output
    launch(
        _head_affine,
        (used_heads, ceil_div(num_queries, ROWS), batch),
        (
            output,
            *output.stride()[:3],
            heads,
            num_queries,
            rows,
            batch_stride(rows),
            gain,
            batch_stride(gain),
            offset,
            batch_stride(offset),
        ),
        {
            "HAS_HEADS": heads is not None,
            "HAS_OFFSET": offset is not None,
            "AFFINE_ROW": lowered.affine_row,
            "DV": value_dim,
            "BLOCK_DV": power_of_two(value_dim),
            "BLOCK_N": ROWS,
        },
        WARPS,
    )
    return output
