# SPDX-License-Identifier: Apache-2.0
from itertools import product

import numpy as np
import pytest
from scipy.stats import permutation_test

from nemo_rba.evaluation.statistics import Bootstrap, randomisation_test, ratio_of_sums


def items(values) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def flips(rate: float, num: int = 1000) -> np.ndarray:
    """``rate`` of the items right, the first ones: systems differ on items in between."""
    return items(100.0 * (np.arange(num) < rate * num))


def test_interval_of_a_proportion_is_the_normal_one():
    interval = Bootstrap(clusters=range(1000), num_draws=4000, seed=0).score(flips(0.3))
    half = 1.96 * 100 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.value == pytest.approx(30.0)
    assert interval.low == pytest.approx(30 - half, abs=0.25)
    assert interval.high == pytest.approx(30 + half, abs=0.25)


def test_known_values_for_two_items():
    interval = Bootstrap(clusters=range(2), num_draws=4000, seed=0).score(items([0, 100]))
    assert (interval.low, interval.value, interval.high) == (0, 50, 100)  # a quarter of the draws is 0, a quarter 100
    constant = Bootstrap(clusters=range(2), num_draws=10, seed=0).score(items([7, 7]))
    assert (constant.low, constant.value, constant.high) == (7, 7, 7)


def test_ratio_of_sums_weighs_long_items_more():
    wer = np.array([[100.0 * 1, 1], [0, 9]])  # one error in ten words
    assert Bootstrap(clusters=range(2), num_draws=10, seed=0).score(wer).value == 10.0


def test_pairing_narrows_a_difference():
    bootstrap = Bootstrap(clusters=range(1000), num_draws=4000, seed=1)
    nested = bootstrap.difference(flips(0.55), flips(0.5))  # the same items right, and 50 more
    half = 1.96 * 100 * np.sqrt(0.05 * 0.95 / 1000)
    assert nested.value == pytest.approx(5.0)
    assert nested.high - nested.low == pytest.approx(2 * half, rel=0.1)
    assert nested.excludes_zero
    assert not bootstrap.difference(flips(0.5), flips(0.5)).excludes_zero


def test_gap_closed_and_its_undefined_draws():
    bootstrap = Bootstrap(clusters=range(1000), num_draws=2000, seed=2)
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
    first, same, other = (Bootstrap(clusters=range(50), num_draws=99, seed=s).score(flips(0.3, 50)) for s in (0, 0, 1))
    assert first == same != other
    with pytest.raises(ValueError, match=r"\(10, 2\), expected \(50, 2\)"):
        Bootstrap(clusters=range(50), num_draws=9, seed=0).score(flips(0.5, 10))
    with pytest.raises(ValueError, match="got 0 items"):
        Bootstrap(clusters=range(0), num_draws=9, seed=0)


def test_p_value_is_the_share_of_exchanges_with_no_smaller_difference():
    rng = np.random.default_rng(0)
    ours, theirs = (np.stack([rng.normal(size=8), rng.integers(1, 4, size=8)], axis=1) for _ in range(2))
    observed = abs(float(ratio_of_sums(ours.sum(0)[None])[0] - ratio_of_sums(theirs.sum(0)[None])[0]))
    sizes = []
    for exchange in product([False, True], repeat=8):
        swap = np.array(exchange)[:, None]
        a, b = np.where(swap, theirs, ours).sum(0), np.where(swap, ours, theirs).sum(0)
        sizes.append(abs(a[0] / a[1] - b[0] / b[1]))
    exact = np.mean(np.array(sizes) >= observed - 1e-9)
    found = randomisation_test(ours, theirs, num_draws=20000, seed=1)
    assert found == pytest.approx(exact, abs=0.01)
    assert found == randomisation_test(theirs, ours, num_draws=20000, seed=1)


