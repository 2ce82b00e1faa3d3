"""Random numbers that are a function of seed, scene and purpose: the same on every device and in every batch.

Everything here is integer arithmetic on int32 (wrapping), so a CPU and a GPU agree to the last bit.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

# Multipliers of the "lowbias32" hash, as signed 32-bit numbers.
FIRST_MULTIPLIER = 0x7FEB352D
SECOND_MULTIPLIER = 0x846CA68B - 2**32
GOLDEN = 0x9E3779B9 - 2**32


def mixed(values: Tensor) -> Tensor:
    """A hash of int32 values, each on its own."""
    values = values ^ ((values >> 16) & 0xFFFF)
    values = values * FIRST_MULTIPLIER
    values = values ^ ((values >> 15) & 0x1FFFF)
    values = values * SECOND_MULTIPLIER
    return values ^ ((values >> 16) & 0xFFFF)


def scene_keys(seed: int, indices: Tensor) -> Tensor:
    """One int32 key a scene, from the seed and the scenes' numbers ``(batch,)`` int32."""
    start = mixed(torch.full_like(indices, seed) * GOLDEN + 1)
    return mixed(indices * GOLDEN ^ start)


class Draws:
    """Draws for a batch of scenes; every purpose has a name, and draws of one name never depend on another's."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def bits(self, name: str, count: int) -> Tensor:
        """Integers from 0 to 65535, ``(batch, count)`` int32."""
        salt = zlib.crc32(name.encode()) & 0x7FFFFFFF
        numbers = torch.arange(count, device=self.keys.device, dtype=torch.int32) * GOLDEN
        return (mixed(mixed(self.keys ^ salt)[:, None] + numbers) >> 8) & 0xFFFF

    def below(self, name: str, count: int, limit: int) -> Tensor:
        """Integers from 0 to ``limit - 1``, at most 32767."""
        return (self.bits(name, count) * limit) >> 16

    def chance(self, name: str, count: int, probability: float) -> Tensor:
        """True with this probability, ``(batch, count)``."""
        return self.bits(name, count) < round(probability * 65536)

    def order(self, name: str, count: int) -> Tensor:
        """A permutation of ``count`` a scene, ``(batch, count)`` int64."""
        return self.bits(name, count).argsort(dim=1, stable=True)

    def pick(self, name: str, allowed: Tensor) -> Tensor:
        """One of the allowed places a scene, evenly, ``(batch,)`` int64; 0 where none is allowed."""
        return torch.where(allowed, self.bits(name, allowed.shape[1]) + 1, 0).argmax(dim=1)

    def weighted(self, name: str, weights: tuple[float, ...]) -> Tensor:
        """One of ``len(weights)`` choices a scene, ``(batch,)`` int64."""
        total, running, bits = sum(weights), 0.0, self.bits(name, 1)
        choice = torch.zeros(len(self.keys), dtype=torch.int64, device=self.keys.device)
        for weight in weights[:-1]:
            running += weight
            choice += bits[:, 0] >= round(65536 * running / total)
        return choice
