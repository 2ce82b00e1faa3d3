"""Paired statistics: two runs on the same questions, so that chance differences between questions cancel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
FULL_SCORE = 1.0 - 1e-9
# Shares that are the same but for the order of sums.
NO_DIFFERENCE = 1e-12


@dataclass(frozen=True)
class PairedResult:
    """How an edited run differs from its baseline on the same samples.

    Attributes:
        samples: number of pairs.
        baseline, edited: mean scores.
        difference: edited - baseline.
        interval: 95 % percentile bootstrap interval of the difference, resampling pairs (within each stratum). None
            where a stratum has a single pair: one sample says nothing about spread.
        right_to_wrong, wrong_to_right: samples that lost, or gained, the full score.
        mcnemar_p: exact two-sided p-value of McNemar's test on those flips; 1.0 without flips.
    """

    samples: int
    baseline: float
    edited: float
    difference: float
    interval: tuple[float, float] | None
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float


def mcnemar_exact(right_to_wrong: int, wrong_to_right: int) -> float:
    """The exact two-sided p-value of McNemar's test: are flips one way as likely as the other?

    Twice the smaller tail of a binomial distribution with p = 1/2 over the flips, at most 1 (McNemar 1947; the exact
    form is the sign test). 1.0 where nothing flipped.
    """
    if right_to_wrong < 0 or wrong_to_right < 0:
        raise ValueError("flips are counts, at least 0")
    flips = right_to_wrong + wrong_to_right
    smaller = min(right_to_wrong, wrong_to_right)
    tail = sum(math.comb(flips, count) for count in range(smaller + 1))
    return min(1.0, 2 * tail / 2**flips)


def bootstrap_interval(
    strata: Sequence[Sequence[float]], seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile bootstrap interval of the unweighted mean of the strata's means.

    One stratum is the plain case; several (one a task) resample each within itself, so that every task keeps its
    weight.

    Args:
        strata: values, e.g. paired differences; no stratum may be empty.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap samples.
        confidence: share of the resampled means inside the interval, 0 to 1.
    """
    if not strata or any(len(values) == 0 for values in strata):
        raise ValueError("bootstrap_interval needs at least one value in every stratum")
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in strata:
        array = np.asarray(values, dtype=np.float64)
        for first in range(0, resamples, 1000):
            count = min(1000, resamples - first)
            chosen = generator.integers(0, len(array), size=(count, len(array)))
            means[first : first + count] += array[chosen].mean(axis=1) / len(strata)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_sums(
    counts: np.ndarray, strata: Sequence[str], seed: int, resamples: int = RESAMPLES, chunk: int = 1000
) -> np.ndarray:
    """Column sums of bootstrap samples of rows, each drawn within its stratum: ``(resamples, columns)``, float64.

    Args:
        counts: ``(rows, columns)``.
        strata: the stratum of each row.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        chunk: how many are held at a time.
    """
    generator = np.random.default_rng(seed)
    sums = np.zeros((resamples, counts.shape[1]))
    names = np.asarray(strata)
    for stratum in dict.fromkeys(strata):
        rows = counts[names == stratum]
        for first in range(0, resamples, chunk):
            count = min(chunk, resamples - first)
            times = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
            sums[first : first + count] += times @ rows
    return sums


def bootstrap_p(differences: np.ndarray) -> float | None:
    """The two-sided p-value of no difference, from bootstrap samples of it: twice the smaller share of them that lies at or beyond
    0, with one more counted for the observed sample.

    Args:
        differences: ``(resamples,)``, of whatever unit was drawn.

    Returns:
        2 / (resamples + 1) to 1; None where the figure is undefined in a resample.
    """
    if np.isnan(differences).any():
        return None
    beyond = min(int((differences <= NO_DIFFERENCE).sum()), int((differences >= -NO_DIFFERENCE).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(differences) + 1))


def interval_of(strata: Sequence[Sequence[float]], seed: int) -> tuple[float, float] | None:
    """`bootstrap_interval`, or None where a stratum has fewer than two values."""
    return bootstrap_interval(strata, seed) if min(map(len, strata)) > 1 else None


def compare_paired(baseline: Sequence[Sequence[float]], edited: Sequence[Sequence[float]], seed: int) -> PairedResult:
    """Compare two runs on the same samples.

    Args:
        baseline, edited: scores 0.0 to 1.0, a sequence for each stratum (task); sample i of a stratum is the same
            question in both.
        seed: of the bootstrap.
    """
    if [len(scores) for scores in baseline] != [len(scores) for scores in edited]:
        raise ValueError("paired statistics need the same samples in both runs")
    pairs = [list(zip(first, second, strict=True)) for first, second in zip(baseline, edited, strict=True)]
    flat = [pair for stratum in pairs for pair in stratum]
    lost = sum(before >= FULL_SCORE > after for before, after in flat)
    gained = sum(after >= FULL_SCORE > before for before, after in flat)
    means = [_mean_of_means(scores) for scores in (baseline, edited)]
    return PairedResult(
        samples=len(flat),
        baseline=means[0],
        edited=means[1],
        difference=means[1] - means[0],
        interval=interval_of([[after - before for before, after in stratum] for stratum in pairs], seed),
        right_to_wrong=lost,
        wrong_to_right=gained,
        mcnemar_p=mcnemar_exact(lost, gained),
    )


def _mean_of_means(strata: Sequence[Sequence[float]]) -> float:
    return sum(sum(scores) / len(scores) for scores in strata) / len(strata)
