"""A call's tokens counted from each sample's first real one, so that padding on the left moves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_kernels import AttentionInputs
from attn_kernels.patterns import first_real_key


def first_key_and_row(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``(B|1,)`` long each: the places of each sample's first real key, and of its first real query among the queries."""
    first_key = first_real_key(inputs)
    return first_key, (first_key - inputs.query_offset).clamp(min=0)


def from_place(tensor: Tensor, first: Tensor, inputs: AttentionInputs) -> Tensor:
    """``(B, h, N, D)`` from each sample's own place ``first`` ``(B|1,)`` on, filled up with 0."""
    if not inputs.padded:
        return tensor
    place = torch.arange(tensor.shape[2], device=tensor.device) + first[:, None]
    inside = (place < tensor.shape[2])[:, None, :, None]
    place = place.clamp(max=tensor.shape[2] - 1)[:, None, :, None].expand(*tensor.shape[:2], -1, tensor.shape[3])
    return tensor.gather(2, place).masked_fill(~inside, 0)
