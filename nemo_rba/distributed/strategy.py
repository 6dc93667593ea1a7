# SPDX-License-Identifier: Apache-2.0
"""Lightning's side of megatron: process groups by megatron, and no wrapping of the module.

The policy wraps the model in megatron's own data-parallel buffers, so Lightning must neither wrap nor synchronise it.
"""

import torch
from lightning.pytorch.strategies import DDPStrategy

from nemo_rba.distributed import parallel


class MegatronStrategy(DDPStrategy):
    """For ``trainer.strategy``: megatron's groups over the processes that Lightning, torchrun or SLURM started."""

    def __init__(self, *, tensor_model_parallel_size: int, pipeline_model_parallel_size: int, seed: int):
        super().__init__(process_group_backend="nccl" if torch.cuda.is_available() else "gloo")
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

    def setup(self, trainer) -> None:
        """Refuse to train what could not be continued.

        Raises:
            ValueError: checkpoints are asked for, and the weights are sharded: rank 0 would write only its own share.
        """
        if parallel.model_parallel_size() > 1 and trainer.checkpoint_callbacks:
            raise ValueError(
                f"checkpoints of weights sharded over {parallel.model_parallel_size()} processes are not written yet; "
                "set exp_manager.create_checkpoint_callback=false, or the model.*_parallel_size keys to 1"
            )
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Nothing to wrap."""

    def _setup_model(self, model):
        return model
