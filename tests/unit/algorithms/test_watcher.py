# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest

from nemo_rba.algorithms.watcher import StopOnCollapse

SETTINGS = {
    "min_entropy": 0.1,
    "min_length": 3.0,
    "max_length": 50.0,
    "patience": 3,
    "dev_score": "val/obeys",
    "validation_patience": 2,
}


def watcher(**changes):
    return StopOnCollapse(**(SETTINGS | changes))


def step(entropy=1.0, length=10.0, reward=0.5):
    return {"entropy": entropy, "rollout/length": length, "reward/mean": reward}


def test_a_healthy_run_has_no_reason():
    watch = watcher()
    for i in range(20):
        assert watch.update(step(reward=0.01 * i)) is None
        assert watch.update({"val/obeys": 0.01 * i}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_anything_that_is_not_finite_is_a_reason_at_once(value):
    assert watcher().update(step() | {"grad_norm": value}) == f"grad_norm is {value}: the run has diverged"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"entropy": 0.05}, "entropy has been below 0.1 for 3 steps"),
        ({"length": 2.9}, "rollout/length has been below 3.0 for 3 steps"),
        ({"length": 51.0}, "rollout/length has been above 50.0 for 3 steps"),
    ],
)
def test_bounds_need_patience_and_start_again_after_a_good_step(bad, reason):
    watch = watcher()
    found = [watch.update(step(**kw)) for kw in (bad, bad, {}, bad, bad)]
    assert found == [None] * 5
    assert watch.update({"val/obeys": 0.5}) is None, "a validation has no entropy and no length: the count stays"
    assert watch.update(step(**bad)).startswith(reason)
    assert "for 4 steps" in watch.update(step(**bad)), "as long as it lasts"
    assert watch.update(step()) is None


def test_on_the_bound_is_inside():
    watch = watcher(patience=1)
    assert watch.update(step(entropy=0.1, length=3.0)) is None
    assert watch.update(step(entropy=0.1, length=50.0)) is None


def test_reward_up_and_dev_score_down_is_suspicious():
    watch = watcher()
    assert watch.update({"val/obeys": 0.9}) is None, "of the start model: nothing was trained before it"

    def validation(rewards, dev_score):
        found = [watch.update(step(reward=reward)) for reward in rewards]
        return [*found, watch.update({"val/obeys": dev_score})][-1]

    assert validation([0.1, 0.3], 0.6) is None  # mean 0.2
    assert validation([0.4, 0.2], 0.5) is None  # 0.3 up, down: once
    assert validation([0.3, 0.4], 0.55) is None  # 0.35 up, up: starts again
    assert validation([0.4, 0.4], 0.54) is None  # once
    reason = validation([0.4, 0.6], 0.50)  # 0.5 up, down: twice
    assert reason.startswith("reward/mean has risen and val/obeys fallen for 2 validations")
    assert validation([0.3], 0.4) is None  # both down: no longer hacking


def test_the_training_reward_is_that_since_the_last_validation():
    watch = watcher(validation_patience=1)
    for reward in (0.0, 0.0, 0.0, 0.9):
        watch.update(step(reward=reward))
    watch.update({"val/obeys": 0.5})  # mean 0.225
    watch.update(step(reward=0.2))
    assert watch.update({"val/obeys": 0.4}) is None, "0.2, though the mean since the beginning is no guide"
    watch.update(step(reward=0.21))
    assert watch.update({"val/obeys": 0.3}) is not None, "0.21 is more than 0.2"


def test_what_is_none_is_not_watched():
    watch = watcher(min_entropy=None, min_length=None, max_length=None, validation_patience=None, patience=1)
    for i in range(5):
        assert watch.update(step(entropy=0.0, length=0.0, reward=float(i)) | {"val/obeys": -float(i)}) is None


def test_resumed_is_uninterrupted():
    history = []
    for i in range(6):
        history += [step(entropy=0.05 if i > 3 else 1.0, reward=0.1 * i), {"val/obeys": 1 - 0.1 * i}]
    whole = watcher()
    expected = [whole.update(metrics) for metrics in history]
    assert any(expected)
    for cut in range(len(history)):
        first, second = watcher(), watcher()
        for metrics in history[:cut]:
            first.update(metrics)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.update(metrics) for metrics in history[cut:]] == expected[cut:]


@pytest.mark.parametrize(
    ("key", "value"), [("patience", 0), ("validation_patience", 0), ("min_length", 60.0)], ids=lambda value: str(value)
)
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"watcher\.{key}"):
        watcher(**{key: value})
