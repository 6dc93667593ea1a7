# SPDX-License-Identifier: Apache-2.0
"""Lightning's side of megatron: process groups by megatron, no wrapping of the module, sharded checkpoints.

The policy wraps the model in megatron's own data-parallel buffers, so Lightning must neither wrap nor synchronise it.
The module that is trained offers ``sharded_state_dict(is_loading=)`` and ``load_sharded_state_dict``: weights and
optimizer, every rank its share. Lightning's checkpoint holds all the rest.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from nemo.utils.model_utils import ckpt_to_dir

from nemo_rba.checkpoint import sharded
from nemo_rba.distributed import parallel
from nemo_rba.distributed.launch import cluster_environment


class MegatronStrategy(DDPStrategy):
    """For ``trainer.strategy``: megatron's groups over the processes that Lightning, torchrun or SLURM started."""

    def __init__(self, *, tensor_model_parallel_size: int, pipeline_model_parallel_size: int, seed: int):
        super().__init__(
            cluster_environment=cluster_environment(),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        )
        self._layout = {
            "tensor_parallel_size": tensor_model_parallel_size,
            "pipeline_parallel_size": pipeline_model_parallel_size,
            "seed": seed,
        }

    def setup_environment(self) -> None:
        if self.num_processes * self.num_nodes == 1:
            parallel.initialize(**self._layout)  # before Lightning, which would open a port for a world of one
        super().setup_environment()
        parallel.initialize(**self._layout)

    def configure_ddp(self) -> None:
        """Nothing to wrap."""

    def _setup_model(self, model):
        return model

    def teardown(self) -> None:
        """As Lightning's, but the model stays on its GPU: its best checkpoint is read, and gathered, after the fit."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ---- checkpoints: a folder where Lightning thinks of a file, under the name that NeMo's callback looks for -------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options=None) -> None:
        state = self.lightning_module.sharded_state_dict(is_loading=False)
        sharded.save(Path(ckpt_to_dir(filepath)), sharded=state, lightning=checkpoint)

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's part; ``load_model_state_dict`` reads the rest when the model is there."""
        self._resumed_from = Path(ckpt_to_dir(checkpoint_path))
        return sharded.read_lightning(self._resumed_from)

    def load_model_state_dict(self, checkpoint, strict: bool = True) -> None:
        self.restore(self.lightning_module, self._resumed_from)

    def restore(self, module, checkpoint_path: str | Path) -> None:
        """Give ``module`` the weights and the optimizer of a checkpoint."""
        state = module.sharded_state_dict(is_loading=True)
        module.load_sharded_state_dict(sharded.load(Path(ckpt_to_dir(checkpoint_path)), state))

    def load_optimizer_state_dict(self, checkpoint) -> None:
        """Came with the model's."""

    def remove_checkpoint(self, filepath) -> None:
        if self.is_global_zero:
            shutil.rmtree(ckpt_to_dir(filepath), ignore_errors=True)
