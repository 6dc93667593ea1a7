# SPDX-License-Identifier: Apache-2.0
"""Speech translation: BLEU, chrF and TER of a whole set, by sacrebleu (arXiv 1804.08771), with its signatures.

None of them is a mean over items, but the counts each needs add up: an item carries its counts, the score is made of
their sums, and so are those of resamples and of tests (``statistics.py``), as in ``sacrebleu.significance``. Its own
tests take texts of one run a system; ours take any measure, training seeds, and kinds and families of items.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from sacrebleu.metrics import BLEU, CHRF, TER

from nemo_rba.evaluation.measures import Statistics
from nemo_rba.evaluation.tasks import MeasuredTask
from nemo_rba.types import Instruction, SpeechBatch

# Language -> BLEU's tokenizer where words are not spaced, or not as 13a has it; 13a for all others.
TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor", "th", "tha", "lo", "lao", "my", "mya", "km", "khm", "bo", "bod"), "char"),
}


class TranslationTask(MeasuredTask):
    """BLEU, chrF and TER (the lower the better) of translations; references are the response and its aliases.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        target_language: ISO 639 code; decides BLEU's tokenizer and whether TER splits Chinese characters (zh, ja).
        tokenizer: of BLEU, instead, e.g. "char" for Japanese; None for the language's.
        word_order: of chrF: 0 for chrF, 2 for chrF++.
        num_references: every item has as many; part of the signature.
        own: by which systems are compared, "bleu" or "chrf".

    Raises:
        ValueError: a setting is out of range.
        ImportError: what the tokenizer needs is missing: a package, or for the "flores" ones a model to download.
    """

    OWN = ("bleu", "chrf")

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        target_language: str,
        tokenizer: str | None,
        word_order: int,
        num_references: int,
        own: str,
        kinds: Mapping[str, str],
    ):
        super().__init__(name=name, batches=batches, kinds=kinds)
        if own not in self.OWN or word_order < 0 or num_references < 1:
            raise ValueError(
                f"own is {own!r}, word_order {word_order}, num_references {num_references}; expected own from "
                f"{', '.join(self.OWN)}, word_order of 0 or more, num_references of 1 or more: change task"
            )
        self.num_references = num_references
        language = _language(target_language)
        splits_characters = TOKENIZERS.get(language) in ("zh", "ja-mecab")
        metrics = {
            "bleu": _bleu(TOKENIZERS.get(language, "13a") if tokenizer is None else tokenizer),
            "chrf": CHRF(word_order=word_order),
            "ter": TER(normalized=splits_characters, asian_support=splits_characters),
        }
        self._metrics = {_name(metrics[key], num_references): metrics[key] for key in (own, *metrics) if key in metrics}

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        references = (instruction.response, *instruction.aliases)
        if len(references) != self.num_references or not all(reference.strip() for reference in references):
            raise ValueError(
                f"task {self.name!r}: item {instruction.id!r} has references {list(references)} (response and "
                f"aliases), expected {self.num_references}, none empty: change the manifest or task.num_references"
            )
        found = {}
        for name, metric in self._metrics.items():
            counts = metric._extract_corpus_statistics([response], [[reference] for reference in references])[0]
            if isinstance(metric, TER):  # edits, reference length: a ratio of sums
                counts = [100 * counts[0], counts[1]]
            found[name] = [float(count) for count in counts]
        return found


def _language(code: str) -> str:
    """ "zh-CN" -> "zh"."""
    language = re.split("[-_]", code.strip().lower())[0]
    if not re.fullmatch("[a-z]{2,3}", language):
        raise ValueError(
            f"target_language is {code!r}; expected an ISO 639 code such as de, zh, ja: change task.target_language"
        )
    return language


def _bleu(tokenizer: str) -> BLEU:
    if tokenizer not in BLEU.TOKENIZERS:
        raise ValueError(
            f"tokenizer is {tokenizer!r}; expected one of {', '.join(BLEU.TOKENIZERS)}: change task.tokenizer"
        )
    try:
        return BLEU(tokenize=tokenizer, force=True)
    except (ImportError, RuntimeError, OSError, AssertionError) as error:  # the last: another dictionary than its own
        needs = {"ja-mecab": "pip install 'sacrebleu[ja]'", "ko-mecab": "pip install 'sacrebleu[ko]'"}
        how = needs.get(tokenizer, "pip install sentencepiece, and once a connection to the internet")
        raise ImportError(
            f"BLEU's tokenizer {tokenizer!r} needs what is not there: {how}; or set task.tokenizer to char, which "
            f"needs nothing and gives other scores. sacrebleu says: {' '.join(str(error).split())}"
        ) from error


def _name(metric: BLEU | CHRF | TER, num_references: int) -> str:
    """As sacrebleu prints it: "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"."""
    score = metric.corpus_score(["a"], [["a"]] * num_references)  # a signature exists once something was scored
    return f"{score.name}|{metric.get_signature()}"
