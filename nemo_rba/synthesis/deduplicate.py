# SPDX-License-Identifier: Apache-2.0
"""Filters that compare a text with others: near duplicates in the data, and items of evaluation sets.

The first two remember what they kept. Their verdicts depend on the texts, their order and the seed alone, so that they
are resumed as ``filters.DuplicateFilter`` is: shown the kept batches again, they come to the same memory.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.types import Instruction

_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\s぀-ヿ㐀-鿿]+")  # Chinese and Japanese write no blanks: each character is a word


class NearDuplicateFilter:
    """Drops texts that share most of their runs of words with a text kept before (MinHash LSH, arXiv 2107.06499).

    datasketch's MinHashLSH proposes earlier texts, the exact Jaccard similarity of their sets of ``ngram``-word runs
    decides; so a chance collision drops nothing, and LSH can only miss. Has a memory: one instance per data set.

    Args:
        ngram: words in a run; spoken instructions are short, so 2 or 3 rather than the 5 of documents.
        threshold: the least similarity that counts as the same, in (0, 1).
        num_permutations: length of a signature; more misses less and takes more time.
        seed: of the permutations.

    Raises:
        ValueError: settings out of range.
        ImportError: datasketch is missing.
    """

    name = "near duplicate"

    def __init__(self, *, ngram: int, threshold: float, num_permutations: int, seed: int):
        if ngram < 1 or not 0 < threshold < 1 or num_permutations < 16 or seed < 0:
            raise ValueError(f"NearDuplicateFilter: ngram={ngram}, threshold={threshold}, num_permutations="
                             f"{num_permutations}, seed={seed}; expected ngram at least 1, 0 < threshold < 1, "
                             "num_permutations at least 16 and seed at least 0")  # fmt: skip
        try:
            from datasketch import MinHashLSH
        except ImportError as error:
            raise ImportError("NearDuplicateFilter needs datasketch: pip install datasketch") from error
        self._ngram, self._threshold, self._num_permutations, self._seed = ngram, threshold, num_permutations, seed
        self._texts: list[str] = []  # kept; the index proposes places in it
        self._index = MinHashLSH(threshold=threshold, num_perm=num_permutations)

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``; remembers the text."""
        runs = self._runs(instruction.text)
        signature = self._signature(runs)
        for place in self._index.query(signature):
            others = self._runs(self._texts[place])
            if len(runs & others) >= self._threshold * len(runs | others):
                return f"shares {self._threshold:.0%} of its {self._ngram}-word runs with an earlier text"
        self._index.insert(len(self._texts), signature, check_duplication=False)
        self._texts.append(instruction.text)
        return None

    def _runs(self, text: str) -> set[str]:
        words = split_words(text)
        return set(word_runs(words, self._ngram)) or {" ".join(words)}

    def _signature(self, runs: set[str]):
        from datasketch import MinHash

        signature = MinHash(num_perm=self._num_permutations, seed=self._seed)
        signature.update_batch([run.encode() for run in sorted(runs)])
        return signature


