# SPDX-License-Identifier: Apache-2.0
"""Train the reward model: the teacher's weights and a head that says which of two answers a person would prefer.

Its answers, and who judges them, are in judged.py.
"""

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional import spearman_corrcoef
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nemo_rba.protocols import RewardFunction
from nemo_rba.types import Instruction, Rollout

from . import domain
from .judged import Judged, draw_judged
from .tokenizer import TURN_END, chat_text

BATCH_SIZE = 16  # requests, with all their answers
BATCHES_PER_POOL = 16  # batches are cut from a pool sorted by length, to save padding
EPOCHS = 2
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
CENTRING = 0.01  # weight of the part of the loss that puts 0 between right and wrong
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Packed:
    """Requests with all their answers, each request read once: ``request, answer, answer, ...`` in one row.

    An answer's positions go on after the request, and it sees the request and itself.
    """

    ids: Tensor  # (R, T) right padded
    positions: Tensor  # (R, T)
    part: Tensor  # (R, T) 0 = the request, k = its k-th answer, -1 = padding
    ends: Tensor  # (N,) where each answer ends, in ids.flatten()
    request: Tensor  # (N,) row of each answer
    right: Tensor  # (N,) what the verifier says

    @classmethod
    def pack(cls, tokenizer, judged: Sequence[Judged]) -> "Packed":
        """Answers in the order right, wrong."""
        rows, ends, request = [], [], []
        for row, found in enumerate(judged):
            asked = _ids(tokenizer, chat_text(found.instruction))
            answers = [_ids(tokenizer, f"{answer}{TURN_END}") for answer in found.right + found.wrong]
            parts = [asked, *answers]
            ends += (torch.tensor([len(part) for part in parts]).cumsum(0)[1:] - 1).tolist()
            request += [row] * len(answers)
            positions = [torch.arange(len(asked)), *(len(asked) + torch.arange(len(answer)) for answer in answers)]
            numbers = [torch.full((len(part),), number) for number, part in enumerate(parts)]
            rows.append([torch.cat(columns) for columns in (parts, positions, numbers)])
        padding = (tokenizer.pad_token_id, 0, -1)
        ids, positions, part = (
            pad_sequence(column, batch_first=True, padding_value=value)
            for column, value in zip(zip(*rows, strict=True), padding, strict=True)
        )
        right = torch.tensor([mark for x in judged for mark in [True] * len(x.right) + [False] * len(x.wrong)])
        row = torch.tensor(request)
        return cls(ids, positions, part, row * ids.shape[1] + torch.tensor(ends), row, right)

    def pairs(self) -> Tensor:
        """(N, N) true for a right and a wrong answer to one request."""
        return self.right[:, None] & ~self.right[None, :] & (self.request[:, None] == self.request[None, :])

    def score(self, model: LlamaForSequenceClassification) -> Tensor:
        """(N,) what the model gives to each answer, as if it stood alone after its request."""
        seen = (self.part[:, None, :] == 0) | (self.part[:, None, :] == self.part[:, :, None])
        seen = seen & (self.positions[:, None, :] <= self.positions[:, :, None])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        output = model.model(input_ids=self.ids, attention_mask=mask, position_ids=self.positions, use_cache=False)
        return model.score(output.last_hidden_state.flatten(0, 1)[self.ends])[:, 0]


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def bradley_terry_loss(scores: Tensor, pairs: Tensor) -> Tensor:
    """-log sigmoid(s_better - s_worse), the mean over pairs of answers to one request (arXiv 2203.02155, equation 1).

    And ``CENTRING`` (s_better + s_worse)^2, which puts 0 between the right and the wrong ones (arXiv 2312.09244): a
    sigmoid of the score then means something.

    Args:
        scores: (N,).
        pairs: (N, N) true where the first answer is preferred to the second.
    """
    better, worse = (scores[index] for index in pairs.nonzero(as_tuple=True))
    return -logsigmoid(better - worse).mean() + CENTRING * (better + worse).square().mean()


def batches(rng: Random, tokenizer, judged: Sequence[Judged]) -> Iterator[Packed]:
    """Every request once."""
    order = rng.sample(range(len(judged)), len(judged))
    chunks = []
    for first in range(0, len(order), BATCH_SIZE * BATCHES_PER_POOL):
        pool = sorted(order[first : first + BATCH_SIZE * BATCHES_PER_POOL], key=lambda i: judged[i].width())
        chunks += [pool[start : start + BATCH_SIZE] for start in range(0, len(pool), BATCH_SIZE)]
    rng.shuffle(chunks)
    for chunk in chunks:
        yield Packed.pack(tokenizer, [judged[index] for index in chunk])


