# SPDX-License-Identifier: Apache-2.0
"""Rewards that read an answer's words. Each gives (N,) finite float32, higher is better, on the CPU.

The teacher's answer is ``rollout.instruction.response``. A group often repeats itself: equal pairs are scored once.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence

import sacrebleu
import torch
from sacrebleu.metrics import BLEU
from torch import Tensor
from torchmetrics.functional.text import word_error_rate
from torchmetrics.functional.text.rouge import rouge_score

from nemo_rba.types import Rollout

BLEU_TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = str.maketrans("‘’ʼ", "'''")


class ChrF:
    """Character n-gram F-score to the teacher's answer, sentence level, in [0, 1] (Popovic 2015, sacrebleu)."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        pairs = [(_teacher_answer(rollout, self), rollout.response) for rollout in rollouts]
        return _score_once(lambda answer, response: sacrebleu.sentence_chrf(response, [answer]).score / 100, pairs)


class Bleu:
    """BLEU of a single answer to the teacher's, in [0, 1] (sacrebleu: exponential smoothing, orders the answer has).

    Args:
        tokenize: a tokenizer of sacrebleu's that needs no download: "13a" for spaced scripts, "zh", "ja-mecab" and
            "ko-mecab" for Chinese, Japanese and Korean, "char", "intl" or "none".

    Raises:
        ValueError: there is no such tokenizer, or sacrebleu lacks what it needs.
    """

    def __init__(self, *, tokenize: str):
        if tokenize not in BLEU_TOKENIZERS:
            raise ValueError(
                f"tokenize must be one of {BLEU_TOKENIZERS}, got {tokenize!r}: change tokenize of the BLEU reward"
            )
        try:
            self._bleu = BLEU(tokenize=tokenize, effective_order=True)
        except RuntimeError as error:
            raise ValueError(f"tokenize {tokenize!r} of the BLEU reward: {error}") from None

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        pairs = [(_teacher_answer(rollout, self), rollout.response) for rollout in rollouts]
        return _score_once(lambda answer, response: self._bleu.sentence_score(response, [answer]).score / 100, pairs)


class ExactMatch:
    """1 if the answer is the teacher's but for case, punctuation, spacing and Unicode form, else 0."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        pairs = [(_teacher_answer(rollout, self), rollout.response) for rollout in rollouts]
        return _score_once(lambda answer, response: float(normalize(answer) == normalize(response)), pairs)


class AnswerMatch:
    """1 if the teacher's answer, or an alias of it, stands in the answer as whole words, else 0.

    The match of LlamaQuestions and of SpeechLM work on spoken TriviaQA and WebQuestions, where an answer is a sentence
    around the fact. Both are normalised as for SQuAD's exact match (``normalize_answer``), so that what matches exactly
    is contained. Words that punctuation joins may also stand apart, as for TriviaQA's: "twenty five" in "twenty-five";
    and the a of "vitamin A" is no article, or vitamin C would do. ``max_words`` bounds the sentence, or naming
    everything would be the best policy.
    """

    def __init__(self, *, max_words: int):
        if max_words < 1:
            raise ValueError(f"max_words must be 1 or more, got {max_words}: change max_words of the answer match")
        self.max_words = max_words

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([float(self._matches(rollout)) for rollout in rollouts])

    def _matches(self, rollout: Rollout) -> bool:
        if len(normalize(rollout.response).split()) > self.max_words:
            return False
        right = (_teacher_answer(rollout, self), *rollout.instruction.aliases)
        return any(_stands_in(answer, rollout.response) for answer in right)


class RougeL:
    """ROUGE-L F-measure to the teacher's answer: longest common subsequence of words, in [0, 1] (Lin 2004).

    Words of every script, without case and punctuation; the reference implementation drops all but a-z and 0-9.
    """

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        pairs = [(_teacher_answer(rollout, self), rollout.response) for rollout in rollouts]
        return _score_once(_rouge_l, pairs)


class WordAccuracy:
    """1 - word error rate to the teacher's answer, at least 0: the reward of a transcription task (MWER 1712.01818)."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        pairs = [(normalize(_teacher_answer(rollout, self)), normalize(rollout.response)) for rollout in rollouts]
        return _score_once(_word_accuracy, pairs)


