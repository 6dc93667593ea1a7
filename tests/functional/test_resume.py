# SPDX-License-Identifier: Apache-2.0
"""An interrupted run is the uninterrupted run: weights, optimizer, schedule, sampling and data position."""

import pytest
import torch
from alignment_run import AT_VALIDATION, EVERY_TWO_STEPS, NUM_BATCHES, StopHere, build, fit, make_manifest

from nemo_rba.algorithms.controls import RunStopped
from nemo_rba.algorithms.watcher import StopOnCollapse


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("manifest") / "train")


@pytest.mark.parametrize("when", [EVERY_TWO_STEPS, AT_VALIDATION], ids=["every few steps", "at validation"])
def test_interrupted_run_equals_uninterrupted_one(when, llama_salm, manifest, tmp_path):
    whole = build(llama_salm[0], manifest, tmp_path)
    fit(whole, tmp_path / "whole", when)
    with pytest.raises(StopHere):
        fit(build(llama_salm[0], manifest, tmp_path, crash_at=4), tmp_path / "broken", when)
    resumed = build(llama_salm[0], manifest, tmp_path)
    fit(resumed, tmp_path / "broken", when)
    assert whole.num_batches == resumed.num_batches == NUM_BATCHES
    assert whole.controls.schedule.step == resumed.controls.schedule.step == 2 * NUM_BATCHES
    assert whole.controls.state_dict() == resumed.controls.state_dict()
    assert whole.objective.kl_coefficient == resumed.objective.kl_coefficient != 0.1
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moments = [m.policy.optimizer.state_dict() for m in (whole, resumed)]
    assert str(moments[0]) == str(moments[1])
    one, two = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "broken")]
    assert one == two, "the metrics of the two runs, step by step"
    assert '"step": 0' in one.splitlines()[0]
    assert "val/gap_closed" in one


def test_a_run_given_up_keeps_its_last_good_checkpoint(llama_salm, manifest, tmp_path):
    module = build(llama_salm[0], manifest, tmp_path)
    module.controls.watcher = StopOnCollapse(
        min_entropy=None, min_length=None, max_length=0.5, patience=4, dev_score="val/reward", validation_patience=None
    )
    with pytest.raises(RunStopped, match=r"rollout/length has been above 0\.5 for 4 steps: answers get too long"):
        fit(module, tmp_path, EVERY_TWO_STEPS)
    (last,) = (tmp_path / "run").rglob("*-last")
    kept = torch.load(last / "lightning.pt", weights_only=False)
    assert kept["rba"]["num_batches"] == 3, "the fourth batch was the one too many; it is in no checkpoint"
    assert kept["global_step"] == 6
