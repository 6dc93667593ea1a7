# SPDX-License-Identifier: Apache-2.0
"""The two systems that are compared: NeMo's SALM and an RBASpeechLM with the same random weights; and the stop-watch.

Times are CPU seconds of this process on one torch thread, so that other work on the machine counts less. Systems take
turns, round after round, and a ratio is made within its round. Answers never end early, so both do the same steps.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from nemo.collections.speechlm2.models import SALM
from torch import Tensor
from transformers import Qwen3Config

from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.types import Instruction, SamplingParams, SpeechBatch

TINY = Path(__file__).parents[1] / "tiny"
SAMPLING_RATE = 16000
_HEADS, _GROUPS, _VOCABULARY = 8, 4, 512
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen3 of random weights behind the tiny recipe's speech encoder."""

    hidden: int
    layers: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for: ``group`` answers of ``tokens`` tokens to each of ``prompts`` clips of ``seconds``."""

    prompts: int
    group: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Times:
    """CPU seconds of one system in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds)

    def per(self, count: float) -> str:
        """Median and range of milliseconds for one of ``count``."""
        low, middle, high = (1000 * x / count for x in (min(self.rounds), self.median, max(self.rounds)))
        return f"{middle:.1f} [{low:.1f}, {high:.1f}]"

    def over(self, other: "Times") -> tuple[float, float, float]:
        """How many times longer than ``other``, round by round: median, lowest, highest."""
        ratios = [mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def less(self, part: "Times") -> "Times":
        """Without a part that was timed in the same rounds."""
        return Times(tuple(whole - x for whole, x in zip(self.rounds, part.rounds, strict=True)))


def alternate(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """CPU seconds of each function; they take turns, and a first round that warms up is not counted."""
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            rounds[name].append(time.process_time() - begin)
    return {name: Times(tuple(values[1:])) for name, values in rounds.items()}


def write_salm(size: Size, folder: Path) -> SALM:
    """NeMo's SALM with a random language model, and the same as a checkpoint folder."""
    torch.manual_seed(0)
    config = json.loads((TINY / "salm" / "config.json").read_text())
    backbone = folder / "llm_backbone"
    Qwen3Config(
        vocab_size=_VOCABULARY, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=_HEADS, num_key_value_heads=_GROUPS,
        head_dim=size.hidden // _HEADS, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    ).save_pretrained(backbone)  # fmt: skip
    for file in _TOKENIZER:
        shutil.copy(TINY / "salm" / file, folder / file)
        shutil.copy(TINY / "salm" / file, backbone / file)
    config["perception"]["output_dim"] = size.hidden
    salm = SALM(config | {"pretrained_llm": str(backbone), "pretrained_weights": False}).eval()
    salm.save_pretrained(folder)
    return salm


def load_ours(folder: Path) -> RBASpeechLM:
    """The same weights as an RBASpeechLM whose answers never end."""
    model = RBASpeechLM.from_salm(
        folder=folder, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, params_dtype="float32", seed=0,
        sequence_parallel=False,
    )  # fmt: skip
    model.prompt.eot_id = -1
    return model


def num_parameters(model: RBASpeechLM) -> str:
    """Size of the language model, for labels."""
    return f"{sum(p.numel() for p in model.llm.parameters()) / 1e6:.1f} M"


def noise_clips(model: RBASpeechLM, prompts: int, seconds: float) -> SpeechBatch:
    """Spoken prompts without words."""
    instructions = tuple(Instruction(id=str(i), text="", response="", task="") for i in range(prompts))
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(prompts, int(SAMPLING_RATE * seconds), generator=generator)
    return batch_of(model, instructions, list(audio))


def batch_of(model: RBASpeechLM, instructions: Sequence[Instruction], clips: Sequence[Tensor]) -> SpeechBatch:
    """A batch without a data pipeline."""
    pad = torch.nn.utils.rnn.pad_sequence
    prompts = [torch.tensor(model.prompt.encode_prompt(instruction)) for instruction in instructions]
    return SpeechBatch(
        instructions=tuple(instructions),
        audio=pad(clips, batch_first=True),
        audio_lens=torch.tensor([len(clip) for clip in clips]),
        prompt_ids=pad(prompts, batch_first=True),
        prompt_lens=torch.tensor([len(ids) for ids in prompts]),
        response_ids=pad(prompts, batch_first=True),  # not read by what is measured
        response_lens=torch.tensor([len(ids) for ids in prompts]),
    )


def answer_ours(model: RBASpeechLM, batch: SpeechBatch, load: Load, *, temperature: float = 1.0) -> Tensor:
    """Group sampling, encoder included: token ids (N, T)."""
    params = SamplingParams(max_new_tokens=load.tokens, temperature=temperature)
    with torch.no_grad():
        rollouts = model.generate(batch, model.encode(batch), group_size=load.group, params=params)
    return torch.stack([rollout.token_ids for rollout in rollouts])


def answer_nemo(salm: SALM, batch: SpeechBatch, load: Load, **settings) -> Tensor:
    """``SALM.generate`` on the same clips, sampling unless ``settings`` say otherwise: token ids (N, T)."""
    turns = [[{"role": "user", "slots": {"message": salm.audio_locator_tag}}]] * len(batch)
    settings = {"do_sample": True, "num_return_sequences": load.group} | settings
    return salm.generate(
        turns, audios=batch.audio, audio_lens=batch.audio_lens, max_new_tokens=load.tokens,
        min_new_tokens=load.tokens, **settings,
    )  # fmt: skip