class VerifierReward:
    """A program judges: answer match with aliases, IFEval-style constraints, unit tests.

    Args:
        verify: (words of the instruction, answer) -> score, a deterministic function.
    """

    def __init__(self, *, verify: Callable[[str, str], float]):
        if not callable(verify):
            raise ValueError(
                f"verify must be a function (instruction, response) -> score, got {verify!r}: change reward.verify, "
                "e.g. {_target_: hydra.utils.get_method, path: my_package.verify}"
            )
        self.verify = verify

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return _score_once(self.verify, [(rollout.instruction.text, rollout.response) for rollout in rollouts])


class LengthPenalty:
    """0 up to ``max_words`` words, then falling linearly to -1 at twice as many, where it stays."""

    def __init__(self, *, max_words: int):
        if max_words < 1:
            raise ValueError(f"max_words must be 1 or more, got {max_words}: change max_words of the length penalty")
        self.max_words = max_words

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        words = torch.tensor([len(rollout.response.split()) for rollout in rollouts], dtype=torch.float32)
        return -((words - self.max_words) / self.max_words).clamp(0, 1)


class OverlongPenalty:
    """Soft overlong punishment (DAPO 2503.14476, equation 13), in tokens with the end of turn, in [-1, 0].

    0 up to ``max_tokens - margin`` tokens, falling linearly to -1 at ``max_tokens``, and -1 for what was cut off.

    Args:
        max_tokens: the longest answer, ``rollouts.max_new_tokens``.
        margin: over how many tokens the penalty grows.
    """

    def __init__(self, *, max_tokens: int, margin: int):
        if not 1 <= margin <= max_tokens:
            raise ValueError(
                f"margin must be between 1 and max_tokens ({max_tokens}), got {margin}: change margin of the overlong "
                "penalty"
            )
        self.max_tokens, self.margin = max_tokens, margin

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], dtype=torch.float32)
        truncated = torch.tensor([rollout.truncated for rollout in rollouts])
        return torch.where(truncated, -1.0, -((lengths - self.max_tokens + self.margin) / self.margin).clamp(0, 1))


class TruncationPenalty:
    """-1 for an answer cut off at ``max_new_tokens``, else 0."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([-1.0 if rollout.truncated else 0.0 for rollout in rollouts])


def normalize(text: str) -> str:
    """Case-folded NFKC words, without punctuation, one space between them."""
    words = re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words.split())


def normalize_answer(text: str) -> str:
    """Words of a short answer as SQuAD compares them (arXiv 1606.05250; torchmetrics' ``squad``).

    Small letters, without ASCII punctuation, the articles a, an and the, and superfluous spaces. Beyond SQuAD: NFKC,
    punctuation of other scripts becomes spaces and curly apostrophes are apostrophes, and where nothing but articles is
    there, as of the band The The, they stay.
    """
    words = _words(text, between="")
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def _words(text: str, *, between: str) -> list[str]:
    """Small letters; ``between`` in the place of ASCII punctuation, spaces in that of others."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(_APOSTROPHES)
    plain = "".join(between if letter in string.punctuation else letter for letter in plain)
    return "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in plain).split()


def _stands_in(right: str, answer: str) -> bool:
    """Whether ``answer`` holds ``right`` as whole words, whatever articles stand between them."""
    if normalize_answer(right) == normalize_answer(answer) != "":
        return True
    for between in ("", " "):
        words = _words(right, between=between)
        needed = [word for word in words[:-1] if word not in _ARTICLES] + words[-1:]
        pattern = "(?: (?:a|an|the))* ".join(map(re.escape, needed))
        if needed and re.search(rf"(?:^| ){pattern}(?: |$)", " ".join(_words(answer, between=between))):
            return True
    return False


def _rouge_l(answer: str, response: str) -> float:
    scores = rouge_score(response, answer, rouge_keys="rougeL", normalizer=normalize, tokenizer=str.split)
    return float(scores["rougeL_fmeasure"])


def _word_accuracy(answer: str, response: str) -> float:
    if not answer:  # it was nothing but punctuation
        return float(not response)
    return max(0.0, 1 - float(word_error_rate(response, answer)))


def _score_once(score: Callable[[str, str], float], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """``score`` of every pair (N,), called once for equal pairs."""
    scores = {pair: float(score(*pair)) for pair in dict.fromkeys(pairs)}
    return torch.tensor([scores[pair] for pair in pairs], dtype=torch.float32)


def _teacher_answer(rollout: Rollout, reward: object) -> str:
    if not rollout.instruction.response:
        raise ValueError(
            f"{type(reward).__name__} compares with the teacher's answer, but instruction "
            f"{rollout.instruction.id!r} has response '': let the teacher answer before alignment (rba_synthesize.py), "
            "or drop this part from the config group reward"
        )
    return rollout.instruction.response
