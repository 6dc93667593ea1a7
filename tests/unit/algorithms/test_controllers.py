# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from nemo_rba.algorithms.controllers import AdaptiveKL, KLAdaptiveLR, WarmupDecay


def test_adaptive_kl_by_hand():
    controller = AdaptiveKL(coefficient=0.1, target=1.0, horizon_steps=10)
    assert controller.update(1.1) == pytest.approx(0.1 * (1 + 0.1 / 10))
    controller = AdaptiveKL(coefficient=0.1, target=1.0, horizon_steps=10)
    assert controller.update(50.0) == pytest.approx(0.1 * 1.02)
    assert controller.update(0.0) == pytest.approx(0.1 * 1.02 * 0.98)


def test_kl_adaptive_lr_moves_inside_its_bounds():
    controller = KLAdaptiveLR(learning_rate=1e-5, target=0.01, factor=1.5, minimum=5e-6, maximum=2e-5)
    assert controller.update(0.01) == 1e-5
    assert controller.update(0.021) == pytest.approx(1e-5 / 1.5)
    assert controller.update(0.021) == 5e-6
    assert controller.update(0.004) == pytest.approx(7.5e-6)
    for _ in range(5):
        controller.update(0.0)
    assert controller.value == 2e-5


def test_warmup_decay_by_hand():
    linear = WarmupDecay(peak=1.0, floor=0.1, warmup_steps=2, total_steps=4, shape="linear")
    assert [linear.value] + [linear.update(0.0) for _ in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert linear.update(0.0) == pytest.approx(0.1)
    cosine = WarmupDecay(peak=1.0, floor=0.0, warmup_steps=0, total_steps=4, shape="cosine")
    values = [cosine.value] + [cosine.update(0.0) for _ in range(4)]
    assert values == pytest.approx([(1 + math.cos(math.pi * s / 4)) / 2 for s in range(5)])


def test_a_step_without_a_measured_kl_changes_neither_coefficient_nor_rate():
    coefficient = AdaptiveKL(coefficient=0.1, target=1.0, horizon_steps=10)
    rate = KLAdaptiveLR(learning_rate=1e-5, target=0.01, factor=1.5, minimum=1e-7, maximum=1e-3)
    assert (coefficient.update(None), rate.update(None)) == (0.1, 1e-5)
    assert rate.update(0.0) == pytest.approx(1.5e-5), "a measured 0 is a reason to go faster"
    linear = WarmupDecay(peak=1.0, floor=0.0, warmup_steps=0, total_steps=4, shape="linear")
    assert [linear.update(None), linear.update(None)] == [0.75, 0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveKL(coefficient=0.1, target=1.0, horizon_steps=10),
        lambda: KLAdaptiveLR(learning_rate=1e-5, target=0.01, factor=1.5, minimum=1e-7, maximum=1e-3),
        lambda: WarmupDecay(peak=1.0, floor=0.1, warmup_steps=2, total_steps=9, shape="cosine"),
    ],
)
def test_resumed_is_uninterrupted(make):
    whole, first, second = make(), make(), make()
    kls = [0.5, 0.001, 3.0, 0.02, 0.7]
    expected = [whole.update(kl) for kl in kls]
    for kl in kls[:3]:
        first.update(kl)
    second.load_state_dict(first.state_dict())
    assert [second.update(kl) for kl in kls[3:]] == expected[3:]
    assert second.value == whole.value


def test_bad_settings_and_diverged_kl():
    with pytest.raises(ValueError, match="never leaves 0"):
        AdaptiveKL(coefficient=0.0, target=1.0, horizon_steps=10)
    with pytest.raises(ValueError, match="learning_rate must be between"):
        KLAdaptiveLR(learning_rate=1.0, target=0.01, factor=1.5, minimum=1e-7, maximum=1e-3)
    with pytest.raises(ValueError, match="total_steps must be above"):
        WarmupDecay(peak=1.0, floor=0.1, warmup_steps=9, total_steps=9, shape="cosine")
    with pytest.raises(ValueError, match="nan"):
        AdaptiveKL(coefficient=0.1, target=1.0, horizon_steps=10).update(math.nan)
