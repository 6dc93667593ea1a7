# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from nemo_rba.evaluation.statistics import Bootstrap


def items(values) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def flips(rate: float, num: int = 1000) -> np.ndarray:
    """``rate`` of the items right, the first ones: systems differ on items in between."""
    return items(100.0 * (np.arange(num) < rate * num))


def test_interval_of_a_proportion_is_the_normal_one():
    interval = Bootstrap(num_items=1000, num_draws=4000, seed=0).score(flips(0.3))
    half = 1.96 * 100 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.value == pytest.approx(30.0)
    assert interval.low == pytest.approx(30 - half, abs=0.25)
    assert interval.high == pytest.approx(30 + half, abs=0.25)


def test_known_values_for_two_items():
    interval = Bootstrap(num_items=2, num_draws=4000, seed=0).score(items([0, 100]))
    assert (interval.low, interval.value, interval.high) == (0, 50, 100)  # a quarter of the draws is 0, a quarter 100
    constant = Bootstrap(num_items=2, num_draws=10, seed=0).score(items([7, 7]))
    assert (constant.low, constant.value, constant.high) == (7, 7, 7)


def test_ratio_of_sums_weighs_long_items_more():
    wer = np.array([[100.0 * 1, 1], [0, 9]])  # one error in ten words
    assert Bootstrap(num_items=2, num_draws=10, seed=0).score(wer).value == 10.0


def test_pairing_narrows_a_difference():
    bootstrap = Bootstrap(num_items=1000, num_draws=4000, seed=1)
    nested = bootstrap.difference(flips(0.55), flips(0.5))  # the same items right, and 50 more
    half = 1.96 * 100 * np.sqrt(0.05 * 0.95 / 1000)
    assert nested.value == pytest.approx(5.0)
    assert nested.high - nested.low == pytest.approx(2 * half, rel=0.1)
    assert nested.excludes_zero
    assert not bootstrap.difference(flips(0.5), flips(0.5)).excludes_zero


def test_gap_closed_and_its_undefined_draws():
    bootstrap = Bootstrap(num_items=1000, num_draws=2000, seed=2)
    closed = bootstrap.gap_closed(flips(0.5), flips(0.7), flips(0.9))
    assert closed.value == pytest.approx(50.0)
    assert 40 < closed.low < 50 < closed.high < 60
    assert closed.undefined == 0
    narrow = bootstrap.gap_closed(flips(0.5), flips(0.7), flips(0.501))  # the gap is a single item
    assert narrow.value == pytest.approx(20000.0)
    assert narrow.undefined == pytest.approx(np.exp(-1), abs=0.04)  # it is not drawn
    none = bootstrap.gap_closed(flips(0.5), flips(0.7), flips(0.4))
    assert not none.is_defined
    assert np.isnan(none.low)


def test_the_seed_decides_and_shapes_are_checked():
    first, same, other = (Bootstrap(num_items=50, num_draws=99, seed=s).score(flips(0.3, 50)) for s in (0, 0, 1))
    assert first == same != other
    with pytest.raises(ValueError, match=r"\(10, 2\), expected \(50, 2\)"):
        Bootstrap(num_items=50, num_draws=9, seed=0).score(flips(0.5, 10))
    with pytest.raises(ValueError, match="num_items 0"):
        Bootstrap(num_items=0, num_draws=9, seed=0)
