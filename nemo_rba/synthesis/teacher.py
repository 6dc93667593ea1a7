# SPDX-License-Identifier: Apache-2.0
"""The teacher: an aligned LLM that reads text, writes instructions and answers, and judges other people's words.

``HFTeacher`` runs a Hugging Face folder in this process. Deltas from ``transformers.generate``: no setting is taken
from the folder's generation_config (no hidden top-k or repetition penalty), randomness belongs to the prompt's place in
the list and the seed (so neither batch size nor sorting changes a text), and finished rows leave the batch.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_rba.synthesis.teacher_folder import SENTINEL, check_hf_folder, end_of_turn, load_hf_model
from nemo_rba.synthesis.unanswered import Refusals
from nemo_rba.types import SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPOKEN = {"enable_thinking": False}  # to templates that know the word (Qwen3): an answer is spoken, thoughts are not


class HFTeacher:
    """A causal LM of a Hugging Face folder. Offers ``protocols.LikelihoodTeacher``.

    Args:
        path: folder with config.json, weights (safetensors), tokenizer and chat template.
        batch_size: prompts per forward pass.
        device: ``cpu``, ``cuda`` (or ``gpu``), ``cuda:1``; ``auto`` spreads the layers over all GPUs that the process
            sees.
        dtype: ``float32``, ``bfloat16`` or ``float16``; log-probabilities are float32 in any case.

    Raises:
        ValueError: folder, tokenizer, chat template or weights missing or incomplete, or an unknown dtype.
    """

    FREE_KEYS = ("batch_size", "device")  # how it is computed: they may change between two runs of one data set

    def __init__(self, *, path: str, batch_size: int, device: str, dtype: str):
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"teacher.batch_size is {batch_size}; expected at least 1")
        if dtype not in DTYPES:
            raise ValueError(f"teacher.dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        self._batch_size, self._device = batch_size, "cuda" if device == "gpu" else device
        self._suppress, self._refusals = None, Refusals()
        self._check_folder(Path(path))
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {path} (teacher.path) has no chat template, so this is a base model; choose an "
                "instruction-tuned one, or put its chat_template.jinja into the folder"
            )
        self._model = self._load_model(Path(path), DTYPES[dtype]).eval()
        if self._device == "auto":
            self._device = self._model.get_input_embeddings().weight.device
        else:
            self._model.to(self._device)
        self._user_end = end_of_turn(self._tokenizer, "user")
        self._stop_ids = self._find_stop_ids()

    def _check_folder(self, path: Path) -> None:
        check_hf_folder(path)

    def _load_model(self, path: Path, dtype: torch.dtype) -> torch.nn.Module:
        return load_hf_model(str(path), dtype, device_map="auto" if self._device == "auto" else None)

    def render(self, messages: Sequence[dict[str, str]], *, open_turn: str) -> str:
        """Chat text of ``messages`` with the turn of role ``open_turn`` (``user`` or ``assistant``) left open."""
        if open_turn == "assistant":
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **SPOKEN
            )
        if open_turn != "user":
            raise ValueError(f"open_turn is {open_turn!r}; expected 'user' or 'assistant'")
        if self._user_end is None:
            raise ValueError(
                "this teacher's chat template does not close the user's turn with a special token, so it cannot say "
                "when an instruction ends; choose another teacher.path for sampling instructions"
            )
        opened = [*messages, {"role": "user", "content": SENTINEL}]
        return self._tokenizer.apply_chat_template(opened, tokenize=False, **SPOKEN).partition(SENTINEL)[0]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """One completion per rendered prompt, cut before the end of the turn; "" if the turn never ended.

        A prompt that is too long gets ``Unanswered``, which is "" too; ValueError where several are, and nothing else.
        """
        if not 0 < params.top_p <= 1 or params.temperature < 0 or params.max_new_tokens < 1:
            raise ValueError(f"{params}: expected 0 < top_p <= 1, temperature >= 0 and max_new_tokens >= 1")
        rows = self._tokenize(prompts)
        generator = torch.Generator().manual_seed(params.seed)
        draws = torch.rand(len(rows), params.max_new_tokens, generator=generator).to(self._device)  # (N, T)
        completions = self._refuse_long(prompts, rows, room=params.max_new_tokens)
        fitting = [i for i, refused in enumerate(completions) if refused is None]
        for places in self._batches([len(rows[i]) for i in fitting]):
            batch = [fitting[place] for place in places]
            written = self._decode_batch([rows[i] for i in batch], draws[batch], params)
            texts = self._tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i, text in zip(batch, texts, strict=True):
                completions[i] = text.strip()
        return completions

    def without_openings(self, openings: Sequence[str]) -> "HFTeacher":
        """This teacher, but nothing that it writes begins with a token that is one of ``openings``, e.g. ``##``.

        Blanks around a token's text do not count. Magpie's authors keep markdown out of instructions like that
        (arXiv 2406.08464; the logits processors of their code).

        Raises:
            ValueError: an opening that is no token, and does not begin with another of them.
        """
        from transformers import SuppressTokensAtBeginLogitsProcessor

        ids = [[index] for index in range(len(self._tokenizer))]
        texts = [text.strip() for text in self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]
        for opening in openings:
            pieces = self._tokenizer(opening, add_special_tokens=False)["input_ids"]
            if opening not in texts and (not pieces or texts[pieces[0]] not in openings):
                raise ValueError(f"sampler.suppressed_openings has {opening!r}, which is no token of the teacher (it "
                                 f"reads {[texts[piece] for piece in pieces]}); leave it out")  # fmt: skip
        suppressed = [index for index, text in enumerate(texts) if text in openings]
        teacher = copy.copy(self)
        teacher._suppress = SuppressTokensAtBeginLogitsProcessor(suppressed, 0, device=str(self._device))
        return teacher

    def vocabulary(self) -> dict[str, int]:
        """Token string -> id; see ``check_same_vocabulary``."""
        return self._tokenizer.get_vocab()

    def logprobs(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        """Log-probability of each token of ``responses[i]`` (T_i,) after ``prompts[i]``: (T_i,) float32, on the CPU."""

        def of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
            return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)

        return self._score(prompts, responses, of_tokens)

    def topk_logprobs(self, prompts: Sequence[str], responses: Sequence[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
        """The k likeliest tokens before each token: ids (T_i, K) and float32 log-probabilities (T_i, K), on the CPU."""
        size = min(
            self._vocabulary_size, 1 + max(self.vocabulary().values())
        )  # rows that pad the embedding are no words
        if not 1 <= k <= size:
            raise ValueError(f"asked for the {k} likeliest of {size} tokens; lower the objective's teacher_topk")

        def of_candidates(logits: Tensor, _ids: Tensor) -> tuple[Tensor, Tensor]:
            values, ids = logits[..., :size].topk(k, dim=-1)
            return ids.cpu(), (values - logits.logsumexp(-1, keepdim=True)).cpu()

        return self._score(prompts, responses, of_candidates)

    @property
    def _vocabulary_size(self) -> int:
        return self._model.get_output_embeddings().weight.shape[0]

    @torch.inference_mode()
    def _score(self, prompts: Sequence[str], responses: Sequence[Tensor], of_row) -> list:
        """``of_row(logits (T_i, V) float32, ids (T_i,))`` for every response, in the order given."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; expected as many")
        longest = max((len(ids) for ids in responses), default=0)
        rows = self._encode(prompts, room=longest)
        self._check_ids(responses)
        results: list = [None] * len(rows)
        for batch in self._batches([len(rows[i]) + len(responses[i]) for i in range(len(rows))]):
            tails = [responses[i].to(self._device) for i in batch]
            logits = self._response_logits([rows[i] for i in batch], tails)
            for i, ids, row_logits in zip(batch, tails, logits, strict=True):
                result = of_row(row_logits[: len(ids)].float(), ids)
                results[i] = result.cpu() if isinstance(result, Tensor) else result
        return results

    def _response_logits(self, rows: list[list[int]], tails: list[Tensor]) -> Tensor:
        """(B, T, V) logits before each response token. Prompts are padded left and responses right, so that all
        responses begin in one column and nothing but their positions passes through the LM head."""
        ids, mask = self._pad_left(rows)  # (B, P)
        tail = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True, padding_value=self._pad_id)  # (B, T)
        lengths = torch.tensor([len(t) for t in tails], device=self._device)
        tail_mask = torch.arange(tail.shape[1], device=self._device) < lengths[:, None]
        mask = torch.cat([mask, tail_mask.long()], dim=1)
        output = self._model(
            input_ids=torch.cat([ids, tail], dim=1),
            attention_mask=mask,
            position_ids=_positions(mask),
            use_cache=False,
            logits_to_keep=tail.shape[1] + 1,
        )
        return output.logits[:, :-1]

    def _decode_batch(self, rows: list[list[int]], draws: Tensor, params: SamplingParams) -> list[list[int]]:
        """Token ids written after each row, without the stop token; [] where it never came."""
        from transformers import DynamicCache

        written: list[list[int]] = [[] for _ in rows]
        finished = set()
        alive = torch.arange(len(rows), device=self._device)  # rows still in the batch
        stop = torch.tensor(sorted(self._stop_ids), device=self._device)
        ids, mask = self._pad_left(rows)
        positions, cache = _positions(mask), DynamicCache()
        for step in range(params.max_new_tokens):
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            if self._suppress is not None:
                logits = self._suppress(ids.new_empty(len(ids), step), logits)  # it looks at how many were written
            token = _sample(logits.float(), draws[alive, step], params)  # (rows alive,)
            stopped = torch.isin(token, stop)
            for row, value, is_stop in zip(alive.tolist(), token.tolist(), stopped.tolist(), strict=True):
                finished.add(row) if is_stop else written[row].append(value)
            keep = torch.nonzero(~stopped)[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                cache.batch_select_indices(keep)
                alive, token, mask, positions = alive[keep], token[keep], mask[keep], positions[keep]
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return [tokens if row in finished else [] for row, tokens in enumerate(written)]

    def _tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, whose text already holds every special token."""
        return self._tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []

    def _encode(self, prompts: Sequence[str], *, room: int) -> list[list[int]]:
        """Token ids of prompts that must all fit, with ``room`` tokens more."""
        rows = self._tokenize(prompts)
        longest = max((len(row) for row in rows), default=0)
        if problem := self._too_long(longest, room):
            raise ValueError(f"{problem}; lower max_new_tokens or shorten the context")
        return rows

    def _too_long(self, length: int, room: int) -> str:
        limit = self._tokenizer.model_max_length
        if length + room <= limit:
            return ""
        return f"a prompt of {length} tokens and a response of up to {room} do not fit the teacher's {limit} tokens"

    def _refuse_long(self, prompts: Sequence[str], rows: list[list[int]], *, room: int) -> list[str | None]:
        """What stands for the answers to prompts that do not fit; None for the others."""
        if problem := self._too_long(1, room):
            raise ValueError(f"{problem}; lower max_new_tokens")
        found: list[str | None] = [None] * len(rows)
        for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if problem := self._too_long(len(row), room):
                reason = "the prompt is too long for the teacher"
                found[place] = self._refusals.refuse(prompt, reason=reason, problem=problem)
            else:
                self._refusals.answered()
        if found and None not in found:
            self._refusals.check_call(prompts)
        return found

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices in batches of similar length, the longest first, so that memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def _pad_left(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self._device)
        return ids, mask

    @property
    def _pad_id(self) -> int:
        return min(self._stop_ids)  # always masked, so any valid id serves, and not every tokenizer has a pad token

    def _check_ids(self, responses: Sequence[Tensor]) -> None:
        size = self._vocabulary_size
        for ids in responses:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(f"a response has token id {int(ids.max())}, but the teacher has {size} tokens; they "
                                 "must share a vocabulary (check_same_vocabulary)")  # fmt: skip

    def _find_stop_ids(self) -> set[int]:
        stops = {self._user_end, end_of_turn(self._tokenizer, "assistant"), self._tokenizer.eos_token_id} - {None}
        if not stops:
            raise ValueError("the teacher's tokenizer has no end-of-turn token and no eos_token; set eos_token in its "
                             "tokenizer_config.json")  # fmt: skip
        return stops


def _sample(logits: Tensor, draws: Tensor, params: SamplingParams) -> Tensor:
    """logits (B, V), uniform draws (B,) -> token ids (B,), by inversion over the nucleus; greedy at temperature 0."""
    if params.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / params.temperature).softmax(-1)
    if params.top_p == 1:
        cumulative = probabilities.cumsum(-1)
        return (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)
    probabilities, ids = probabilities.sort(-1, descending=True)
    cumulative = probabilities.cumsum(-1)
    size = ((cumulative - probabilities) < params.top_p).sum(-1, keepdim=True)  # tokens in the nucleus
    mass = cumulative.gather(-1, size - 1)
    chosen = (cumulative <= draws[:, None] * mass).sum(-1, keepdim=True).minimum(size - 1)
    return ids.gather(-1, chosen)[:, 0]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)
