# SPDX-License-Identifier: Apache-2.0
"""The length-controlled win rate, beside numbers of AlpacaEval's own function."""

import numpy as np
import pytest

from nemo_rba.evaluation import length_control
from nemo_rba.evaluation.length_control import LengthControlledWinRate
from nemo_rba.evaluation.measures import LENGTH_CONTROLLED, corpus_score, set_score
from nemo_rba.evaluation.statistics import Bootstrap

# (items, seed, skill, verbosity, ties) -> win rate and length-controlled win rate, made by alpaca_eval 0.6.6 with
# scikit-learn 1.9.1: get_length_controlled_winrate(annotations, glm_name="length_controlled_minimal") of a data frame
# with preference = won + 1, output_1 = "a" * baseline's length and output_2 = "a" * the answer's; its data set
# (df_gamed.csv), which this formula does not use, was replaced by zeros.
THEIRS = {
    (60, 0, -0.5, 0.4, 0.0): (46.666666666666664, 31.687326516358798),
    (200, 1, 0.3, -0.2, 0.1): (53.0, 62.266882908670965),
    (40, 2, -2.0, 0.0, 0.0): (27.5, 34.45639852211504),
    (805, 3, -0.2, 0.6, 0.05): (62.98136645962733, 50.740107009266),
}


def made_up(num: int, seed: int, skill: float, verbosity: float, ties: float) -> np.ndarray:
    """Preferences that follow skill and length, and the answers' excess in characters: (I, 2)."""
    rng = np.random.default_rng(seed)
    base = rng.integers(20, 400, size=num)
    ours = np.maximum(1, base * rng.lognormal(verbosity, 0.5, size=num)).astype(int)
    chance = 1 / (1 + np.exp(-(skill + 1.5 * np.tanh((ours - base) / 150))))
    won = (rng.random(num) < chance).astype(float)
    if ties:
        won = np.where(rng.random(num) < ties, 0.5, won)
    return np.stack([won, ours - base], axis=1).astype(float)


@pytest.mark.parametrize("case", THEIRS)
def test_win_rates_are_those_of_alpaca_eval(case):
    items = made_up(*case)
    win_rate, controlled = THEIRS[case]
    assert 100 * items[:, 0].mean() == pytest.approx(win_rate)
    assert set_score(f"{LENGTH_CONTROLLED}|glm:x", items) == pytest.approx(controlled, abs=1e-6)


def test_a_resample_is_fitted_like_a_set_in_which_items_stand_twice():
    items = made_up(60, 0, -0.5, 0.4, 0.0)
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=2).astype(float)
    score = LengthControlledWinRate()
    found = score.of_items(items, np.vstack([np.ones(60), counts]))
    assert found[0] == score.of_items(items, np.ones((1, 60)))[0]
    strength = length_control._best_strength(length_control._features(items[:, 1], np.ones(60)), items[:, 0])
    for count, value in zip(counts, found[1:], strict=True):
        rows = np.repeat(items, count.astype(int), axis=0)
        length = np.tanh(rows[:, 1] / rows[:, 1].std(ddof=1))
        model = length_control._fit(np.stack([length, np.ones(60)], 1), rows[:, 0], np.ones(60), strength)
        assert value == pytest.approx(100 / (1 + np.exp(-model.coef_[0, 1])), abs=0.02), "as far as liblinear goes"


def test_a_bootstrap_has_intervals_but_no_p_value_of_it():
    first, second = made_up(50, 4, 1.0, 0.0, 0.0), made_up(50, 4, -1.0, 0.0, 0.0)
    bootstrap = Bootstrap(clusters=range(50), num_draws=40, seed=0, corpus_score=corpus_score(LENGTH_CONTROLLED))
    score = bootstrap.score(first)
    assert score.value == bootstrap.value(first) == set_score(LENGTH_CONTROLLED, first)
    assert score.low < score.value < score.high
    assert bootstrap.score(np.stack([first, second])).value == pytest.approx(
        (score.value + bootstrap.value(second)) / 2
    )
    difference = bootstrap.difference(first, second)
    assert difference.low > 0
    assert difference.p_value is None


def test_sets_without_lengths_or_losses_have_a_score_and_tiny_ones_have_none():
    score = LengthControlledWinRate()
    same = np.array([[1.0, 0.0]] * 120 + [[0.0, 0.0]] * 80)
    assert score.of_items(same, np.ones((1, 200)))[0] == pytest.approx(60, abs=1)
    assert score.of_items(np.array([[1.0, n] for n in range(40)]), np.ones((1, 40)))[0] > 95
    assert np.isnan(score.of_items(same[:4], np.ones((3, 4)))).tolist() == [True] * 3
