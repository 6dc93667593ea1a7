# SPDX-License-Identifier: Apache-2.0
"""Intervals by the paired percentile bootstrap over items, and a paired test of differences. Pure numpy.

A system's results are an array (I, S): what every item adds to S sums; its score is a function of the sums, mostly the
ratio of two of them (``tasks.py``, ``measures.py``). Results of K training seeds are (K, I, S), and their score is the
mean of the seeds' scores. One ``Bootstrap`` draws its resamples once and uses them for all systems: a resample with
hard items is hard for everyone, so differences and ratios between systems get the narrower intervals that pairing
earns. Items that are one, but for who speaks, are drawn together: they say less than as many of their own (the
bootstrap of clusters, Davison and Hinkley 1997, 3.8).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

LEVEL = 0.95

CorpusScore = Callable[[np.ndarray], np.ndarray]  # sums (D, S) of D resamples -> their scores (D,)


@runtime_checkable
class ScoreOfItems(Protocol):
    """In the place of a ``CorpusScore``, a score that is no function of sums: every resample is looked at anew."""

    def of_items(self, items: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Items (I, S) and how often each of D resamples has them, (D, I) -> the resamples' scores (D,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval; all three are nan where the estimate is not defined."""

    value: float
    low: float
    high: float
    undefined: float = 0.0  # share of resamples in which it was not defined, left out of the interval
    p_value: float | None = None  # of a difference only: two-sided, see ``Bootstrap.difference``

    @property
    def is_defined(self) -> bool:
        return bool(np.isfinite(self.value))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Numerators and denominators (D, 2) -> (D,); nan where there is nothing to divide by."""
    ratios = np.full(len(sums), np.nan)
    return np.divide(sums[:, 0], sums[:, 1], out=ratios, where=sums[:, 1] != 0)


class Bootstrap:
    """Resamples of I items, shared by every estimate that is made with it.

    Args:
        clusters: for each of the I items the number of its cluster, from 0 on; a resample has a whole cluster or
            nothing of it. ``range(I)`` draws every item for itself.
        num_draws: resamples; 2000 are plenty for two digits.
        seed: of the resamples.
        corpus_score: makes a score of summed results, or of items.
    """

    def __init__(
        self,
        *,
        clusters: Sequence[int],
        num_draws: int,
        seed: int,
        corpus_score: CorpusScore | ScoreOfItems = ratio_of_sums,
    ):
        self._clusters = np.asarray(clusters, dtype=int)
        if not len(self._clusters) or num_draws < 1:
            raise ValueError(
                f"a bootstrap needs items and draws, got {len(self._clusters)} items and num_draws {num_draws}: is the "
                "held-out set empty, or report.num_draws 0?"
            )
        size = self._clusters.max() + 1
        counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=num_draws)
        self._counts = np.vstack([np.ones(size), counts])[:, self._clusters]  # (1 + D, I): row 0 is the sample itself
        self._corpus_score = corpus_score
        self._seed = seed
        self._known: dict[bytes, np.ndarray] = {}  # of a score of items, which takes its time

    def value(self, items: np.ndarray) -> float:
        """Score of ``items`` (I, S) as they are, without an interval."""
        if isinstance(self._corpus_score, ScoreOfItems):
            return float(self._corpus_score.of_items(items, self._counts[:1])[0])
        return float(self._corpus_score(items.sum(0, keepdims=True))[0])

    def score(self, items: np.ndarray) -> Interval:
        """Score of ``items`` (I, S), or of several seeds' (K, I, S)."""
        return _interval(self._scores(items))

    def difference(self, items: np.ndarray, other: np.ndarray) -> Interval:
        """Score of ``items`` minus score of ``other``, paired, with its ``p_value``, see ``randomisation_test``.

        A score of items has no p-value: each exchange is a set of its own, whose score has nothing to start from.
        """
        interval = _interval(self._scores(items) - self._scores(other))
        if not interval.is_defined or isinstance(self._corpus_score, ScoreOfItems):
            return interval
        p_value = randomisation_test(
            items,
            other,
            clusters=self._clusters,
            num_draws=len(self._counts) - 1,
            seed=self._seed,
            corpus_score=self._corpus_score,
        )
        return replace(interval, p_value=p_value)

    def gap_closed(self, start: np.ndarray, aligned: np.ndarray, ceiling: np.ndarray) -> Interval:
        """(S1 - S0) / (T - S0) in percent; undefined where the ceiling is not above the start."""
        start, aligned, ceiling = (self._scores(items) for items in (start, aligned, ceiling))
        gap = ceiling - start
        closed = np.full_like(gap, np.nan)
        np.divide(100 * (aligned - start), gap, out=closed, where=gap > 0)
        return _interval(closed)

    def _scores(self, items: np.ndarray) -> np.ndarray:
        """-> (1 + D,): the score of the sample, then of its resamples."""
        num_items = self._counts.shape[1]
        if items.shape[-2] != num_items:
            raise ValueError(
                f"items have shape {items.shape}, expected ({num_items}, {items.shape[-1]}), or that of several "
                "seeds: paired systems"
            )
        return np.mean([self._scores_of_seed(seed) for seed in _seeds(items)], axis=0)

    def _scores_of_seed(self, items: np.ndarray) -> np.ndarray:
        """(I, S) -> (1 + D,)."""
        if not isinstance(self._corpus_score, ScoreOfItems):
            return self._corpus_score(self._counts @ items)
        key = items.tobytes()
        if key not in self._known:
            self._known[key] = self._corpus_score.of_items(items, self._counts)
        return self._known[key]


