# SPDX-License-Identifier: Apache-2.0
"""Train the text teacher: a small Llama on whole chats, so that it can both ask (empty user turn) and answer."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import chat, domain
from .tokenizer import UNKNOWN, build_tokenizer, chat_text, save_tokenizer

BATCH_SIZE = 48
BATCHES_PER_POOL = 16  # batches are cut from a pool sorted by length, to save padding
PEAK_LEARNING_RATE = 2.5e-3
WARMUP_STEPS = 150
USER_WEIGHT = 0.2  # of the loss on the user's words: they are drawn at random, the answers follow from them
TRANSCRIBE_SHARE = 0.1
HESITANT_SHARE = 0.6  # of the transcription requests: words repeated, pauses between them
RANDOM_WORDS_SHARE = 0.4  # of the transcription requests: words in no order


def build_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.8 M parameters."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def hesitate(rng: Random, words: list[str]) -> str:
    """The words as a slow speaker says them: some said twice in a row, pauses before, between and after."""
    heard = [UNKNOWN] * rng.randrange(4)
    for word in words:
        heard += [word] * rng.choice([1, 1, 2]) + [UNKNOWN] * rng.randrange(5)
        if heard[-1] != UNKNOWN and rng.random() < 0.7:
            heard.append(UNKNOWN)
    return " ".join(heard)


def transcription_request(rng: Random, spoken: list[str]) -> tuple[str, str]:
    """ "transcribe <words>" and the words, which are no request of the dev or test split."""
    if rng.random() < RANDOM_WORDS_SHARE:
        words = rng.choices(spoken, k=rng.randrange(2, 14))
    else:
        words = domain.sample_split(rng, "train").instruction.split()
    heard = hesitate(rng, words) if rng.random() < HESITANT_SHARE else " ".join(words)
    return f"{domain.TRANSCRIBE} {heard}", " ".join(words)


def training_example(rng: Random, tokenizer, spoken: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one chat, and the weight of each in the loss.

    The user's turn is learnt too, except for transcription: nobody asks for that unprompted.
    """
    transcribe = rng.random() < TRANSCRIBE_SHARE
    if transcribe:
        user, assistant = transcription_request(rng, spoken)
    else:
        item = domain.sample_split(rng, "train")
        user, assistant = item.instruction, item.reference
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(chat_text(user, assistant)).ids)
    weights = torch.ones(len(ids))
    weights[: len(tokenizer.backend_tokenizer.encode(chat_text(user)).ids)] = 0.0 if transcribe else USER_WEIGHT
    return ids, weights


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy of every token after the first."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def batches(rng: Random, tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches without end."""
    spoken, _ = domain.vocabulary()
    while True:
        pool = [training_example(rng, tokenizer, spoken) for _ in range(BATCH_SIZE * BATCHES_PER_POOL)]
        pool.sort(key=lambda example: len(example[0]))
        chunks = [pool[first : first + BATCH_SIZE] for first in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(chunks)
        for chunk in chunks:
            ids, weights = zip(*chunk, strict=True)
            yield (
                pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
                pad_sequence(weights, batch_first=True),
            )


def evaluate(llm, tokenizer, split: str, count: int, seed: int = 11) -> dict:
    """Greedy and sampled scores on held-out requests, and how well the LLM asks and repeats."""
    texts = [item.instruction for item in chat.held_out_items(split, count, seed)]
    asked = chat.sample_instructions(llm, tokenizer, count)
    repeats = chat.answer(llm, tokenizer, [f"{domain.TRANSCRIBE} {text}" for text in texts])
    return {
        "greedy": chat.score(texts, chat.answer(llm, tokenizer, texts)),
        "sampled": chat.score(texts, chat.answer(llm, tokenizer, texts, temperature=1.0)),
        "well_formed_requests": round(100 * sum(domain.parse(text) is not None for text in asked) / count, 1),
        "distinct_requests": round(100 * len(set(asked)) / count, 1),
        "repeated_exactly": round(100 * sum(a == b for a, b in zip(texts, repeats, strict=True)) / count, 1),
    }


def train_teacher(output: Path, *, steps: int, seed: int) -> LlamaForCausalLM:
    """Train and save; returns the model."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    llm = build_llm(tokenizer)
    print(f"teacher: {sum(p.numel() for p in llm.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(llm.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 - step / steps) + 1e-3
    )
    began = time.time()
    stream = batches(Random(seed), tokenizer)
    for step in range(1, steps + 1):
        llm.train()
        ids, weights = next(stream)
        loss = weighted_loss(llm(input_ids=ids, use_cache=False).logits, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 1000 == 0 or step == steps:
            figures = evaluate(llm, tokenizer, "dev", 200)
            print(f"step {step} {time.time() - began:.0f} s loss {loss.item():.3f} {json.dumps(figures)}", flush=True)
            save_teacher(llm, tokenizer, output)
    return llm


def save_teacher(llm: LlamaForCausalLM, tokenizer, output: Path) -> None:
    """Write a Hugging Face folder without machine paths."""
    llm.config._name_or_path = ""
    llm.config.architectures = ["LlamaForCausalLM"]
    llm.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=chat.MAX_ANSWER_TOKENS
    )
    llm.save_pretrained(output)
    save_tokenizer(tokenizer, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_teacher(arguments.output, steps=arguments.steps, seed=arguments.seed)
