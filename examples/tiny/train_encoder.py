# SPDX-License-Identifier: Apache-2.0
"""Train the speech encoder: NeMo's Conformer with word-level CTC on spoken requests of the train split."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from . import domain
from .speech import MEL_BINS, SpokenSet, draw_texts, make_spoken_set

ENCODER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "feat_in": MEL_BINS,
    "feat_out": -1,
    "n_layers": 3,
    "d_model": 112,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 32,
    "ff_expansion_factor": 3,
    "self_attention_model": "rel_pos",
    "n_heads": 4,
    "conv_kernel_size": 9,
    "conv_norm_type": "batch_norm",
    "pos_emb_max_len": 1000,
    "dropout": 0.05,
    "dropout_pre_encoder": 0.05,
    "dropout_emb": 0.0,
    "dropout_att": 0.0,
}
BATCH_SIZE = 32


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimizer; the learning rate rises, then falls linearly."""

    steps: int
    warmup: int
    peak_learning_rate: float
    final_learning_rate: float

    def learning_rate(self, step: int) -> float:
        """At a step counted from 0."""
        falling = self.peak_learning_rate + (self.final_learning_rate - self.peak_learning_rate) * step / self.steps
        return min(1, (step + 1) / self.warmup) * falling


PHASES = (
    Phase(steps=1000, warmup=200, peak_learning_rate=2e-3, final_learning_rate=2e-3 * (1 - 1000 / 3500)),
    Phase(steps=700, warmup=20, peak_learning_rate=1.4e-3, final_learning_rate=0.0),
)
BLANK = 0


class WordCTC(nn.Module):
    """A Conformer and a linear layer over the spoken words; index 0 is the CTC blank."""

    def __init__(self):
        super().__init__()
        from nemo.core import Serialization
        from omegaconf import DictConfig

        self.encoder = Serialization.from_config_dict(DictConfig(ENCODER))
        self.words, _ = domain.vocabulary()
        self.index = {word: index for index, word in enumerate(self.words, start=1)}
        self.head = nn.Linear(ENCODER["d_model"], len(self.words) + 1)

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mel (B, F, T) -> hidden states (B, T', D), log-probabilities (B, T', words + 1), lengths (B,)."""
        hidden, hidden_lengths = self.encoder(audio_signal=mel, length=lengths)
        hidden = hidden.transpose(1, 2)
        return hidden, self.head(hidden).log_softmax(-1), hidden_lengths

    def targets(self, text: str) -> Tensor:
        """Word indices of a text."""
        return torch.tensor([self.index[word] for word in text.split()])

    @torch.no_grad()
    def recognise(self, spoken: SpokenSet, batch_size: int = 50) -> list[str]:
        """Greedy CTC transcripts of a whole set."""
        self.eval()
        transcripts = []
        for first in range(0, len(spoken), batch_size):
            indices = range(first, min(first + batch_size, len(spoken)))
            _, logprobs, lengths = self(*spoken.batch(indices))
            best = logprobs.argmax(-1)
            transcripts += [self._collapse(row[:length]) for row, length in zip(best, lengths.tolist(), strict=True)]
        return transcripts

    def _collapse(self, path: Tensor) -> str:
        return " ".join(self.words[i - 1] for i in torch.unique_consecutive(path).tolist() if i != BLANK)


@dataclass(frozen=True)
class ErrorRates:
    """Recognition quality, in percent."""

    words: float
    sentences: float


def error_rates(references: list[str], hypotheses: list[str]) -> ErrorRates:
    """Word error rate (edits over reference words) and the share of texts that are not exactly right."""
    edits = sum(edit_distance(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    wrong = sum(r != h for r, h in zip(references, hypotheses, strict=True))
    words = sum(len(r.split()) for r in references)
    return ErrorRates(words=round(100 * edits / words, 2), sentences=round(100 * wrong / len(references), 2))


def edit_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def train_encoder(
    train: SpokenSet, held_out: SpokenSet, output: Path, *, seed: int, phases: Sequence[Phase] = PHASES
) -> WordCTC:
    """Train in phases with CTC and save encoder and head; returns the model."""
    torch.manual_seed(seed)
    model = WordCTC()
    print(f"encoder: {sum(p.numel() for p in model.encoder.parameters())} parameters, {len(model.words)} words")
    for number, phase in enumerate(phases):
        train_phase(model, train, held_out, output, phase, seed + 100 * number)
    return model


def train_phase(model: WordCTC, train: SpokenSet, held_out: SpokenSet, output: Path, phase: Phase, seed: int) -> None:
    """Train ``model`` in place."""
    rng = Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate(0), betas=(0.9, 0.98), weight_decay=1e-3)
    loss_function = nn.CTCLoss(blank=BLANK, zero_infinity=True)
    began, pending = time.time(), iter(())
    for step in range(1, phase.steps + 1):
        indices = next(pending, None)
        if indices is None:
            pending = train.batches(BATCH_SIZE, rng)
            indices = next(pending)
        model.train()
        _, logprobs, lengths = model(*train.batch(indices, rng))
        targets = [model.targets(train.texts[index]) for index in indices]
        target_lengths = torch.tensor([len(target) for target in targets])
        loss = loss_function(logprobs.transpose(0, 1), torch.cat(targets), lengths, target_lengths)
        optimizer.param_groups[0]["lr"] = phase.learning_rate(step - 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0 or step == phase.steps:
            rates = error_rates(held_out.texts, model.recognise(held_out))
            print(f"step {step} {time.time() - began:.0f} s loss {loss.item():.3f} held out {rates}", flush=True)
            torch.save(model.state_dict(), output)


def load_encoder(path: Path) -> WordCTC:
    """The model that ``train_encoder`` saved, in evaluation mode."""
    model = WordCTC()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def spoken_sets(work: Path, train_clips: int) -> dict[str, SpokenSet]:
    """The spoken sets of encoder and SALM training: train, and dev requests in dev voices."""
    plan = {"train": ("train", train_clips, 5), "dev": ("dev", 400, 3)}
    return {
        name: make_spoken_set(work / f"{name}.pt", draw_texts(split, count, seed), split, seed)
        for name, (split, count, seed) in plan.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train-clips", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = spoken_sets(arguments.work, arguments.train_clips)
    train_encoder(sets["train"], sets["dev"], arguments.work / "encoder.pt", seed=arguments.seed)
