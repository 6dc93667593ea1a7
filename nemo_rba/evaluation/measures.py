# SPDX-License-Identifier: Apache-2.0
"""From what items add up to, to a score: a measure is known by its name.

An item adds a few numbers to each measure of its task, and the score of a set is a function of their sums. Most
measures are a ratio of two sums (accuracy, error rates), BLEU and chrF are functions of many. So a file of predictions
holds all that scores, intervals and tests need. The length-controlled win rate is no function of sums: it is fitted to
the items.

A name is "<what>" or "<what>|<how>", e.g. "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0": how it was
computed, for BLEU, chrF and TER sacrebleu's signature, for a judge its model, prompt and votes. All scores are in
percent, but for a judge's mean grade, which is on the judge's scale.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from nemo_rba.evaluation.length_control import LengthControlledWinRate
from nemo_rba.evaluation.statistics import CorpusScore, ScoreOfItems, ratio_of_sums

Statistics = Mapping[str, Sequence[float]]  # name of a measure -> what one item adds to its sums
LENGTH_CONTROLLED = "length-controlled win rate"
MEAN_OF = "mean of "  # and what: ratios, whose numerators and denominators follow each other


def short_name(measure: str) -> str:
    """ "BLEU|nrefs:1|..." -> "BLEU"."""
    return measure.split("|")[0]


def corpus_score(measure: str) -> CorpusScore | ScoreOfItems:
    """What makes a score of the sums of a measure's statistics: mostly 100 x numerator and denominator."""
    what = short_name(measure)
    if what == LENGTH_CONTROLLED:
        return LengthControlledWinRate()
    if what.startswith(MEAN_OF):
        return _mean_of_ratios
    if what == "BLEU":
        return _bleu
    if what.startswith("chrF"):
        metric = CHRF(word_order=what.count("+"))
        return lambda sums: np.array([metric._compute_score_from_stats(list(row)).score for row in sums])
    return ratio_of_sums


def set_score(measure: str, items: np.ndarray) -> float:
    """Score of a whole set, from what its items add to a measure, (I, S)."""
    score = corpus_score(measure)
    if isinstance(score, ScoreOfItems):
        return float(score.of_items(items, np.ones((1, len(items))))[0])
    return float(score(items.sum(0)[None])[0])


def item_share(statistics: Statistics) -> tuple[float, float]:
    """What the first measure says of one answer by itself: its numerator and denominator, or its own score and 1.

    BLEU is then of the orders that a short answer has, as in ``sacrebleu.sentence_bleu``.
    """
    measure, numbers = next(iter(statistics.items()))
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    sums = np.array([numbers], dtype=float)
    is_bleu = short_name(measure) == "BLEU"
    scores = _bleu(sums, effective_order=True) if is_bleu else corpus_score(measure)(sums)
    return float(scores[0]), 1.0


def _mean_of_ratios(sums: np.ndarray) -> np.ndarray:
    """(D, 2 R) -> (D,)."""
    return np.mean([ratio_of_sums(sums[:, at : at + 2]) for at in range(0, sums.shape[1], 2)], axis=0)


def _bleu(sums: np.ndarray, *, effective_order: bool = False) -> np.ndarray:
    """(D, 10): lengths of answers and references, n-grams that match and all n-grams, n = 1..4 -> (D,)."""
    scores = [
        BLEU.compute_bleu(
            correct=list(row[2:6]),
            total=list(row[6:10]),
            sys_len=int(row[0]),
            ref_len=int(row[1]),
            smooth_method="exp",
            effective_order=effective_order,
        ).score
        for row in sums
    ]
    return np.array(scores)
