# SPDX-License-Identifier: Apache-2.0
"""Filters that score an answer: by the teacher's own probability of it, or by any reward.

A score costs a pass of a model and need not come out the same twice (another GPU, another batch), while a resumed run
must drop what the first one dropped. So scores can be kept in a file, ``memory``, and are looked up there first.
Filters that hold a model are copied without it, as ``SelfSynthesis`` copies its filters for every run.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_rba.functional import typed, user_prompt
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import LikelihoodTeacher, RewardFunction
from nemo_rba.synthesis.teacher_folder import check_same_vocabulary, end_of_turn
from nemo_rba.types import Instruction, Rollout

Encode = Callable[[str], Sequence[int]]


class AnswerEncoder:
    """An answer as a teacher of a Hugging Face folder would have written it: token ids with the end of turn.

    Args:
        path: the teacher's folder.

    Raises:
        ValueError: no tokenizer with a chat template there.
    """

    def __init__(self, *, path: str):
        from transformers import AutoTokenizer

        if not (Path(path) / "tokenizer_config.json").is_file():
            raise ValueError(f"AnswerEncoder: no tokenizer in path={path!r}; give the teacher's folder (teacher.path)")
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not self._tokenizer.chat_template:
            raise ValueError(f"AnswerEncoder: the tokenizer in path={path!r} has no chat template; give a teacher's")
        end = end_of_turn(self._tokenizer, "assistant")
        self._end = self._tokenizer.eos_token_id if end is None else end

    def __call__(self, answer: str) -> list[int]:
        """Ids of the answer and of the end of turn."""
        return [*self._tokenizer(answer.strip(), add_special_tokens=False)["input_ids"], self._end]

    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, to compare with the teacher's."""
        return self._tokenizer.get_vocab()


class TeacherScoreFilter:
    """Drops answers whose mean log-probability a token under the teacher is below ``minimum``.

    Perplexity as a measure of data quality: arXiv 2309.04564 (pruning for pretraining), 2308.12032 (instructions). A
    teacher's own answers score high; what this finds are tails of hot sampling and, with a judge other than the writer,
    answers that the judge would not give. An empty answer scores minus infinity.

    Args:
        teacher: who judges; needs likelihoods, which hosted teachers do not offer. Left out of a YAML with
            ``_partial_: true``, it is the one who writes.
        minimum: lowest mean log-probability to keep, in nats, below 0, e.g. -2.
        encode: answer -> ids of the teacher's tokens with the end of turn: ``AnswerEncoder`` of the teacher's folder.
            None = ``teacher.encode_response``, where it has one.
        memory: JSONL file that keeps the scores, in the data set's own folder; "" = none.

    Raises:
        ValueError: a minimum out of range, a teacher that does not judge, ids that are not the teacher's.
    """

    name = "teacher score"

    def __init__(self, *, teacher: LikelihoodTeacher, minimum: float, encode: Encode | None = None, memory: str = ""):
        if not -math.inf < minimum < 0:
            raise ValueError(f"TeacherScoreFilter: minimum={minimum}; expected a finite number of nats below 0")
        if not hasattr(teacher, "logprobs"):
            raise ValueError(f"TeacherScoreFilter: teacher={type(teacher).__name__} has no logprobs; expected a "
                             "teacher that judges, such as HFTeacher: a hosted one only writes")  # fmt: skip
        encode = getattr(teacher, "encode_response", None) if encode is None else encode
        if encode is None:
            raise ValueError(f"TeacherScoreFilter: teacher={type(teacher).__name__} has no encode_response, and "
                             "encode is None; set encode to {_target_: nemo_rba.synthesis.filters_quality.AnswerEncoder"
                             ", path: <the teacher's folder>}")  # fmt: skip
        if hasattr(encode, "vocabulary"):
            check_same_vocabulary(teacher.vocabulary(), encode.vocabulary())
        self._teacher, self._minimum, self._encode, self._memory = teacher, minimum, encode, memory
        self._scores = ScoreMemory(memory)

    def __deepcopy__(self, memo: dict) -> "TeacherScoreFilter":
        """A new filter with the same teacher, whose weights must not be copied."""
        return TeacherScoreFilter(teacher=self._teacher, minimum=self._minimum, encode=self._encode,
                                  memory=self._memory)  # fmt: skip

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        return self.reasons([instruction])[0]

    def reasons(self, instructions: Sequence[Instruction]) -> list[str | None]:
        """``reason`` of each, in one call of the teacher."""
        scores = self._scores.look_up(instructions, self._score)
        return [None if score >= self._minimum else f"below {self._minimum:g} nats a token" for score in scores]

    def _score(self, instructions: Sequence[Instruction]) -> list[float]:
        scores = [-math.inf] * len(instructions)
        answered = [n for n, instruction in enumerate(instructions) if instruction.response.strip()]
        prompts = [user_prompt(self._teacher, typed(instructions[n])) for n in answered]
        ids = [torch.tensor(list(self._encode(instructions[n].response)), dtype=torch.int64) for n in answered]
        logprobs = self._teacher.logprobs(prompts, ids) if answered else []
        for n, tokens in zip(answered, logprobs, strict=True):
            scores[n] = float(tokens.float().mean())
        return scores


