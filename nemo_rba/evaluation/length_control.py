# SPDX-License-Identifier: Apache-2.0
"""Win rates that a longer answer cannot buy: AlpacaEval 2's generalised linear model (arXiv 2404.04475).

Judges prefer long answers. So a logistic regression explains each preference by the two answers' difference in length
and by the system, and the length-controlled win rate is what it predicts where the lengths are the same.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

STRENGTHS = np.logspace(-4, 4, 10)  # scikit-learn's, among which AlpacaEval lets cross validation choose
NUM_FOLDS = 5


class LengthControlledWinRate:
    """A ``statistics.ScoreOfItems``: items (I, 2) are preference for the answer, from 0 to 1, and its excess length.

    P(answer preferred) = sigmoid(theta + phi tanh(excess / its standard deviation)); the score is 100 sigmoid(theta).
    The fit is that of ``alpaca_eval`` 0.6.6, ``length_controlled_minimal``: no intercept besides theta, L1, liblinear,
    its strength chosen by 5-fold cross validation of the log loss.

    The paper's further term, the difficulty of an instruction, is left out as it is there: a number that AlpacaEval has
    estimated from all models of its leaderboard for each of its own 805 instructions, and that no other set has. So is
    the pull towards two gamed baselines, which are annotations of the same 805. Numbers of the leaderboard, which have
    both, are not comparable.

    Resamples keep the strength chosen on the whole sample. Fewer than 5 items have no score (nan).
    """

    def of_items(self, items: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Items (I, 2) and how often each resample has them, (D, I) -> scores in percent, (D,)."""
        if len(items) < NUM_FOLDS:
            return np.full(len(counts), np.nan)
        preferences, excess = items.T
        strength = _best_strength(_features(excess, np.ones(len(items))), preferences)
        found = [_fit(_features(excess, count), preferences, count, strength).coef_[0, 1] for count in counts]
        return 100 / (1 + np.exp(-np.array(found)))


def _features(excess: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(I,) -> (I, 2): squashed excess over its deviation in this resample, and 1 for the system itself."""
    variance = np.cov(excess, fweights=counts.astype(int))
    length = np.tanh(excess / np.sqrt(variance)) if variance > 0 else np.zeros(len(excess))
    return np.stack([length, np.ones(len(excess))], axis=1)


def _fit(features: np.ndarray, preferences: np.ndarray, counts: np.ndarray, strength: float) -> LogisticRegression:
    """Each item counts as won by the share of its preference, and as lost by the rest."""
    weights = np.concatenate([preferences * counts, (1 - preferences) * counts])
    some = weights > 0
    outcomes = np.repeat([1, 0], len(preferences))
    if len(set(outcomes[some])) < 2:  # all won, or all lost: liblinear asks for both
        some[:] = True
    model = LogisticRegression(C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123)
    return model.fit(np.tile(features, (2, 1))[some], outcomes[some], sample_weight=weights[some])


def _best_strength(features: np.ndarray, preferences: np.ndarray) -> float:
    folds = GroupKFold(NUM_FOLDS).split(features, groups=np.arange(len(features)))
    losses = np.zeros(len(STRENGTHS))
    for train, test in folds:
        for place, strength in enumerate(STRENGTHS):
            model = _fit(features[train], preferences[train], np.ones(len(train)), strength)
            chances = np.clip(model.predict_proba(features[test])[:, 1], 1e-15, 1 - 1e-15)
            wins, losing = preferences[test] * np.log(chances), (1 - preferences[test]) * np.log(1 - chances)
            losses[place] -= np.mean(wins + losing)
    return float(STRENGTHS[losses.argmin()])
