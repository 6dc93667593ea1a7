# SPDX-License-Identifier: Apache-2.0
"""Prompts that a teacher does not answer: too long, or refused by a server, e.g. by its content policy.

One among many is counted and left out. Where nothing else is seen, the settings are wrong and not the prompts.
"""

import threading
from collections.abc import Sequence

MOST_IN_A_ROW = 16  # different prompts that a server refuses, and no answer between them


class Unanswered(str):
    """A completion that is "", as that of a turn that never ended, and says why.

    Args:
        reason: names the rule and not the prompt, so that counts of reasons mean something.
    """

    reason: str

    def __new__(cls, reason: str):
        made = super().__new__(cls, "")
        made.reason = reason
        return made


class Refusals:
    """Counts prompts without an answer. Threads may share it.

    Args:
        section: where the settings of who answers stand in the config, as messages name the keys to change.
    """

    def __init__(self, section: str = "teacher"):
        self.count = 0
        self._section = section
        self._ever_answered, self._problem = False, ""
        self._in_a_row: set[str] = set()
        self._lock = threading.Lock()

    def answered(self) -> None:
        """Note that some prompt had an answer."""
        with self._lock:
            self._ever_answered = True
            self._in_a_row.clear()

    def refuse(self, prompt: str, *, reason: str, problem: str) -> Unanswered:
        """What stands for the answer to a prompt; the log names the prompt, and ``problem``, what is wrong with it."""
        from nemo.utils import logging  # takes seconds to import, and is rarely needed

        with self._lock:
            self.count += 1
            self._problem = problem
            self._in_a_row.add(prompt)
        logging.warning(f"a prompt has no answer, which is counted: {problem}; the prompt: {shown(prompt)}")
        return Unanswered(reason)

    def check_row(self, prompt: str, problem: str) -> None:
        """Raise ValueError if the last ``MOST_IN_A_ROW`` prompts, and this one, were refused."""
        with self._lock:
            num_refused = len(self._in_a_row)
        if num_refused >= MOST_IN_A_ROW:
            raise ValueError(self._hopeless(f"{num_refused} prompts in a row", prompt, problem))

    def check_call(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if these prompts, which were all refused, are several and none was ever answered."""
        num_different = len(set(prompts))
        if num_different > 1 and not self._ever_answered:
            raise ValueError(self._hopeless(f"any of {num_different} prompts", prompts[0], self._problem))

    def _hopeless(self, which: str, prompt: str, problem: str) -> str:
        return (
            f"{self._section}: the model did not answer {which}, so the settings are wrong and not the prompts: "
            f"{problem}; check {self._section}.* and max_new_tokens. The prompt: {shown(prompt)}"
        )


def shown(prompt: str) -> str:
    """A prompt in a message."""
    return repr(prompt if len(prompt) <= 200 else f"{prompt[:120]} ... {prompt[-60:]}")
