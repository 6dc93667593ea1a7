# SPDX-License-Identifier: Apache-2.0
"""IFEval (arXiv 2311.07911): does an answer keep the constraints of its request that a program can check?

The verifiers are those of the paper's authors, as lm-evaluation-harness keeps them (``pip install 'lm_eval[ifeval]'``).
They need NLTK's English sentence model, which pip does not bring: ``python -m nltk.downloader punkt_tab``, once, with a
connection; ``NLTK_DATA`` names the folder for machines without one. Both are asked for before the first answer.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from nemo_rba.evaluation.measures import MEAN_OF, Statistics
from nemo_rba.evaluation.tasks import MeasuredTask
from nemo_rba.functional import typed
from nemo_rba.types import Instruction, SpeechBatch

LEVELS = ("prompt", "instruction")
CRITERIA = ("strict", "loose")
PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk")
VOICEBENCH = f"{MEAN_OF}all four|as:VoiceBench"
SENTENCE_MODEL = "tokenizers/punkt_tab/english/"


class IFEvalTask(MeasuredTask):
    """Share of requests with all constraints kept ("prompt"), or of constraints kept ("instruction"), in percent.

    ``instruction.extra`` holds ``instruction_id_list`` and ``kwargs`` as google/IFEval and VoiceBench publish them.
    Each level is measured strictly and loosely: the latter forgives Markdown's asterisks and a first or last line, such
    as "Sure, here it is:". All four are reported, and VoiceBench's one number, which is their mean.

    The verifiers draw a number where a constraint lacks one, or its letter is none (published items ask for "#"), and
    langdetect guesses by drawing: both are seeded here, so that an answer keeps its score.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        level, criterion: the task's own measure, "prompt" or "instruction", "strict" or "loose".

    Raises:
        ValueError: a setting is not one of these, or the sentence model is missing.
        ImportError: lm_eval, or a package of its extra, is missing.
    """

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        level: str,
        criterion: str,
        kinds: Mapping[str, str],
    ):
        super().__init__(name=name, batches=batches, kinds=kinds)
        if level not in LEVELS or criterion not in CRITERIA:
            raise ValueError(
                f"level is {level!r} and criterion {criterion!r}; expected one of {', '.join(LEVELS)} and one of "
                f"{', '.join(CRITERIA)}: change task.level or task.criterion"
            )
        names = [f"{its_level}, {its_criterion}" for its_criterion in CRITERIA for its_level in LEVELS]
        own = f"{level}, {criterion}"
        self._names = [own, *(other for other in names if other != own)]
        self._registry, self._library = _load_verifiers()

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        example = self._example(instruction)
        verifiers = {
            "strict": self._library.test_instruction_following_strict,
            "loose": self._library.test_instruction_following_loose,
        }
        found = {}
        for criterion, verify in verifiers.items():
            try:
                with _seeded(instruction.id):
                    kept = verify(example, response).follow_instruction_list
            except (TypeError, ValueError, re.error) as error:
                raise ValueError(
                    f"task {self.name!r}: item {instruction.id!r} has constraints {example.instruction_id_list} with "
                    f"kwargs {example.kwargs} that their verifiers refuse ({error}): change the manifest"
                ) from error
            found[f"prompt, {criterion}"] = [100.0 * all(kept), 1.0]
            found[f"instruction, {criterion}"] = [100.0 * sum(kept), float(len(kept))]
        all_four = [number for name in sorted(found) for number in found[name]]
        return {name: found[name] for name in self._names} | {VOICEBENCH: all_four}

    def _example(self, instruction: Instruction):
        """The item as lm_eval takes it."""
        ids, kwargs = (instruction.extra.get(key) for key in ("instruction_id_list", "kwargs"))
        if not ids or not isinstance(kwargs, list) or len(kwargs) != len(ids):
            raise ValueError(
                f"task {self.name!r}: item {instruction.id!r} has extra.instruction_id_list {ids!r} and extra.kwargs "
                f"{kwargs!r}, expected two lists of the same length, as in google/IFEval: write them into the manifest"
            )
        unknown = sorted(set(ids) - set(self._registry))
        if unknown:
            raise ValueError(
                f"task {self.name!r}: item {instruction.id!r} asks for {unknown}; known constraints: "
                f"{sorted(self._registry)}: change the manifest"
            )
        kwargs = [given or {} for given in kwargs]
        return self._library.InputExample(
            key=0, instruction_id_list=list(ids), prompt=typed(instruction), kwargs=kwargs
        )


def _load_verifiers() -> tuple[Mapping[str, type], ModuleType]:
    """lm_eval's constraints by name, and its module with the two criteria."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"IFEvalTask needs {', '.join(missing)}: pip install 'lm_eval[ifeval]'")
    import langdetect
    import nltk

    try:
        nltk.data.find(SENTENCE_MODEL)
    except LookupError:
        raise ValueError(
            f"IFEvalTask counts sentences by NLTK's model {SENTENCE_MODEL}, which is in none of {nltk.data.path}: run "
            "'python -m nltk.downloader punkt_tab' where there is a connection, and name its folder in NLTK_DATA"
        ) from None
    from lm_eval.tasks.ifeval import instructions_registry, utils  # would try to download the model, were it not there

    langdetect.DetectorFactory.seed = 0
    return instructions_registry.INSTRUCTION_DICT, utils


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Python's random numbers follow from ``seed`` inside, and go on outside as if nothing had been drawn."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
