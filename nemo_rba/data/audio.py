# SPDX-License-Identifier: Apache-2.0
"""One audio file, as it comes: any rate, any number of channels."""

from pathlib import Path

import torch
from lhotse import Recording
from torch import Tensor

from nemo_rba.protocols import PromptEncoder
from nemo_rba.types import Instruction, SpeechBatch


def read_audio(path: str | Path, sampling_rate: int) -> Tensor:
    """Mono float32 (A,) at ``sampling_rate`` Hz; channels are averaged.

    Raises:
        ValueError: the file is missing, unreadable or empty.
    """
    if not Path(path).is_file():
        raise ValueError(f"audio={path}: no such file")
    try:
        recording = Recording.from_file(path)
        samples = torch.from_numpy(recording.resample(sampling_rate).load_audio())
    except Exception as error:  # whatever a decoder may raise
        raise ValueError(f"audio={path} cannot be read as audio: {str(error).splitlines()[0]}") from error
    audio = samples.float().mean(0)
    if audio.numel() == 0 or not torch.isfinite(audio).all():
        raise ValueError(f"audio={path} holds {audio.numel()} samples, expected finite ones and at least one")
    return audio


def single_prompt(audio: Tensor, context: str, prompt: PromptEncoder) -> SpeechBatch:
    """A batch of one spoken prompt without an answer; audio (A,)."""
    instruction = Instruction(id="prompt", text="", response="", task="chat", context=context)
    ids = torch.tensor([prompt.encode_prompt(instruction)])
    return SpeechBatch(
        instructions=(instruction,),
        audio=audio[None],
        audio_lens=torch.tensor([len(audio)]),
        prompt_ids=ids,
        prompt_lens=torch.tensor([ids.shape[1]]),
        response_ids=torch.zeros(1, 0, dtype=torch.int64),
        response_lens=torch.tensor([0]),
    )
