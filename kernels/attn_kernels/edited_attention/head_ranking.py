"""The gains of a Ranking: heads compared by their queries, in one launch of one program a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.launch import Compiled, launch, padded_size, power_of_two
from attn_kernels.primitives import Ranking

WARPS = 4


@triton.jit
def _ranked_gain(
    query,
    q_b,
    q_h,
    along,
    where,
    factor,
    gain,
    num_heads,
    group,
    kept,
    otherwise,
    HAS_WHERE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    heads, in_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = heads < num_heads
    both = inside[:, None] & (in_d[None, :] < D)
    of_head = query + batch * q_b + heads[:, None].to(tl.int64) * q_h + in_d[None, :]
    vector = tl.load(of_head, mask=both, other=0.0).to(tl.float32)
    kv_heads = num_heads // group
    of_kv_head = along + batch * kv_heads * D + (heads // group)[:, None] * D + in_d[None, :]
    direction = tl.load(of_kv_head, mask=both, other=0.0).to(tl.float32)
    score = tl.where(inside, tl.sum(vector * direction, 1), float("-inf"))
    above = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (heads[None, :] < heads[:, None]))
    rank = tl.sum((above & inside[None, :]).to(tl.int32), 1)
    ranked = tl.where(rank < kept, 1.0, otherwise)
    if HAS_WHERE:
        ranked = tl.where(tl.load(where + batch) != 0, ranked, 1.0)
    factors = tl.load(factor + batch * num_heads + heads, mask=inside, other=0.0)
    tl.store(gain + batch * num_heads + heads, ranked * factors, mask=inside)


class RankedGain:
    """Gains ``(B, H)`` float32 of queries ``(B, H, 1, D)`` under one ranking, times ``factor`` ``(B, H)`` float32 contiguous.

    Kept for the steps of a sequence, so that only the query is looked at in each.
    """

    def __init__(self, ranking: Ranking, factor: Tensor, width: int) -> None:
        self.factor, self.along = factor, ranking.along.contiguous()
        self.where = None if ranking.where is None else ranking.where.contiguous().view(torch.uint8)
        self.addresses = [None if part is None else part.data_ptr() for part in (self.along, self.where, factor)]
        self.compiled: Compiled | None = None
        batch, num_heads = factor.shape
        self.grid = (batch, 1, 1)
        self.sizes = (num_heads, num_heads // self.along.shape[1], ranking.kept, float(ranking.otherwise))
        self.constants = {
            "HAS_WHERE": self.where is not None,
            "D": width,
            "BLOCK_D": padded_size(width),
            "BLOCK_H": power_of_two(num_heads),
        }

    def __call__(self, query: Tensor, stream: int | None = None) -> Tensor:
        """``stream``: the current one, if the caller knows it."""
        gain = torch.empty_like(self.factor)
        strides, address = query.stride()[:2], query.data_ptr()
        is_aligned = (strides[0] | strides[1] | address) & 15 == 0
        if self.compiled is not None and is_aligned:
            kernel, constants = self.compiled
            rest = (gain.data_ptr(), *self.sizes, *constants)
            kernel[self.grid](address, *strides, *self.addresses, *rest, stream=stream)
            return gain
        arguments = (query, *strides, self.along, self.where, self.factor, gain, *self.sizes)
        compiled = launch(_ranked_gain, self.grid, arguments, self.constants, WARPS)
        if is_aligned:
            self.compiled = compiled
        return gain
