# SPDX-License-Identifier: Apache-2.0
"""Checkpoints travel: a run broken off under TP2 goes on under TP2, PP2 or alone, and ends where it would have ended.

Tolerance 5e-5 on weights of size 1 that moved by up to 4e-2 in 14 AdamW steps (1.0e-5 was seen). A step divides a
gradient by its own size plus epsilon; alignment_run sets 1e-5, so that a gradient that is nearly 0 does not turn the
rounding of another layout into a step.
"""

import pytest
import torch
import travel
from alignment_run import EVERY_TWO_STEPS, NUM_BATCHES, build, fit, make_manifest
from forked import run_ranks

from nemo_rba.checkpoint.whole import gather_state
from nemo_rba.models.rba_speech_lm import RBASpeechLM

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("travel-manifest") / "train")


@pytest.fixture(scope="module")
def folder(llama_salm, manifest, tmp_path_factory):
    """What ``travel.py`` left."""
    folder = tmp_path_factory.mktemp("travel")
    run_ranks(travel.main, llama_salm[0], manifest, folder, num_ranks=2, folder=folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(llama_salm, manifest, tmp_path_factory):
    """(final weights, metrics) of one process that was never broken off."""
    folder = tmp_path_factory.mktemp("whole")
    module = build(llama_salm[0], manifest, folder)
    fit(module, folder, EVERY_TWO_STEPS)
    return gather_state(module.model), (folder / "metrics.jsonl").read_text()


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["to_tp2", "to_pp2"])
def test_a_run_goes_on_under_another_layout(folder, uninterrupted, name):
    model = RBASpeechLM.restore_from(folder / name / "final.nemo")
    assert_same(gather_state(model), uninterrupted[0])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(uninterrupted[1].splitlines())


def test_a_run_goes_on_alone(folder, uninterrupted, llama_salm, manifest):
    module = build(llama_salm[0], manifest, folder / "one")
    trainer = fit(module, folder / "one", EVERY_TWO_STEPS)
    assert module.num_batches == NUM_BATCHES
    assert trainer.global_step == module.controls.schedule.step == 2 * NUM_BATCHES
    assert_same(gather_state(module.model), uninterrupted[0])


def test_a_nemo_is_the_same_at_every_layout(folder):
    expected = gather_state(RBASpeechLM.restore_from(folder / "to_pp2" / "final.nemo"))
    for layout in ("tp2", "pp2"):
        restored = torch.load(folder / f"restored_{layout}.pt", weights_only=True)
        assert restored.keys() == expected.keys()
        assert all(torch.equal(restored[name], value) for name, value in expected.items())


def test_a_half_written_checkpoint_is_not_chosen(uninterrupted, llama_salm, manifest, tmp_path, monkeypatch):
    """A crash while a checkpoint is written leaves the one before it as the last."""
    from nemo_rba.checkpoint import sharded

    written = []

    def fail_at_second(*args, **kwargs):
        written.append(args)
        original(*args, **kwargs)
        if len(written) == 3:  # of the second step's two: the best, and the last
            raise OSError("No space left on device")

    original = sharded.dist_checkpointing.save
    monkeypatch.setattr(sharded.dist_checkpointing, "save", fail_at_second)
    with pytest.raises(OSError, match="No space"):
        fit(build(llama_salm[0], manifest, tmp_path), tmp_path, EVERY_TWO_STEPS)
    monkeypatch.undo()
    assert list((tmp_path / "run").rglob("*.distcp"))
    resumed = build(llama_salm[0], manifest, tmp_path)
    fit(resumed, tmp_path, EVERY_TWO_STEPS)
    assert resumed.num_batches == NUM_BATCHES
    assert_same(gather_state(resumed.model), uninterrupted[0])
    assert not list(tmp_path.rglob("unfinished/*"))
