# SPDX-License-Identifier: Apache-2.0
"""A run that is asked to stop saves and stops, and one that goes on from there ends where it would have ended anyway.

NeMo's timer and preemption callback do it, with checkpoints that are folders.
"""

import os
import signal
import time
from types import SimpleNamespace

import alignment_run
import pytest
import recipe
import torch
from alignment_run import AT_VALIDATION, NUM_BATCHES, build, fit, make_manifest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

STOP_AT = 4  # batches: one after a validation, so nothing else would have saved them


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("stopping-manifest") / "train")


@pytest.fixture(scope="module")
def uninterrupted(llama_salm, manifest, tmp_path_factory):
    """(its folder, its module)"""
    folder = tmp_path_factory.mktemp("uninterrupted")
    module = build(llama_salm[0], manifest, folder)
    fit(module, folder, AT_VALIDATION)
    return folder, module


def build_disturbed(salm, manifest, folder, disturb):
    """A run in which ``disturb`` is called during the batch after which it is to stop."""
    module = build(salm, manifest, folder)
    undisturbed = module.training_step

    def training_step(batch, batch_idx):
        undisturbed(batch, batch_idx)
        if module.num_batches == STOP_AT:
            disturb()

    module.training_step = training_step
    return module


def last(folder):
    (found,) = (folder / "run").rglob("*-last")
    return torch.load(found / "lightning.pt", weights_only=False)


def assert_goes_on(salm, manifest, folder, uninterrupted):
    module = build(salm, manifest, folder)
    fit(module, folder, AT_VALIDATION)
    whole_folder, whole = uninterrupted
    assert module.num_batches == NUM_BATCHES
    for (name, a), (_, b) in zip(whole.model.named_parameters(), module.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (folder / "metrics.jsonl").read_text() == (whole_folder / "metrics.jsonl").read_text()


def amend(monkeypatch, change):
    """Let ``change(trainer, cfg, start)`` stand for exp_manager in ``fit``."""
    start = alignment_run.exp_manager
    monkeypatch.setattr(alignment_run, "exp_manager", lambda trainer, cfg: change(trainer, cfg, start))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_batch(sig, llama_salm, manifest, uninterrupted, tmp_path, monkeypatch):
    def with_signals(trainer, cfg, start):
        start(trainer, cfg)
        recipe.save_on_signals(trainer)

    amend(monkeypatch, with_signals)
    before = signal.getsignal(sig)
    module = build_disturbed(llama_salm[0], manifest, tmp_path, lambda: os.kill(os.getpid(), sig))
    with pytest.raises(SystemExit) as stop:
        fit(module, tmp_path, AT_VALIDATION)
    assert not stop.value.code
    assert signal.getsignal(sig) is before, "a second one must stop at once"
    monkeypatch.undo()
    assert last(tmp_path)["global_step"] == 2 * STOP_AT
    assert_goes_on(llama_salm[0], manifest, tmp_path, uninterrupted)


@pytest.mark.parametrize(("sig", "other"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_that_the_process_ignores_stays_ignored(sig, other):
    trainer = SimpleNamespace(callbacks=[], checkpoint_callback=None)
    before = signal.signal(sig, signal.SIG_IGN)
    try:
        recipe.save_on_signals(trainer)
    finally:
        signal.signal(sig, before)
    assert [callback.sig for callback in trainer.callbacks] == [other]


def end_by(error):
    def end(module):
        raise error

    return SimpleNamespace(fit=end)


def test_only_an_end_that_was_saved_counts_as_one():
    assert recipe.fit(SimpleNamespace(fit=lambda module: None), None) is False
    assert recipe.fit(end_by(SystemExit(0)), None) is True
    for error in (SystemExit(1), SystemExit("a complaint"), SIGTERMException()):
        with pytest.raises(type(error)):
            recipe.fit(end_by(error), None)


def test_the_time_limit_saves_at_the_end_of_the_batch(llama_salm, manifest, uninterrupted, tmp_path, monkeypatch):
    amend(
        monkeypatch,
        lambda trainer, cfg, start: start(trainer, OmegaConf.merge(cfg, {"max_time_per_run": "00:00:05:00"})),
    )
    clock = time.monotonic
    module = build_disturbed(
        llama_salm[0], manifest, tmp_path, lambda: monkeypatch.setattr(time, "monotonic", lambda: clock() + 300)
    )
    trainer = fit(module, tmp_path, AT_VALIDATION)
    monkeypatch.undo()
    assert trainer.global_step == 2 * STOP_AT
    assert last(tmp_path)["global_step"] == 2 * STOP_AT
    assert_goes_on(llama_salm[0], manifest, tmp_path, uninterrupted)


def test_the_best_and_the_last_are_kept_and_nothing_else(uninterrupted):
    folder, _ = uninterrupted
    names = sorted(path.parent.name for path in (folder / "run").rglob("lightning.pt"))
    assert len(names) == 2
    assert sum(name.endswith("-last") for name in names) == 1
    assert not list(folder.rglob("unfinished"))
