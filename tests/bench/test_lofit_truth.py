"""The table of the comparison, counted by hand."""

from __future__ import annotations

import pytest

from bench.lofit_truth import rows_of, table_of


def test_rows_are_means_over_seeds_and_paired_differences() -> None:
    done = {
        "0/base": {"scores": [0.0, 0.0, 1.0, 0.0], "trained_numbers": 0},
        "1/base": {"scores": [0.0, 1.0, 0.0, 1.0], "trained_numbers": 0},
        "0/lofit": {"scores": [1.0, 0.0, 1.0, 1.0], "trained_numbers": 128},
        "1/lofit": {"scores": [0.0, 1.0, 1.0, 1.0], "trained_numbers": 128},
        "0/lora 1": {"scores": [1.0, 1.0, 1.0, 1.0], "trained_numbers": 10240},
    }
    base, lofit = rows_of(done, [0, 1])
    assert base["accuracy"] == pytest.approx((0.25 + 0.5) / 2)
    assert lofit["by_seed"] == [0.75, 0.75]
    assert lofit["difference"] == pytest.approx(0.375)
    low, high = lofit["interval"]
    assert 0.0 <= low < 0.375 < high <= 1.0
    assert "| lofit | 128 | 75.0 | 75.0, 75.0 | +37.5 |" in table_of([base, lofit])