def randomisation_test(
    items: np.ndarray,
    other: np.ndarray,
    *,
    num_draws: int,
    seed: int,
    clusters: np.ndarray | None = None,
    corpus_score: CorpusScore = ratio_of_sums,
) -> float:
    """Two-sided p-value of two systems' scores being different, by paired approximate randomisation.

    If the systems are no different, each item's two results could as well be exchanged. The p-value is the share of
    random exchanges whose difference in score is no smaller than the one observed, which is counted among them, so that
    it is never 0 (Noreen 1989; Riezler and Maxwell 2005, ACL W05-0908; arXiv 1603.05766). Unlike a p-value read off a
    bootstrap it needs no large sample. sacrebleu's paired test counts larger differences only: the same, unless
    differences repeat themselves, as those of right and wrong do.

    Args:
        items, other: (I, S), or (K, I, S) of K seeds; unequal numbers of seeds are repeated until they are equal.
        num_draws: random exchanges.
        seed: of the exchanges.
        clusters: (I,) as for ``Bootstrap``: a cluster's items are exchanged together; None exchanges every item alone.
        corpus_score: makes a score of summed results.
    """
    items, other = _seeds(items), _seeds(other)
    num_seeds = math.lcm(len(items), len(other))
    items, other = (np.tile(seeds, (num_seeds // len(seeds), 1, 1)) for seeds in (items, other))
    clusters = np.arange(items.shape[1]) if clusters is None else clusters
    exchanged = np.random.default_rng(seed).integers(2, size=(num_draws, clusters.max() + 1), dtype=bool)[:, clusters]
    exchanged = np.vstack([np.zeros_like(exchanged[:1]), exchanged]).astype(float)  # (1 + D, I): row 0 exchanges none
    differences = np.zeros(len(exchanged))
    for ours, theirs in zip(items, other, strict=True):
        moved = exchanged @ (theirs - ours)  # (1 + D, S)
        differences += corpus_score(ours.sum(0) + moved) - corpus_score(theirs.sum(0) - moved)
    sizes = np.abs(differences / num_seeds)
    tolerance = 1e-9 * max(1.0, sizes[0])  # of rounding
    return float(np.mean(~(sizes < sizes[0] - tolerance)))  # an undefined difference counts as a large one


def _seeds(items: np.ndarray) -> np.ndarray:
    return items[None] if items.ndim == 2 else items


def _interval(draws: np.ndarray) -> Interval:
    """Sample's value first, resamples behind it: (1 + D,) -> value and percentiles."""
    value, resamples = draws[0], draws[1:]
    defined = resamples[np.isfinite(resamples)]
    undefined = 1 - len(defined) / len(resamples)
    if not np.isfinite(value) or not len(defined):
        return Interval(value=np.nan, low=np.nan, high=np.nan, undefined=undefined)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=float(value), low=float(low), high=float(high), undefined=undefined)
