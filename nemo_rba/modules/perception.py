# SPDX-License-Identifier: Apache-2.0
"""Audio to speech frames, in two halves: what is frozen runs once per batch, what is trained runs when needed."""

from dataclasses import dataclass

import torch
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule, IdentityConnector
from nemo.core import typecheck
from omegaconf import DictConfig
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncodedSpeech:
    """Encoder output before the modality adapter: features (B, D, F), lens (B,)."""

    features: Tensor
    lens: Tensor


def build_perception(config: DictConfig) -> AudioPerceptionModule:
    """NeMo's perception with random weights, made for a world in which ranks do not encode in step.

    NeMo's encoders agree on the longest clip by an all-reduce over all processes in every forward pass; here data- and
    pipeline-parallel ranks encode at different times, and it would wait for ever.

    Raises:
        ValueError: see ``check_perception``.
    """
    perception = AudioPerceptionModule(config)
    check_perception(perception)
    for module in perception.modules():
        if hasattr(module, "sync_max_audio_length"):
            module.sync_max_audio_length = False
    return perception


def check_perception(perception: AudioPerceptionModule) -> None:
    """Refuse modality adapters whose input is not the encoder's last layer."""
    adapter = perception.modality_adapter
    if not isinstance(adapter, (IdentityConnector, ConformerEncoder)):
        raise ValueError(
            f"modality_adapter {type(adapter).__name__} is not supported; expected IdentityConnector or "
            "ConformerEncoder in perception.modality_adapter._target_ of the SALM checkpoint"
        )


@typecheck.disable_checks()
def encode(perception: AudioPerceptionModule, audio: Tensor, audio_lens: Tensor) -> EncodedSpeech:
    """Run the encoder on float32 audio (B, A) with audio_lens (B,); its features have its weights' type."""
    features, lens = perception.preprocessor(input_signal=audio, length=audio_lens)
    features = features.to(next(perception.encoder.parameters()).dtype)
    return EncodedSpeech(*perception.encoder(audio_signal=features, length=lens))


@typecheck.disable_checks()
def adapt(perception: AudioPerceptionModule, speech: EncodedSpeech) -> tuple[Tensor, Tensor]:
    """Run adapter and projection: speech frames (B, F, H) for the language model, and their lens (B,)."""
    features, lens = perception.modality_adapter(audio_signal=speech.features, length=speech.lens)
    frames = perception.proj(features.transpose(1, 2))
    return frames[:, : int(lens.max())], lens.to(torch.int64)
