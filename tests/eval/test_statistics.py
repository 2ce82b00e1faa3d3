"""Paired statistics against values worked out by hand and against a plain simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from attn_eval.statistics import bootstrap_interval, bootstrap_p, compare_paired, mcnemar_exact


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (6, 1, 2 * 8 / 128), (10, 10, 1.0), (9, 1, 22 / 1024)],
)
def test_mcnemar_is_the_exact_sign_test(lost: int, won: int, p: float) -> None:
    assert mcnemar_exact(lost, won) == pytest.approx(p)


def test_mcnemar_does_not_overflow_with_many_flips() -> None:
    assert 0.0 <= mcnemar_exact(3000, 2500) < 1e-6
    with pytest.raises(ValueError, match="counts"):
        mcnemar_exact(-1, 2)


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    generator = random.Random(0)
    values = [generator.gauss(0.3, 1.0) for _ in range(200)]
    low, high = bootstrap_interval([values], seed=1)
    assert (low, high) == bootstrap_interval([values], seed=1)
    assert (low, high) != bootstrap_interval([values], seed=2)
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_bootstrap_of_strata_weighs_each_alike_and_resamples_within() -> None:
    low, high = bootstrap_interval([[1.0] * 3, [0.0] * 300], seed=0)
    assert low == high == pytest.approx(0.5)
    with pytest.raises(ValueError, match="every stratum"):
        bootstrap_interval([[1.0], []], seed=0)


def test_compare_paired_counts_flips_of_the_full_score_only() -> None:
    result = compare_paired([[1.0, 1.0, 0.5, 0.0]], [[1.0, 0.5, 1.0, 0.25]], seed=0)
    assert (result.right_to_wrong, result.wrong_to_right, result.samples) == (1, 1, 4)
    assert result.difference == pytest.approx(0.0625)
    assert result.interval and result.interval[0] <= result.difference <= result.interval[1]
    assert compare_paired([[1.0]], [[0.0]], seed=0).interval is None
    with pytest.raises(ValueError, match="same samples"):
        compare_paired([[1.0]], [[1.0, 0.0]], seed=0)


def test_the_bootstrap_s_p_is_twice_the_smaller_side() -> None:
    # 2 of 9 at or below 0, 8 at or above: 2 (2 + 1) / (9 + 1).
    assert bootstrap_p(np.array([-0.1, 0.0, *[0.2] * 7])) == pytest.approx(0.6)
    assert bootstrap_p(-np.array([-0.1, 0.0, *[0.2] * 7])) == pytest.approx(0.6)
    assert bootstrap_p(np.full(99, 0.2)) == pytest.approx(2 / 100)
    assert bootstrap_p(np.zeros(9)) == bootstrap_p(np.full(9, 0.1 + 0.2 - 0.3)) == 1.0
    assert bootstrap_p(np.array([0.1, np.nan])) is None
