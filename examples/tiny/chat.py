# SPDX-License-Identifier: Apache-2.0
"""Decoding with the tiny text LLM, and its score on the domain."""

from collections import defaultdict
from collections.abc import Sequence
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import domain
from .tokenizer import TURN_END, TURN_START, chat_text

MAX_ANSWER_TOKENS = 30


@torch.no_grad()
def complete(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    batch_size: int = 200,
) -> list[str]:
    """One completion per prompt text, cut before the end of the turn; "" if the turn never ended."""
    llm.eval()
    tokenizer.padding_side = "left"
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    completions = []
    for first in range(0, len(prompts), batch_size):
        inputs = tokenizer(list(prompts[first : first + batch_size]), return_tensors="pt", padding=True)
        output = llm.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        completions += [cut_turn(tokenizer, row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    return completions


def cut_turn(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Text before the end of the turn; "" if it never ended."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)]) if end in ids else ""


def answer(llm, tokenizer, instructions: Sequence[str], *, temperature: float = 0.0) -> list[str]:
    """The assistant's answers to typed requests."""
    return complete(llm, tokenizer, [chat_text(text) for text in instructions], temperature=temperature)


def sample_instructions(llm, tokenizer, count: int, *, temperature: float = 1.0) -> list[str]:
    """What the LLM thinks a user would say: samples from the empty user turn (Magpie, arXiv 2406.08464)."""
    prompts = [f"{TURN_START}user\n"] * count
    return complete(llm, tokenizer, prompts, temperature=temperature, max_new_tokens=24)


def score(instructions: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Percent right: per family, "closed", "open", and "all"."""
    marks = defaultdict(list)
    for text, response in zip(instructions, responses, strict=True):
        mark = domain.verify(text, response)
        for group in ("all", domain.kind_of(text), f"task/{domain.task_of(text)}"):
            marks[group].append(mark)
    return {group: round(100 * sum(values) / len(values), 1) for group, values in sorted(marks.items())}


def held_out_items(split: str, count: int, seed: int) -> list[domain.Item]:
    """Distinct requests of a split, half closed and half open."""
    rng, items = Random(seed), {}
    room = {"closed": (count + 1) // 2, "open": count // 2}
    while any(room.values()):
        item = domain.sample_split(rng, split)
        if room[item.kind] and item.instruction not in items:
            items[item.instruction] = item
            room[item.kind] -= 1
    return list(items.values())


__all__ = ["TURN_END", "answer", "complete", "cut_turn", "held_out_items", "sample_instructions", "score"]
