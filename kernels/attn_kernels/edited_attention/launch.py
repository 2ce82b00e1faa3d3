"""What the functions that launch kernels share: the launch itself, strides, sizes, the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Argument: TypeAlias = Tensor | int | float | None

Compiled: TypeAlias = tuple[Any, tuple[object, ...]]
"""A compiled kernel and its constants, which it takes last."""
_compiled: dict[tuple[object, ...], Compiled] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    constants: dict[str, Any],
    warps: int,
    starts_early: bool = False,
) -> Compiled | None:
    """Launches a Triton kernel whose constants come last, on the device of its first argument.

    Triton looks at all arguments in every launch, which takes the host longer than the device computes. A launch like an
    earlier one, in all that Triton compiles for, goes to the compiled kernel. ``starts_early``: the kernel waits on the
    device for the launch before, so that it may be started while that one runs. Returns what later launches alike may call
    themselves, on a stream and with addresses for tensors; None where they may not.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    if not first.is_cuda:
        kernel[grid](*arguments, **constants, num_warps=warps)
        return None
    device = first.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, warps, starts_early)
    alike = (id(kernel), device, warps, starts_early, *constants.values(), *kinds(arguments))
    known = _compiled.get(alike)
    if known is not None:
        compiled, values = known
        compiled[grid](*arguments, *values)
        return known
    options = {"launch_pdl": True} if starts_early else {}
    compiled = kernel[grid](*arguments, **constants, num_warps=warps, **options)
    # Triton's interpreter returns nothing; on AMD it looks at more.
    if compiled is not None and torch.version.hip is None:
        _compiled[alike] = compiled, tuple(constants[name] for name in constant_names(kernel))
    return _compiled.get(alike)


def kinds(arguments: Sequence[Argument]) -> list[object]:
    """What Triton compiles each argument for: type, alignment to 16, and whether a number is 1."""
    found: list[object] = []
    for argument in arguments:
        kind = argument.__class__
        if argument is None or kind is float:
            found.append(kind)
        elif isinstance(argument, int):
            found.append(1 if argument == 1 else (argument & 15 == 0) + 2 * (-(2**31) <= argument < 2**31) + 2)
        else:
            assert isinstance(argument, Tensor)
            found.append((argument.dtype, kind) if argument.data_ptr() & 15 else argument.dtype)
    return found


@functools.cache
def constant_names(kernel: Any) -> tuple[str, ...]:
    """In the kernel's order, as a compiled kernel takes them."""
    return tuple(name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind))


def ceil_div(size: int, part: int) -> int:
    """How many parts. Triton's function of that purpose is slow on the host, as is its ``next_power_of_2``."""
    return -(-size // part)


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def batch_stride(tensor: Tensor | None) -> int:
    """Stride over samples; 0 where one row serves all, or nothing is read."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def strides_of(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over samples and heads of ``(b, h, ...)``; 0 where one serves all, or nothing is read."""
    return batch_stride(tensor), 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)


def power_of_two(size: int) -> int:
    """The smallest that is not below ``size``."""
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
