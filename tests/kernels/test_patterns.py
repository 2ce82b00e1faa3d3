"""The static patterns against their definitions, written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_kernels import PowerOfTwoBlocks, SinkAndWindow


@given(st.integers(0, 6), st.integers(1, 12))
def test_sink_and_window(sinks: int, window: int) -> None:
    position = torch.arange(20)
    visible = SinkAndWindow(sinks, window).visible(position[:, None], position[None])
    for i in range(20):
        for j in range(i + 1):
            assert bool(visible[i, j]) == (j < sinks or i - j < window)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
def test_power_of_two_blocks(block: int, window_blocks: int, sink_blocks: int) -> None:
    powers = {0, 1, 2, 4, 8, 16, 32}
    position = torch.arange(40)
    visible = PowerOfTwoBlocks(block, window_blocks, sink_blocks).visible(position[:, None], position[None])
    for i in range(40):
        for j in range(i + 1):
            distance = i // block - j // block
            expected = distance < window_blocks or distance in powers or j // block < sink_blocks
            assert bool(visible[i, j]) == expected


@pytest.mark.parametrize(("blocks", "layers"), [(64, 5), (256, 7)])
def test_power_of_two_blocks_reach_everything_in_few_layers(blocks: int, layers: int) -> None:
    """From the last row with window 4 and sink 1, as computed for the method's sheet; one layer less is not enough."""
    position = torch.arange(blocks)
    step = PowerOfTwoBlocks(1, 4, 1).visible(position[:, None], position[None]) & (position[None] <= position[:, None])
    reached = torch.zeros(blocks, dtype=torch.bool)
    reached[-1] = True
    needed = 0
    while not reached.all():
        reached = step[reached].any(0)
        needed += 1
    assert needed == layers