def test_p_value_of_right_and_wrong_is_scipys_and_counts_ties():
    ours, theirs = (
        items([100] * 5 + [0] * 20 + [100] * 10),
        items([0] * 25 + [100] * 10),
    )  # five items differ, all alike
    exact = permutation_test(
        (ours[:, 0], theirs[:, 0]), lambda a, b: a.mean() - b.mean(), permutation_type="samples", n_resamples=20000,
        rng=0,
    ).pvalue  # fmt: skip
    interval = Bootstrap(clusters=range(35), num_draws=20000, seed=2).difference(ours, theirs)
    assert interval.p_value == pytest.approx(2 / 2**5, abs=0.006)
    assert interval.p_value == pytest.approx(exact, abs=0.01)
    assert Bootstrap(clusters=range(35), num_draws=50, seed=2).score(ours).p_value is None


def test_p_value_is_one_without_a_difference_and_never_zero():
    bootstrap = Bootstrap(clusters=range(1000), num_draws=99, seed=0)
    assert bootstrap.difference(flips(0.4), flips(0.4)).p_value == 1.0
    assert bootstrap.difference(flips(0.9), flips(0.1)).p_value == 0.01


def test_p_values_of_equal_systems_are_evenly_spread():
    rng = np.random.default_rng(4)
    found = [
        randomisation_test(items(rng.random(30) < 0.5), items(rng.random(30) < 0.5), num_draws=200, seed=trial)
        for trial in range(300)
    ]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) <= level + 2.5 * np.sqrt(level * (1 - level) / 300)


def test_clusters_are_drawn_and_exchanged_whole():
    rng = np.random.default_rng(6)
    ours, theirs = (items(100.0 * (rng.random(50) < p)) for p in (0.6, 0.5))
    single = Bootstrap(clusters=range(50), num_draws=500, seed=0)
    clusters = np.tile(np.arange(50), 6)
    whole, apart = (Bootstrap(clusters=c, num_draws=500, seed=0) for c in (clusters, range(300)))
    six = [np.tile(array, (6, 1)) for array in (ours, theirs)]  # the same six times: nothing more is known
    for found, expected in ((whole.difference(*six), single.difference(ours, theirs)),
                            (whole.score(six[0]), single.score(ours))):  # fmt: skip
        assert (found.value, found.p_value) == (pytest.approx(expected.value), expected.p_value)
        assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    narrow = apart.score(six[0])
    assert narrow.high - narrow.low < 0.6 * (single.score(ours).high - single.score(ours).low)


def test_unequal_clusters_weigh_as_many_items_as_they_have():
    found = Bootstrap(clusters=[0, 0, 0, 1], num_draws=4000, seed=0).score(items([0, 0, 0, 100]))
    assert (found.low, found.value, found.high) == (0, 25, 100)


def test_seeds_are_averaged_after_they_are_scored():
    first, second = items([0, 100]), np.array([[100.0, 1], [100, 3]])
    seeds = np.stack([first, second])  # 50 and 50
    bootstrap = Bootstrap(clusters=range(2), num_draws=500, seed=0)
    assert bootstrap.score(seeds).value == 50.0
    assert bootstrap.value(second) == 50.0
    assert bootstrap.difference(seeds, second).value == 0.0
    squares = Bootstrap(clusters=range(2), num_draws=500, seed=0, corpus_score=lambda sums: sums[:, 0] ** 2)
    assert squares.score(seeds).value == (100.0**2 + 200.0**2) / 2


def test_unequal_numbers_of_seeds_are_compared_by_their_means():
    rng = np.random.default_rng(5)
    three, two = (np.stack([items(rng.random(40) < p) for _ in range(k)]) for k, p in ((3, 0.6), (2, 0.35)))
    observed = three[..., 0].mean() - two[..., 0].mean()
    found = Bootstrap(clusters=range(40), num_draws=4000, seed=0).difference(three, two)
    assert found.value == pytest.approx(observed)
    means = [seeds[..., 0].mean(0) for seeds in (three, two)]
    signs = rng.choice([-1, 1], size=(20000, 40))
    sizes = np.abs((signs * (means[0] - means[1])).mean(1))
    assert found.p_value == pytest.approx(np.mean(sizes >= abs(observed) - 1e-9), abs=0.02)


def test_nothing_to_divide_by_is_undefined():
    bootstrap = Bootstrap(clusters=range(2), num_draws=10, seed=0)
    nothing = np.array([[100.0, 0], [0, 0]])
    assert not bootstrap.score(nothing).is_defined
    assert bootstrap.difference(nothing, items([0, 0])).p_value is None
