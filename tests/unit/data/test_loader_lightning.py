# SPDX-License-Identifier: Apache-2.0
"""A run resumed by Lightning sees the batches the uninterrupted run would have seen, wherever it was cut."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

NUM_ITEMS = 8  # 4 batches an epoch


class Recorder(pl.LightningModule):
    """Manual optimisation like the real loop; remembers the ids of every batch it was given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, ...]] = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # Lightning's default cannot rebuild a frozen dataclass

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(instruction.id for instruction in batch.instructions))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * batch.audio.sum())
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, loader, *, resume: Path | None = None, save: ModelCheckpoint | None = None, val=None, **limits):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[] if save is None else [save],
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **limits,
    )
    trainer.fit(module, train_dataloaders=loader, val_dataloaders=val, ckpt_path=resume)
    return module.seen


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("unusable", [[], [2, 5]])
def test_resuming_after_any_step(tmp_path, items, make_loader, unusable):
    manifest, folder = items(NUM_ITEMS, unusable=unusable), tmp_path / "checkpoints"
    want = fit(tmp_path, make_loader(manifest), save=every_step(folder), max_steps=10)
    assert len(want) == 10
    for step in (1, 3, 4, 5, 8, 9):  # within an epoch, at the end of one, after several
        seen = fit(tmp_path, make_loader(manifest), resume=folder / f"step={step}.ckpt", max_steps=10)
        assert seen == want[step:], f"resumed after step {step}"


def test_resuming_at_the_end_of_an_epoch(tmp_path, items, make_loader):
    manifest, folder = items(NUM_ITEMS), tmp_path / "checkpoints"
    save = ModelCheckpoint(dirpath=folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    want = fit(tmp_path, make_loader(manifest), save=save, max_epochs=3)
    assert len(want) == 12
    assert len(set(want[:4])) == 4
    for epoch in (0, 1):
        resume = folder / f"epoch={epoch}.ckpt"
        assert fit(tmp_path, make_loader(manifest), resume=resume, max_epochs=3) == want[4 * (epoch + 1) :]
        assert fit(tmp_path, make_loader(manifest), resume=resume, max_steps=12) == want[4 * (epoch + 1) :]


def test_resuming_with_validation_between_steps(tmp_path, items, make_loader):
    manifest, folder = items(NUM_ITEMS), tmp_path / "checkpoints"
    checks = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1, "max_steps": 10}
    val = {"shuffle": False, "drop_last": False}
    want = fit(tmp_path, make_loader(manifest), save=every_step(folder), val=make_loader(manifest, **val), **checks)
    for step in (2, 3, 7):
        loaders = make_loader(manifest), make_loader(manifest, **val)
        seen = fit(tmp_path, loaders[0], val=loaders[1], resume=folder / f"step={step}.ckpt", **checks)
        assert seen == want[step:], f"resumed after step {step}"


def test_resuming_a_run_of_shortened_epochs(tmp_path, items, make_loader):
    manifest, folder = items(NUM_ITEMS), tmp_path / "checkpoints"
    limits = {"limit_train_batches": 3, "max_steps": 9}
    want = fit(tmp_path, make_loader(manifest), save=every_step(folder), **limits)
    assert len(want) == 9
    for step in (2, 3, 4, 6):
        seen = fit(tmp_path, make_loader(manifest), resume=folder / f"step={step}.ckpt", **limits)
        assert seen == want[step:], f"resumed after step {step}"
