"""The heaviest entries of rows, by bisection, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels.sparse_attention import heaviest
from attn_kernels.sparse_attention.heaviest import heaviest_places, keep_heaviest_
from tests.kernels.triton_device import on_device


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """A few rows: of distinct numbers, of few distinct ones, and of zeros."""
    length, seed = draw(st.sampled_from([1, 2, 7, 33, 100])), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(2, 3, length, generator=generator) ** draw(st.sampled_from([1, 8]))
    numbers[0, 1] = (numbers[0, 1] * 4).round() / 4
    numbers[1, 2] = 0.0
    return numbers


@given(rows(), st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), st.floats(0, 1), st.sampled_from([16, 4096]))
@settings(max_examples=100, deadline=None)
def test_until_they_hold_a_share(mass: Tensor, threshold: float, share: float, block: int) -> None:
    forced = torch.rand(mass.shape, generator=torch.Generator().manual_seed(1)) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heaviest, "LARGEST_BLOCK", block)
        kept = keep_heaviest_(*on_device((forced.clone(), mass)), threshold).cpu()
    assert bool((kept | ~forced).all())
    for row, wanted_at_least, found in zip(mass.flatten(0, 1), forced.flatten(0, 1), kept.flatten(0, 1), strict=True):
        row = row.double()
        added = found & ~wanted_at_least
        others = row[~wanted_at_least & ~added]
        needed, slack = threshold * row.sum(), 1e-5 * float(row.sum())
        if bool(added.any()):
            # All are heavier than what is left out, and without the lightest there is not enough.
            assert row[added].min() > 0
            assert len(others) == 0 or row[added].min() >= others.max()
            assert row[found].sum() - row[added].min() < needed + slack
        assert row[found].sum() >= needed - slack


@given(rows(), st.sampled_from([1, 2, 5, 33, 120]), st.sampled_from([16, 4096]))
@settings(max_examples=100, deadline=None)
def test_so_many(numbers: Tensor, count: int, block: int) -> None:
    numbers[0, 0, ::3] = -1.0
    numbers[1, 0, 0] = torch.inf
    length = numbers.shape[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heaviest, "LARGEST_BLOCK", block)
        places = heaviest_places(on_device(numbers), count).cpu()
    for row, found in zip(numbers.flatten(0, 1), places.flatten(0, 1), strict=True):
        real = found[found < length]
        possible = int((row >= 0).sum())
        assert len(real) == min(count, possible)
        assert bool((found[len(real) :] == length).all())
        assert bool((real.diff() > 0).all())
        assert torch.equal(row[real].sort().values, row.sort().values[length - len(real) :])
