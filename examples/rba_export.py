# SPDX-License-Identifier: Apache-2.0
"""A manifest for NeMo's own trainers: Lhotse Shar -> multimodal_conversation JSONL and audio files.

python examples/rba_export.py manifest=runs/rba_tiny/synthesis/train folder=train_conversations
"""

from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_rba.data.conversations import JSONL, write_conversations


@hydra_runner(config_path="../conf", config_name="rba_export")
def main(cfg: DictConfig) -> None:
    try:
        counts = write_conversations(cfg.manifest, cfg.folder, audio_format=cfg.audio_format)
    except ValueError as problem:
        raise SystemExit(str(problem)) from None
    logging.info(f"{cfg.folder}/{JSONL}: {', '.join(f'{n} {what}' for what, n in counts.items())}")


if __name__ == "__main__":
    main()
