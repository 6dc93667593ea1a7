# SPDX-License-Identifier: Apache-2.0
"""Where a synthetic data set comes from: code, libraries, sampler, synthesizers, language; for its card."""

import importlib.metadata
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from nemo_rba import __version__
from nemo_rba.language import language_identifier, num_letter_bytes
from nemo_rba.types import Instruction

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"nemo": "nemo_toolkit", "torch": "torch", "transformers": "transformers"}  # module: package
GIT_SECONDS = 30
NOT_TOLD, NOT_SURE = "not told", "not sure"
ISO_639_1 = {"cmn": "zh", "yue": "zh"}  # as espeak-ng calls them; others begin with their ISO 639-1 code
MAX_JUDGED = 200  # texts of a split whose language is detected
MIN_LETTER_BYTES, MIN_PROBABILITY = 12, 0.7  # with less a text's language is not sure


def versions() -> dict[str, str]:
    """Of this package, of its git commit where it has one, and of the libraries that write and speak."""
    head = commit(ROOT)
    found = {name: _version(name, package) for name, package in LIBRARIES.items()}
    return {"nemo_rba": __version__} | ({"commit": head} if head else {}) | found


@lru_cache(maxsize=4)
def commit(root: Path) -> str:
    """The git commit of the code in ``root``, with ", changed" where tracked files differ; "" without a repository."""
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return ""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (", changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def synthesizers(settings: Mapping) -> dict[str, dict]:
    """By split, the configuration of its synthesizer: class, model files, sampling rate, voices."""
    splits = [split for split in settings.get("splits", ()) if isinstance(split, Mapping) and "tts" in split]
    return {split["name"]: split["tts"] for split in splits}


def in_words(node: object) -> str:
    """The class of a configuration and its settings that are short, as in ``MagpieSampler (batch_size 500, ...)``."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return NOT_TOLD
    short = {key: value for key, value in node.items() if not key.startswith("_") and not _is_long(value)}
    told = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in short.items()
    )
    return node["_target_"].rpartition(".")[2] + (f" ({told})" if told else "")


def language_of(code: str) -> str:
    """A voice's code without its region, ``en`` for ``en-gb-x-rp``; what it is translated to stays: ``en to de``."""
    spoken, to, target = code.partition(" to ")
    base = spoken if spoken == NOT_TOLD else spoken.split("-")[0].split("_")[0]
    return ISO_639_1.get(base, base) + to + target


def text_languages(
    settings: Mapping, splits: Mapping[str, Sequence[Instruction]], voices: Iterable[str]
) -> dict[str, object]:
    """The language of the texts: that which filters let pass, else that of the voices; detected where it is several.

    Args:
        settings: the configuration of the synthesis.
        voices: the voices' codes.

    Returns:
        How it is known, ``as``, and by split how many texts are in which language, of up to ``MAX_JUDGED``.
    """
    filtered = sorted({code for node in _language_filters(settings) for code in node["languages"]})
    spoken = sorted({language_of(code.partition(" to ")[0]) for code in voices} - {NOT_TOLD})
    candidates = filtered or spoken
    source = "the language filter lets pass" if filtered else "the voices speak" if spoken else "nobody said"
    if len(candidates) < 2:
        name = candidates[0] if candidates else NOT_TOLD
        return {"as": source, "splits": {split: {name: len(items)} for split, items in splits.items()}}
    try:
        identifier, _ = language_identifier(tuple(candidates))
    except (ImportError, ValueError):  # optional, and a voice's code may be none that it knows
        return {"as": source, "splits": {split: {" or ".join(candidates): len(i)} for split, i in splits.items()}}
    detected = {split: _detected(identifier, items) for split, items in splits.items()}
    return {"as": f"detected among those that {source}", "splits": detected}


def _detected(identifier, items: Sequence[Instruction]) -> dict[str, int]:
    step = max(1, -(-len(items) // MAX_JUDGED))
    found = Counter()
    for item in items[::step]:
        code, probability = identifier.rank(item.text)[0]
        sure = probability >= MIN_PROBABILITY and num_letter_bytes(item.text) >= MIN_LETTER_BYTES
        found[str(code) if sure else NOT_SURE] += 1
    return dict(found.most_common())


def _language_filters(settings: Mapping) -> Iterator[Mapping]:
    """Of the instructions' filters, those that look at the language of the text."""
    for key in ("instruction_filters", "speech_filters"):
        filters = settings.get(key) or ()
        for node in filters.values() if isinstance(filters, Mapping) else filters:
            target = node.get("_target_", "") if isinstance(node, Mapping) else ""
            if target.endswith(".LanguageFilter") and node["field"] == "text":
                yield node


def _version(module: str, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a container may have it on the path only
        return getattr(sys.modules.get(module), "__version__", NOT_TOLD)


def _is_long(value: object) -> bool:
    return value is None or isinstance(value, list | Mapping) or len(str(value)) > 80
