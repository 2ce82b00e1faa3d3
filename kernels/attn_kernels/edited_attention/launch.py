"""What the functions that launch kernels share: strides, sizes, the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def batch_stride(tensor: Tensor | None) -> int:
    """Stride over samples; 0 where one row serves all, or nothing is read."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def strides_of(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over samples and heads of ``(b, h, ...)``; 0 where one serves all, or nothing is read."""
    return batch_stride(tensor), 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)


def power_of_two(size: int) -> int:
    """The smallest that is not below ``size``. Triton's function of that purpose is slow on the host."""
    return 1 << (size - 1).bit_length()


def padded_size(size: int) -> int:
    """A head size as the matrix units take it."""
    return max(16, power_of_two(size))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter a few, so that work is split there as well."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may start before the one before it has ended, and wait for it on the device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