class EmbeddingDuplicateFilter:
    """Drops texts whose embedding is close to that of a text kept before (as SemDeDup, arXiv 2303.09540).

    Every kept embedding is compared, in blocks: right for up to about a million texts. Has a memory.

    Args:
        embed: texts -> (N, D) embeddings, e.g. ``embedding.HFEmbedder``; the same for the same texts, or a resumed run
            may differ.
        max_similarity: the highest cosine similarity to keep, in (0, 1).
    """

    name = "embedding duplicate"

    def __init__(self, *, embed: Callable[[Sequence[str]], Tensor], max_similarity: float):
        if not 0 < max_similarity < 1:
            raise ValueError(f"EmbeddingDuplicateFilter: max_similarity={max_similarity}; expected above 0 and below 1")
        self._embed, self._max_similarity = embed, max_similarity
        self._kept: list[Tensor] = []  # blocks (N_i, D), unit length

    def __deepcopy__(self, memo: dict) -> "EmbeddingDuplicateFilter":
        """A copy of the memory beside the same model: a run copies its filters and must not copy weights."""
        copy = EmbeddingDuplicateFilter(embed=self._embed, max_similarity=self._max_similarity)
        copy._kept = list(self._kept)
        return copy

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``; remembers the text."""
        return self.reasons([instruction])[0]

    def reasons(self, instructions: Sequence[Instruction]) -> list[str | None]:
        """``reason`` of each, in order."""
        vectors = torch.as_tensor(self._embed([instruction.text for instruction in instructions])).float().cpu()
        if vectors.ndim != 2 or len(vectors) != len(instructions) or not bool(vectors.isfinite().all()):
            raise ValueError(f"EmbeddingDuplicateFilter: embed gave a tensor of shape {tuple(vectors.shape)} for "
                             f"{len(instructions)} texts; expected finite ({len(instructions)}, D)")  # fmt: skip
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        seen = torch.zeros(len(vectors), dtype=torch.bool)
        for block in self._kept:
            seen |= (vectors @ block.T).amax(dim=1) > self._max_similarity
        close = vectors @ vectors.T > self._max_similarity  # (N, N)
        kept: list[int] = []
        for place in range(len(vectors)):
            if not seen[place] and not bool(close[place, kept].any()):
                kept.append(place)
        if kept:
            self._kept.append(vectors[kept])
        return [None if n in set(kept) else "means the same as an earlier text" for n in range(len(vectors))]


class ContaminationFilter:
    """Drops texts that share runs of words with an evaluation set.

    GPT-3 (arXiv 2005.14165, appendix C) calls an item contaminated by one shared run of 8 to 13 words; Tulu 3 (arXiv
    2411.15124, section 3.2) by shared runs of 8 that cover more than half of its words: ``max_covered`` 0 and 0.5.
    An evaluation item shorter than ``ngram`` words is compared as a whole. Says which set it was, by the file's name.

    Args:
        files: evaluation sets in UTF-8: ``.txt`` (one item a line), ``.jsonl``, ``.jsonl.gz`` or ``.json`` (objects,
            one a line, in ``.json`` also all in one array, with the text under ``key``; or Lhotse cuts, whose
            supervisions are read), or a Lhotse Shar folder.
        ngram: words in a run; 8 to 13 in the literature.
        max_covered: share of the text's words that shared runs may cover, in [0, 1); 0 drops at the first shared run.
        key: where a JSON line has its text: a NeMo manifest's ``text``, ``question``, ``instruction``.
        responses: also look at the answers (as one of ``response_filters``).

    Raises:
        ValueError: no files, a file missing, unreadable or without texts, settings out of range.
    """

    name = "contamination"

    def __init__(self, *, files: Sequence[str], ngram: int, max_covered: float, key: str = "text",
                 responses: bool = False):  # fmt: skip
        if isinstance(files, str) or not files:
            raise ValueError(f"ContaminationFilter: files={files!r}; expected a list with at least one evaluation set")
        if ngram < 1 or not 0 <= max_covered < 1:
            raise ValueError(f"ContaminationFilter: ngram={ngram}, max_covered={max_covered}; expected ngram at least "
                             "1 and 0 <= max_covered < 1")  # fmt: skip
        self._ngram, self._max_covered = ngram, max_covered
        self._fields = ("text", "response") if responses else ("text",)
        self._runs: dict[str, str] = {}  # run -> the first set that has it
        self._short: dict[str, str] = {}  # whole items shorter than a run
        for file in files:
            path = Path(file)
            for text in evaluation_texts(path, key):
                self._remember(split_words(text), path.name)

    def __deepcopy__(self, memo: dict) -> "ContaminationFilter":
        """Itself: nothing changes after it is made, and evaluation sets may be large."""
        return self

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        for field in self._fields:
            found = self._found_in(split_words(getattr(instruction, field)))
            if found:
                return f"{'' if field == 'text' else 'its answer '}is in {found}"
        return None

    def _remember(self, words: list[str], source: str) -> None:
        if words and len(words) < self._ngram:
            self._short.setdefault(" ".join(words), source)
        for run in word_runs(words, self._ngram):
            self._runs.setdefault(run, source)

    def _found_in(self, words: list[str]) -> str | None:
        """The set that covers too many of the words, or None."""
        whole = " ".join(words)
        if whole in self._short:
            return self._short[whole]
        hits = [(n, run) for n, run in enumerate(word_runs(words, self._ngram)) if run in self._runs]
        covered = {place for start, _ in hits for place in range(start, start + self._ngram)}
        return self._runs[hits[0][1]] if hits and len(covered) > self._max_covered * len(words) else None


def evaluation_texts(path: Path, key: str) -> Iterator[str]:
    """The texts of an evaluation set; see ``ContaminationFilter``. Raises ValueError naming file and line."""
    if not path.exists():
        raise ValueError(f"ContaminationFilter: no evaluation set at {path}; correct files, or remove the filter")
    files = sorted(path.glob("cuts.*.jsonl*")) if path.is_dir() else [path]
    num_texts = 0
    for file in files:
        for text in _file_texts(file, key):
            num_texts += 1
            yield text
    if num_texts == 0:
        raise ValueError(f"ContaminationFilter: {path} holds no texts; expected a .txt, .jsonl or .jsonl.gz with "
                         "items, or a Lhotse Shar folder (cuts.*.jsonl.gz)")  # fmt: skip


def _file_texts(path: Path, key: str) -> Iterator[str]:
    if not path.name.endswith((".txt", ".jsonl", ".json", ".jsonl.gz")):
        raise ValueError(f"ContaminationFilter: {path} in files; expected .txt, .jsonl, .jsonl.gz, .json or a Shar "
                         "folder")  # fmt: skip
    for place, item in _items(path):
        texts = [item] if path.suffix == ".txt" else _row_texts(item, key)
        if texts is None:
            shown = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            raise ValueError(f"ContaminationFilter: {path} {place} is {shown.strip()[:40]!r}; expected JSON with a "
                             f"text under key={key!r}, or a Lhotse cut")  # fmt: skip
        yield from texts


def _items(path: Path) -> Iterator[tuple[str, object]]:
    """Where each item stands and what it is: a line, or an element of the one array of a ``.json`` file."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as lines:  # with or without a byte order mark
            if path.suffix == ".json" and (text := lines.read()).lstrip()[:1] == "[":
                yield from ((f"item {number}", row) for number, row in enumerate(json.loads(text), start=1))
                return
            for number, line in enumerate(text.split("\n") if path.suffix == ".json" else lines, start=1):
                if line.strip():
                    yield f"line {number}", line
    except UnicodeDecodeError as error:
        raise ValueError(f"ContaminationFilter: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x}: "
                         f"{error.reason}); convert it, e.g. with iconv -f LATIN1 -t UTF-8") from error  # fmt: skip
    except json.JSONDecodeError as error:
        raise ValueError(f"ContaminationFilter: {path} begins as an array and is none: {error}; expected "
                         "[{...}, ...], or one JSON object a line") from error  # fmt: skip
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"ContaminationFilter: {path} is not a whole gzip file: {error}; copy it again") from error


def _row_texts(item: object, key: str) -> list[str] | None:
    """The texts of one JSON line or object, or None where it has none in the place expected."""
    try:
        row = json.loads(item) if isinstance(item, str) else item
        texts = [part["text"] for part in row["supervisions"]] if "supervisions" in row else [row[key]]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def split_words(text: str) -> list[str]:
    """Words as ``normalize_text`` leaves them; each Chinese or Japanese character is one."""
    return _WORD.findall(normalize_text(text))


def word_runs(words: Sequence[str], ngram: int) -> list[str]:
    """Every run of ``ngram`` words, in order; none where there are fewer words."""
    return [" ".join(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
