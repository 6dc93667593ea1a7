# SPDX-License-Identifier: Apache-2.0
"""An interrupted run is the uninterrupted run: weights, optimizer, schedule, sampling and data position."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf
from tiny_models import load_speech_lm

from nemo_rba.algorithms.advantage import LeaveOneOut
from nemo_rba.algorithms.alignment import RBAAlignment
from nemo_rba.algorithms.controllers import WarmupDecay
from nemo_rba.algorithms.metrics_file import MetricsFile
from nemo_rba.algorithms.objectives import ClippedPolicyLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.rollout import PolicyRollouts
from nemo_rba.data.dataset import SpeechInstructionDataset
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.distributed.strategy import MegatronStrategy
from nemo_rba.manifest import write_shar
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.rewards.text import ChrF
from nemo_rba.types import Instruction, SamplingParams, Utterance

NUM_BATCHES = 7


class StopHere(Exception):
    """Stands for a crash."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    utterances = [
        Utterance(
            instruction=Instruction(id=f"u{i}", text="hello", response=["paris", "a b", "one two"][i % 3], task="t"),
            audio=0.1 * torch.randn(8000 + 900 * i, generator=generator),
            sampling_rate=16000,
            speaker="noise",
        )
        for i in range(10)
    ]
    folder = tmp_path_factory.mktemp("manifest") / "train"
    write_shar(utterances, folder, shard_size=4, teacher="none", audio_format="flac")
    return folder


def build(salm_folder, manifest, folder, crash_at=None):
    def loader(prompt, sampling_rate, shuffle, drop_last):
        dataset = SpeechInstructionDataset(
            prompt=prompt, sampling_rate=sampling_rate, max_duration_seconds=20.0, max_response_tokens=32,
            quarantine=folder / "quarantine.jsonl",
        )  # fmt: skip
        return SpeechLoader(
            manifest=manifest, dataset=dataset, batch_size=3, shuffle=shuffle, seed=0, rank=0, world_size=1,
            drop_last=drop_last,
        )  # fmt: skip

    class Crashing(RBAAlignment):
        def training_step(self, batch, batch_idx):
            if self.num_batches == crash_at:
                raise StopHere
            super().training_step(batch, batch_idx)

    return Crashing(
        build_model=partial(load_speech_lm, salm_folder),
        build_policy=partial(
            MegatronPolicy, freeze=["^perception\\.encoder"], micro_batch_size=2, generation_batch_size=8,
            weight_decay=0.01, betas=(0.9, 0.98), epsilon=1e-8, max_grad_norm=1.0,
        ),
        source=PolicyRollouts(group_size=3, max_new_tokens=8, temperature=1.0, top_p=1.0),
        reward=RewardMixture(parts={"chrf": ChrF()}, weights={"chrf": 1.0}),
        advantage=LeaveOneOut(),
        objective=ClippedPolicyLoss(
            clip_low=0.2, clip_high=0.2, kl_coefficient=0.1, kl_estimator="k3", dense_weight=0.0, dense_clip=5.0,
            aggregation="token_mean",
        ),
        teacher=None,
        schedule=WarmupDecay(peak=3e-3, floor=0.0, warmup_steps=2, total_steps=20, shape="linear"),
        build_loader=partial(loader, shuffle=True, drop_last=True),
        build_validation_loader=partial(loader, shuffle=False, drop_last=False),
        validation_params=SamplingParams(max_new_tokens=8, temperature=0),
        num_minibatches=2,
        seed=7,
    )  # fmt: skip


def fit(module, folder, when):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2 * NUM_BATCHES, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, enable_progress_bar=False, num_sanity_val_steps=-1, val_check_interval=3,
        check_val_every_n_epoch=None, log_every_n_steps=1,
        strategy=MegatronStrategy(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0),
        callbacks=[MetricsFile(path=folder / "metrics.jsonl")],
    )  # fmt: skip
    exp_manager(
        trainer,
        OmegaConf.create(
            dict(
                exp_dir=str(folder), name="run", create_tensorboard_logger=False, resume_if_exists=True,
                resume_ignore_no_checkpoint=True, use_datetime_version=False,
                checkpoint_callback_params=dict(
                    monitor="val/reward", mode="max", save_top_k=1, save_last=True, save_nemo_on_train_end=False, **when
                ),
            )
        ),
    )  # fmt: skip
    trainer.fit(module)


@pytest.mark.parametrize(
    "when",
    [
        {"every_n_train_steps": 2, "every_n_epochs": None},
        {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False},
    ],
    ids=["every few steps", "at validation"],
)
def test_interrupted_run_equals_uninterrupted_one(when, llama_salm, manifest, tmp_path):
    whole = build(llama_salm[0], manifest, tmp_path)
    fit(whole, tmp_path / "whole", when)
    with pytest.raises(StopHere):
        fit(build(llama_salm[0], manifest, tmp_path, crash_at=4), tmp_path / "broken", when)
    resumed = build(llama_salm[0], manifest, tmp_path)
    fit(resumed, tmp_path / "broken", when)
    assert whole.num_batches == resumed.num_batches == NUM_BATCHES
    assert whole.schedule.step == resumed.schedule.step == 2 * NUM_BATCHES
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    moments = [m.policy.optimizer.state_dict() for m in (whole, resumed)]
    assert str(moments[0]) == str(moments[1])
    one, two = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "broken")]
    assert one == two, "the metrics of the two runs, step by step"
    assert '"step": 0' in one.splitlines()[0]
    assert "val/gap_closed" in one
