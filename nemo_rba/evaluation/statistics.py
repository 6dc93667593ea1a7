# SPDX-License-Identifier: Apache-2.0
"""Intervals by the paired percentile bootstrap over items. Pure numpy.

A system's results are an array (I, 2): numerator and denominator of every item; its score is the ratio of the two sums
(``tasks.py``). One ``Bootstrap`` draws its resamples once and uses them for all systems: a resample with hard items is
hard for everyone, so differences and ratios between systems get the narrower intervals that pairing earns.
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; all three are nan where the estimate is not defined."""

    value: float
    low: float
    high: float
    undefined: float = 0.0  # share of resamples in which it was not defined, left out of the interval

    @property
    def is_defined(self) -> bool:
        return bool(np.isfinite(self.value))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resamples of I items, shared by every estimate that is made with it.

    Args:
        num_items: I.
        num_draws: resamples; 2000 are plenty for two digits.
        seed: of the resamples.
    """

    def __init__(self, *, num_items: int, num_draws: int, seed: int):
        if num_items < 1 or num_draws < 1:
            raise ValueError(
                f"a bootstrap needs items and draws, got num_items {num_items} and num_draws {num_draws}: is the "
                "held-out set empty, or report.num_draws 0?"
            )
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_draws)
        self._counts = np.vstack([np.ones(num_items), counts])  # (1 + D, I): row 0 is the sample itself

    def score(self, items: np.ndarray) -> Interval:
        """Ratio of sums of ``items`` (I, 2)."""
        return _interval(self._ratios(items))

    def difference(self, items: np.ndarray, other: np.ndarray) -> Interval:
        """Score of ``items`` minus score of ``other``, paired."""
        return _interval(self._ratios(items) - self._ratios(other))

    def gap_closed(self, start: np.ndarray, aligned: np.ndarray, ceiling: np.ndarray) -> Interval:
        """(S1 - S0) / (T - S0) in percent; undefined where the ceiling is not above the start."""
        start, aligned, ceiling = (self._ratios(items) for items in (start, aligned, ceiling))
        gap = ceiling - start
        closed = np.full_like(gap, np.nan)
        np.divide(100 * (aligned - start), gap, out=closed, where=gap > 0)
        return _interval(closed)

    def _ratios(self, items: np.ndarray) -> np.ndarray:
        """(I, 2) -> (1 + D,): the score of the sample, then of its resamples."""
        if items.shape != (self._counts.shape[1], 2):
            raise ValueError(f"items have shape {items.shape}, expected ({self._counts.shape[1]}, 2): paired systems")
        numerator, denominator = (self._counts @ items).T
        return numerator / denominator


def _interval(draws: np.ndarray) -> Interval:
    """Sample's value first, resamples behind it: (1 + D,) -> value and percentiles."""
    value, resamples = draws[0], draws[1:]
    defined = resamples[np.isfinite(resamples)]
    undefined = 1 - len(defined) / len(resamples)
    if not np.isfinite(value) or not len(defined):
        return Interval(value=np.nan, low=np.nan, high=np.nan, undefined=undefined)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=float(value), low=float(low), high=float(high), undefined=undefined)
