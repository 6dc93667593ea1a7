# SPDX-License-Identifier: Apache-2.0
"""Train the tiny SALM as real ones are: much transcription, a little instruction following, the LLM protected.

Two steps: (1) the linear projection is fitted so that frames land on the embeddings of the words that the encoder's
CTC head hears in them, pauses on the embedding of the pause; (2) perception is trained through the LLM, mostly to
transcribe, on a small share of clips to answer as the teacher does; the LLM learns along and is protected by rehearsing
typed chats (a frozen LLM, ``llm_learning_rate`` 0, learnt to transcribe but hardly to answer). Nothing makes it
worse at answering: it has only been shown little speech that asks for an answer.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import chat, train_teacher
from .salm import INSTRUCT_PROMPT, TRANSCRIBE_PROMPT, build_salm, save_salm
from .speech import SpokenSet
from .tokenizer import UNKNOWN, chat_text
from .train_encoder import WordCTC, error_rates, load_encoder, spoken_sets

IGNORED = -100
BATCH_SIZE = 32
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """How the SALM is trained."""

    steps: int = 1000
    perception_learning_rate: float = 1e-3
    llm_learning_rate: float = 1e-3  # 0 = frozen; the teacher's peak was 2.5e-3
    text_share: float = 0.15  # of the batches: the typed chats that the LLM was trained on
    instruct_share: float = 0.2  # of the batches: spoken requests, answered
    instruct_clips: int = 600  # distinct clips that instruction following is taught from
    seed: int = 2


@torch.no_grad()
def fit_projection(model, ctc: WordCTC, spoken: SpokenSet, clips: int = 1500, ridge: float = 1e-2) -> float:
    """Least-squares fit of ``perception.proj``; returns the mean squared error left, as a share of the variance."""
    tokenizer = model.tokenizer.tokenizer
    table = model.embed_tokens.weight[tokenizer.convert_tokens_to_ids([UNKNOWN, *ctc.words])]  # row 0: the blank
    inputs, outputs = [], []
    for first in range(0, clips, 50):
        hidden, logprobs, lengths = ctc(*spoken.batch(range(first, first + 50)))
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        inputs.append(hidden[real])
        outputs.append(logprobs[real].exp() @ table)
    x, y = torch.cat(inputs), torch.cat(outputs)
    x1 = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    gram = x1.T @ x1 / len(x1) + ridge * torch.eye(x1.shape[1])
    solution = torch.linalg.solve(gram, x1.T @ y / len(x1))
    model.perception.proj.weight.copy_(solution[:-1].T)
    model.perception.proj.bias.copy_(solution[-1])
    return float(((x1 @ solution - y).square().mean() / y.var(dim=0).mean()).item())


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[Tensor, Tensor]:
    """Ids before and after the place where the speech goes."""
    ids = tokenizer.backend_tokenizer.encode(chat_text(prompt)).ids
    place = ids.index(tokenizer.convert_tokens_to_ids(INSTRUCT_PROMPT))
    return torch.tensor(ids[:place]), torch.tensor(ids[place + 1 :])


def speech_loss(model, mel: Tensor, lengths: Tensor, prompt: str, responses: list[str]) -> Tensor:
    """Cross-entropy of the responses, given the prompt with the speech in it."""
    tokenizer = model.tokenizer.tokenizer
    speech, speech_lengths = model.perception(processed_signal=mel, processed_signal_length=lengths)
    before, after = prompt_ids(tokenizer, prompt)
    rows, labels = [], []
    for row, (length, response) in enumerate(zip(speech_lengths.tolist(), responses, strict=True)):
        answer = torch.tensor([*tokenizer.backend_tokenizer.encode(response).ids, tokenizer.eos_token_id])
        start = torch.full((len(before) + length + len(after),), IGNORED)
        parts = [model.embed_tokens(before), speech[row, :length], model.embed_tokens(torch.cat([after, answer]))]
        rows.append(torch.cat(parts))
        labels.append(torch.cat([start, answer]))
    embeds = pad_sequence(rows, batch_first=True)
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    hidden = model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    chosen = targets[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(model.llm.lm_head(hidden[:, :-1][chosen]), targets[:, 1:][chosen])


@torch.no_grad()
def respond_to_mel(model, spoken: SpokenSet, prompt: str, batch_size: int = 50) -> list[str]:
    """Greedy answers from stored features (what ``salm.respond`` does from audio)."""
    model.eval()
    tokenizer = model.tokenizer.tokenizer
    before, after = prompt_ids(tokenizer, prompt)
    answers = []
    for first in range(0, len(spoken), batch_size):
        mel, lengths = spoken.batch(range(first, min(first + batch_size, len(spoken))))
        speech, speech_lengths = model.perception(processed_signal=mel, processed_signal_length=lengths)
        rows = [
            torch.cat([model.embed_tokens(before), speech[row, :length], model.embed_tokens(after)])
            for row, length in enumerate(speech_lengths.tolist())
        ]
        answers += [chat.cut_turn(tokenizer, ids) for ids in _generate(model, rows)]
    return answers


def _generate(model, rows: list[Tensor]) -> list[list[int]]:
    from nemo.collections.speechlm2.parts.pretrained import move_embedding

    sizes = torch.tensor([len(row) for row in rows])
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.arange(embeds.shape[1]) >= (embeds.shape[1] - sizes)[:, None]
    tokenizer = model.tokenizer.tokenizer
    with move_embedding(model):
        output = model.llm.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=chat.MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return output.tolist()


def evaluate(model, spoken: SpokenSet, limit: int | None = None) -> dict:
    """Transcription error rates and instruction-following scores of a held-out spoken set."""
    if limit is not None:
        spoken = SpokenSet(spoken.texts[:limit], spoken.frames, spoken.offsets[: limit + 1])
    rates = error_rates(spoken.texts, respond_to_mel(model, spoken, TRANSCRIBE_PROMPT))
    scores = chat.score(spoken.texts, respond_to_mel(model, spoken, INSTRUCT_PROMPT))
    return {"wer": rates.words, "ser": rates.sentences, **{k: v for k, v in scores.items() if "/" not in k}}


def train_salm(
    folder: Path, teacher: Path, encoder: Path, sets: dict[str, SpokenSet], recipe: Recipe, report_every: int = 250
):
    """Build, train and save; returns the model."""
    torch.manual_seed(recipe.seed)
    train = sets["train"]
    model, ctc = build_salm(folder, teacher), load_encoder(encoder)
    model.perception.encoder.load_state_dict(ctc.encoder.state_dict())
    print(f"projection fitted, {fit_projection(model, ctc, train):.3f} of the variance left", flush=True)
    answers = teacher_answers(teacher, train.texts[: recipe.instruct_clips])
    print(f"before training: {evaluate(model, sets['dev'], 100)}", flush=True)
    optimizer, schedule = build_optimizer(model, recipe)
    losses = losses_without_end(model, train, answers, recipe)
    began = time.time()
    for step in range(1, recipe.steps + 1):
        model.perception.train()
        model.llm.train(recipe.llm_learning_rate > 0)
        loss = next(losses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % report_every == 0 or step == recipe.steps:
            figures = evaluate(model, sets["dev"], 200)
            print(f"step {step} {time.time() - began:.0f} s loss {loss.item():.3f} {figures}", flush=True)
            save_salm(model, folder)
    return model


def losses_without_end(model, train: SpokenSet, answers: list[str], recipe: Recipe) -> Iterator[Tensor]:
    """One loss a step: typed chats, spoken requests to answer, or (mostly) spoken words to transcribe."""
    rng = Random(recipe.seed)
    tokenizer = model.tokenizer.tokenizer
    transcribe, typed = iter(()), train_teacher.batches(Random(recipe.seed + 1), tokenizer)
    text_share = recipe.text_share if recipe.llm_learning_rate > 0 else 0.0  # a frozen LLM need not rehearse
    while True:
        draw = rng.random()
        if draw < text_share:
            ids, weights = next(typed)
            hidden = model.llm.model(inputs_embeds=model.embed_tokens(ids), use_cache=False).last_hidden_state
            yield train_teacher.weighted_loss(model.llm.lm_head(hidden), ids, weights)
        elif draw < text_share + recipe.instruct_share:
            indices = rng.sample(range(recipe.instruct_clips), BATCH_SIZE)
            mel, lengths = train.batch(indices, rng)
            yield speech_loss(model, mel, lengths, INSTRUCT_PROMPT, [answers[index] for index in indices])
        else:
            indices = next(transcribe, None)
            if indices is None:
                transcribe = train.batches(BATCH_SIZE, rng)
                indices = next(transcribe)
            mel, lengths = train.batch(indices, rng)
            yield speech_loss(model, mel, lengths, TRANSCRIBE_PROMPT, [train.texts[index] for index in indices])


def build_optimizer(model, recipe: Recipe):
    """AdamW over perception, and over the LLM where it is not frozen, with linear decay."""
    groups = [{"params": list(model.perception.parameters()), "lr": recipe.perception_learning_rate}]
    llm_parameters = [*model.llm.parameters(), *model.embed_tokens.parameters()]
    if recipe.llm_learning_rate > 0:
        groups.append({"params": list(dict.fromkeys(llm_parameters)), "lr": recipe.llm_learning_rate})
    else:
        for parameter in llm_parameters:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * max(0.02, 1 - step / recipe.steps)
    )
    return optimizer, schedule


def teacher_answers(teacher: Path, texts: list[str]) -> list[str]:
    """The teacher's sampled answers to the transcripts."""
    llm = LlamaForCausalLM.from_pretrained(teacher)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    return chat.answer(llm, tokenizer, texts, temperature=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train-clips", type=int, default=16000)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    paths = {name: arguments.pop(name) for name in ("output", "teacher", "work")}
    spoken = spoken_sets(paths["work"], arguments.pop("train_clips"))
    train_salm(paths["output"], paths["teacher"], paths["work"] / "encoder.pt", spoken, Recipe(**arguments))