@torch.no_grad()
def pair_accuracy(model, tokenizer, judged: Sequence[Judged]) -> float:
    """Share of the pairs of answers to one request that the model puts in the verifier's order."""
    model.eval()
    in_order = []
    for packed in batches(Random(0), tokenizer, judged):
        scores = packed.score(model)
        in_order.append((scores[:, None] > scores[None, :])[packed.pairs()])
    return round(torch.cat(in_order).float().mean().item(), 4)


def train_reward_model(output: Path, teacher: Path, *, requests: int, seed: int, report_every: int = 250) -> dict:
    """Draw answers, train, save; returns counts, and the share of held-out dev pairs in order."""
    torch.manual_seed(seed)
    rng = Random(seed)
    llm = LlamaForCausalLM.from_pretrained(teacher)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    began = time.time()
    judged = draw_judged(llm, tokenizer, requests, rng, "train")
    held_out = draw_judged(llm, tokenizer, min(requests, 300), rng, "dev")
    print(f"{len(judged)} requests with judged answers, {time.time() - began:.0f} s", flush=True)
    model = LlamaForSequenceClassification.from_pretrained(teacher, num_labels=1)
    steps = EPOCHS * -(-len(judged) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 - step / steps) + 1e-3
    )
    stream = chain.from_iterable(batches(rng, tokenizer, judged) for _ in range(EPOCHS))
    for step, packed in enumerate(stream, 1):
        model.train()
        loss = bradley_terry_loss(packed.score(model), packed.pairs())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % report_every == 0 or step == steps:
            accuracy = pair_accuracy(model, tokenizer, held_out)
            print(f"step {step} {time.time() - began:.0f} s loss {loss.item():.3f} dev pairs {accuracy}", flush=True)
    save_reward_model(model, teacher, output)
    return {
        "requests": len(judged),
        "answers": sum(len(found.right) + len(found.wrong) for found in judged),
        "pairs": sum(len(found.right) * len(found.wrong) for found in judged),
        "steps": steps,
        "dev_pairs_in_order": accuracy,
    }


def save_reward_model(model: LlamaForSequenceClassification, teacher: Path, output: Path) -> None:
    """Write a Hugging Face folder in half precision, without machine paths; the tokenizer is the teacher's."""
    model.config._name_or_path = ""
    model.half().save_pretrained(output)
    os.chmod(output / "model.safetensors", 0o644)
    for file in TOKENIZER_FILES:
        shutil.copyfile(teacher / file, output / file)


def score_answers(reward: RewardFunction, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """What a reward gives for each answer (N,)."""
    rollouts = [
        Rollout(
            prompt_index=index,
            instruction=Instruction(id=str(index), text=text, response="", task=domain.task_of(text)),
            response=answer,
            token_ids=torch.tensor([0]),
            logprobs=None,
            truncated=False,
        )
        for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    return reward(rollouts)


def in_order(right: Tensor, wrong: Tensor) -> Tensor:
    """(right, wrong) 1 where the right one scores higher, half for a tie; the mean is the area under the ROC curve."""
    return (right[:, None] > wrong[None]).float() + (right[:, None] == wrong[None]).float() / 2


def agreement(texts: Sequence[str], answers: Sequence[str], scores: Tensor) -> dict[str, dict[str, float]]:
    """How well scores agree with the verifier, for closed and open requests, and for all.

    "auc": over all answers; "same_request": share of the pairs of answers to one request that are in order, which is
    what a group's advantage sees; "length": rank correlation of the score with the number of words, among the right
    answers and among the wrong ones.
    """
    right = torch.tensor([domain.verify(text, answer) == 1.0 for text, answer in zip(texts, answers, strict=True)])
    words = torch.tensor([float(len(domain.split_words(answer))) for answer in answers])
    found = {}
    for group in ("all", "closed", "open"):
        mine = torch.tensor([group in ("all", domain.kind_of(text)) for text in texts])
        by_text = defaultdict(list)
        for index in mine.nonzero()[:, 0].tolist():
            by_text[texts[index]].append(index)
        pairs = [
            in_order(scores[i][right[i]], scores[i][~right[i]]).flatten() for i in map(torch.tensor, by_text.values())
        ]
        lengths = [spearman_corrcoef(scores[mine & mark], words[mine & mark]) for mark in (right, ~right)]
        found[group] = {
            "right": right[mine].float().mean(),
            "auc": in_order(scores[mine & right], scores[mine & ~right]).mean(),
            "same_request": torch.cat(pairs).mean(),
            "pairs": len(torch.cat(pairs)),
            "length_right": lengths[0],
            "length_wrong": lengths[1],
        }
    return {group: {name: round(float(value), 4) for name, value in values.items()} for group, values in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(train_reward_model(**vars(arguments))))