class RewardFilter:
    """Drops answers that a reward model, or any ``protocols.RewardFunction``, scores below ``minimum``.

    Magpie (arXiv 2406.08464, section 3) keeps what a reward model likes in this way.

    Args:
        reward: scores rollouts; sees instruction and answer, and token ids only with ``encode``.
        minimum: lowest score to keep, on the reward's own scale.
        encode: answer -> token ids, for rewards that look at tokens; None gives them none.
        memory: JSONL file that keeps the scores, in the data set's own folder; "" = none.
    """

    name = "reward"

    def __init__(self, *, reward: RewardFunction, minimum: float, encode: Encode | None = None, memory: str = ""):
        if not math.isfinite(minimum):
            raise ValueError(f"RewardFilter: minimum={minimum}; expected a finite number")
        self._reward, self._minimum, self._encode, self._memory = reward, minimum, encode, memory
        self._scores = ScoreMemory(memory)

    def __deepcopy__(self, memo: dict) -> "RewardFilter":
        """A new filter with the same reward, whose weights must not be copied."""
        return RewardFilter(reward=self._reward, minimum=self._minimum, encode=self._encode, memory=self._memory)

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        return self.reasons([instruction])[0]

    def reasons(self, instructions: Sequence[Instruction]) -> list[str | None]:
        """``reason`` of each, in one call of the reward."""
        scores = self._scores.look_up(instructions, self._score)
        return [None if score >= self._minimum else f"below {self._minimum:g}" for score in scores]

    def _score(self, instructions: Sequence[Instruction]) -> list[float]:
        encode = self._encode or (lambda _: ())
        rollouts = [
            Rollout(
                prompt_index=row,
                instruction=instruction,
                response=instruction.response,
                token_ids=torch.tensor(list(encode(instruction.response)), dtype=torch.int64),
                logprobs=None,
                truncated=False,
            )
            for row, instruction in enumerate(instructions)
        ]
        return [float(score) for score in self._reward(rollouts)]


class ScoreMemory:
    """Scores by what was scored, see ``Memory``; in no file where ``path`` is ""."""

    def __init__(self, path: str):
        self._memory = Memory(path=path, owner={"holds": "scores of answers"})

    def look_up(
        self, instructions: Sequence[Instruction], compute: Callable[[Sequence[Instruction]], list[float]]
    ) -> list[float]:
        """The score of each: from memory where it is known, else from ``compute``, once for each different item."""
        keys = [fingerprint(item.context, item.text, item.response) for item in instructions]
        unknown = {key: item for key, item in zip(keys, instructions, strict=True) if key not in self._memory}
        if unknown:
            computed = compute(list(unknown.values()))
            for item, score in zip(unknown.values(), computed, strict=True):
                if math.isnan(score):
                    raise ValueError(f"the score of {item.text[:60]!r} is nan; expected a number: check the judge")
            self._memory.keep(dict(zip(unknown, computed, strict=True)))
        return [self._memory[key] for key in keys]
