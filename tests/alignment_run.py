# SPDX-License-Identifier: Apache-2.0
"""A short alignment of a tiny random model under Lightning and exp_manager, which can be made to crash."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_rba.algorithms.advantage import LeaveOneOut
from nemo_rba.algorithms.alignment import RBAAlignment
from nemo_rba.algorithms.controllers import AdaptiveKL, WarmupDecay
from nemo_rba.algorithms.controls import Controls
from nemo_rba.algorithms.metrics_file import MetricsFile
from nemo_rba.algorithms.objectives import ClippedPolicyLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.rollout import PolicyRollouts
from nemo_rba.algorithms.strategy import MegatronStrategy
from nemo_rba.algorithms.watcher import StopOnCollapse
from nemo_rba.data.dataset import SpeechInstructionDataset
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.distributed import parallel
from nemo_rba.manifest import write_shar
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.rewards.text import ChrF
from nemo_rba.types import Instruction, SamplingParams, Utterance

NUM_BATCHES = 7
EVERY_TWO_STEPS = {"every_n_train_steps": 2, "every_n_epochs": None}
AT_VALIDATION = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False}


class StopHere(Exception):
    """Stands for a crash."""


def make_manifest(folder: Path) -> Path:
    """A Shar of ten noises."""
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
    write_shar(utterances, folder, shard_size=4, teacher="none", audio_format="flac")
    return folder


def build(
    salm_folder, manifest: Path, folder: Path, *, crash_at: int | None = None, tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> RBAAlignment:  # fmt: skip
    """Two optimiser steps a batch; ``crash_at`` counts batches."""

    def loader(prompt, sampling_rate, shuffle, drop_last):
        dataset = SpeechInstructionDataset(
            prompt=prompt, sampling_rate=sampling_rate, max_duration_seconds=20.0, max_response_tokens=32,
            quarantine=folder / "quarantine.jsonl",
        )  # fmt: skip
        return SpeechLoader(
            manifest=manifest, dataset=dataset, batch_size=3, shuffle=shuffle, seed=0,
            rank=parallel.data_parallel_rank(), world_size=parallel.data_parallel_size(), drop_last=drop_last,
        )  # fmt: skip

    class Crashing(RBAAlignment):
        def training_step(self, batch, batch_idx):
            if self.num_batches == crash_at:
                raise StopHere
            super().training_step(batch, batch_idx)

    return Crashing(
        build_model=partial(
            RBASpeechLM.from_salm, folder=salm_folder, tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel, sequence_parallel=False, params_dtype="float32", seed=0,
        ),
        build_policy=partial(
            MegatronPolicy, lora=None, freeze=["^perception\\.encoder"], micro_batch_size=2, generation_batch_size=8,
            weight_decay=0.01, betas=(0.9, 0.98), epsilon=1e-5, max_grad_norm=1.0,
            recompute=False, distributed_optimizer=False,
        ),
        source=PolicyRollouts(group_size=3, max_new_tokens=8, temperature=1.0, top_p=1.0),
        reward=RewardMixture(parts={"chrf": ChrF()}, weights={"chrf": 1.0}),
        advantage=LeaveOneOut(),
        objective=ClippedPolicyLoss(
            clip_low=0.2, clip_high=0.2, kl_coefficient=0.1, kl_estimator="k3", dense_weight=0.0, dense_clip=5.0,
            aggregation="token_mean",
        ),
        teacher=None,
        controls=Controls(
            schedule=WarmupDecay(peak=3e-3, floor=0.0, warmup_steps=2, total_steps=20, shape="linear"),
            kl_controller=AdaptiveKL(coefficient=0.1, target=0.01, horizon_steps=5),
            watcher=StopOnCollapse(
                min_entropy=1e-6, min_length=None, max_length=None, patience=3, dev_score="val/reward",
                validation_patience=None,
            ),
        ),
        build_loader=partial(loader, shuffle=True, drop_last=True),
        build_validation_loader=partial(loader, shuffle=False, drop_last=False),
        validation_params=SamplingParams(max_new_tokens=8, temperature=0),
        num_minibatches=2,
        ppo_epochs=1,
        seed=7,
    )  # fmt: skip


def fit(
    module: RBAAlignment, folder: Path, when: dict, *, devices: int = 1, tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> Trainer:  # fmt: skip
    """Train, from the last checkpoint in ``folder`` if there is one."""

    trainer = Trainer(
        accelerator="cpu", devices=devices, max_steps=2 * NUM_BATCHES, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, enable_progress_bar=False, num_sanity_val_steps=-1, val_check_interval=3,
        check_val_every_n_epoch=None, log_every_n_steps=1,
        strategy=MegatronStrategy(
            tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel, seed=0
        ),
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
    return trainer
