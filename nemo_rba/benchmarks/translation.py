# SPDX-License-Identifier: Apache-2.0
"""Speech translation: CoVoST 2, FLEURS and MuST-C. The prompt says in words what language to translate into."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lhotse.serialization import load_yaml

from nemo_rba.benchmarks import tables
from nemo_rba.benchmarks.audio import read_file, read_stretch
from nemo_rba.benchmarks.benchmark import (
    UNKNOWN_SPEAKER,
    Unusable,
    numbered,
    require_choice,
    require_files,
    require_words,
    usable,
)
from nemo_rba.types import Instruction, Utterance

_BLANK = "{language}"


def _request(name: str, context: str, target_name: str) -> str:
    """``context`` with the target language's name in it."""
    if _BLANK not in context:
        raise ValueError(f"{name}: context is {context!r}; expected {_BLANK} in it, where the language's name goes")
    return context.replace(_BLANK, target_name)


def _instruction(
    identity: str, *, text: str | None, translation: str | None, source: str, target: str, context: str, extra: Mapping
) -> Instruction:
    """One sentence to translate. Raises Unusable where it, or its translation, is empty."""
    if not translation or not translation.strip():
        raise Unusable("no translation", repr(text))
    return Instruction(
        id=identity,
        text=require_words(text),
        response=translation.strip(),
        task=f"{source}-{target}",
        context=context,
        extra={"source_language": source, "target_language": target, **extra},
    )


class CoVoST2:
    """CoVoST 2 (arXiv 2007.10310): translations of Common Voice, version 4.

    Source: github.com/facebookresearch/covost, README and ``get_covost_splits.py``: either
    ``covost_v2.<source>_<target>.<split>.tsv``, which that script writes, with ``path``, ``sentence``, ``translation``
    and ``client_id``; or what it is made of, ``covost_v2.<source>_<target>.tsv`` (``path``, ``translation``, ``split``)
    and Common Voice's ``validated.tsv`` (``path``, ``sentence``, ``client_id``), joined as the script joins them.
    Tab-separated, no quotation marks, backslash escapes.

    Args:
        folder: Common Voice of the source language, with ``clips/``, and CoVoST's tables beside ``validated.tsv``.
        source_language, target_language: codes as in the tables' names, e.g. fr, en, zh-CN.
        target_name: the target language in the prompt, e.g. English.
        context: the prompt, with ``{language}`` in it.
        split: test, dev or train.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: missing files, the clips included, or missing columns.
    """

    name = "covost2"
    _columns = ("path", "sentence", "translation", "client_id")

    def __init__(self, *, folder: str, source_language: str, target_language: str, target_name: str, context: str,
                 split: str, sampling_rate: int):  # fmt: skip
        require_choice(self.name, "split", split, ("test", "dev", "train"))
        self._source, self._target, self._split = source_language, target_language, split
        self._context, self._sampling_rate = _request(self.name, context, target_name), sampling_rate
        self.measure = {"evaluation": "translation", "task": {"target_language": target_language}}
        self._clips = Path(folder) / "clips"
        self._items = self._read_items(Path(folder))
        clips = [self._clips / row["path"] for row in self._items]
        require_files(self.name, Path(folder), clips, f"Common Voice version 4, {source_language}")
        self.counts: Counter[str] = Counter()

    def _read_items(self, folder: Path) -> list[dict[str, str]]:
        stem = f"covost_v2.{self._source}_{self._target}"
        ready = folder / f"{stem}.{self._split}.tsv"
        if ready.is_file():
            return list(tables.tsv_rows(self.name, ready, self._columns, escape="\\"))
        translations, sentences = folder / f"{stem}.tsv", folder / "validated.tsv"
        origin = f"Common Voice version 4, {self._source}, with CoVoST's tables in it (or {ready.name})"
        require_files(self.name, folder, [translations, sentences], origin)
        rows = tables.tsv_rows(self.name, translations, ("path", "translation", "split"), escape="\\")
        wanted = (self._split, "train_covost") if self._split == "train" else (self._split,)
        translated = {row["path"]: row["translation"] for row in rows if row["split"] in wanted}
        rows = tables.tsv_rows(self.name, sentences, ("path", "sentence", "client_id"), escape="\\")
        return [row | {"translation": translated[row["path"]]} for row in rows if row["path"] in translated]

    def __iter__(self) -> Iterator[Utterance]:
        prefix = f"{self.name}-{self._source}-{self._target}-{self._split}"
        return usable(numbered(prefix, self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, str]) -> Utterance:
        return Utterance(
            instruction=_instruction(
                identity, text=row["sentence"], translation=row["translation"], source=self._source,
                target=self._target, context=self._context, extra={"file": row["path"]},
            ),
            audio=read_file(self._clips / row["path"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=row["client_id"] or UNKNOWN_SPEAKER,
        )  # fmt: skip


class Fleurs:
    """FLEURS (arXiv 2205.12446) as speech translation: the same sentences of FLORES, read in 102 languages.

    Source: ``lhotse.recipes.fleurs`` and the layout that its download writes: ``metadata/<language>/<split>.tsv``
    without a header (id of the sentence, file, raw transcript, transcript, characters, samples, gender) and
    ``<language>/<split>/<file>``. The recipe itself prepares all splits at once and stops at the first broken file, so
    only its layout is used. A sentence's translation is the raw transcript that the target language has under its id.

    Args:
        folder: ``fleurs`` as ``lhotse download fleurs`` writes it.
        source_language, target_language: as the recipe names them, e.g. en_us, de_de.
        target_name: the target language in the prompt, e.g. German.
        context: the prompt, with ``{language}`` in it.
        split: test, dev or train.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: missing files, the sound files included.
    """

    name = "fleurs"

    def __init__(self, *, folder: str, source_language: str, target_language: str, target_name: str, context: str,
                 split: str, sampling_rate: int):  # fmt: skip
        require_choice(self.name, "split", split, ("test", "dev", "train"))
        self._source, self._target, self._split = source_language, target_language, split
        self._context, self._sampling_rate = _request(self.name, context, target_name), sampling_rate
        self.measure = {"evaluation": "translation", "task": {"target_language": target_language}}
        self._audios, origin = Path(folder) / source_language / split, "lhotse download fleurs"
        index = [Path(folder) / "metadata" / code / f"{split}.tsv" for code in (source_language, target_language)]
        require_files(self.name, Path(folder), index, origin)
        self._items, translations = (_read_fleurs(path) for path in index)
        self._translations = {row["id"]: row["text"] for row in translations}
        require_files(self.name, Path(folder), [self._audios / row["file"] for row in self._items], origin)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        prefix = f"{self.name}-{self._source}-{self._target}-{self._split}"
        return usable(numbered(prefix, self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, str]) -> Utterance:
        return Utterance(
            instruction=_instruction(
                identity, text=row["text"], translation=self._translations.get(row["id"]), source=self._source,
                target=self._target, context=self._context, extra={"sentence": row["id"], "file": row["file"]},
            ),
            audio=read_file(self._audios / row["file"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )  # fmt: skip


def _read_fleurs(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) == 7:
            rows.append({"id": fields[0], "file": fields[1], "text": fields[2]})
        elif line.strip():
            raise ValueError(f"fleurs: {path} line {number} has {len(fields)} fields, expected 7; download it again")
    return rows


class MustC:
    """MuST-C (Di Gangi et al., NAACL 2019): TED talks in English with translations, sentence by sentence.

    Source: ``lhotse.recipes.must_c``: ``en-<target>/data/<split>/txt/<split>.yaml`` with ``wav``, ``offset``,
    ``duration`` and ``speaker_id`` of every sentence, and in the same order ``<split>.en`` and ``<split>.<target>``,
    beside ``wav/``. The recipe keeps the translation only, and all splits at once, so only its layout is used.

    Args:
        folder: the folder with ``en-<target>`` in it.
        target_language: code as in the folder's name, e.g. de.
        target_name: the target language in the prompt, e.g. German.
        context: the prompt, with ``{language}`` in it.
        split: tst-COMMON, tst-HE, dev or train.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: missing files, the talks included, or files of different length.
    """

    name = "must_c"

    def __init__(self, *, folder: str, target_language: str, target_name: str, context: str, split: str,
                 sampling_rate: int):  # fmt: skip
        require_choice(self.name, "split", split, ("tst-COMMON", "tst-HE", "dev", "train"))
        self._target, self._split = target_language, split
        self._context, self._sampling_rate = _request(self.name, context, target_name), sampling_rate
        self.measure = {"evaluation": "translation", "task": {"target_language": target_language}}
        place, origin = Path(folder) / f"en-{target_language}" / "data" / split, "MuST-C, unpacked"
        self._audios = place / "wav"
        index = [place / "txt" / f"{split}.{suffix}" for suffix in ("yaml", "en", target_language)]
        require_files(self.name, Path(folder), index, origin)
        self._items = _read_must_c(*index)
        talks = [self._audios / talk for talk in dict.fromkeys(row["wav"] for row in self._items)]
        require_files(self.name, Path(folder), talks, origin)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        prefix = f"{self.name}-en-{self._target}-{self._split}"
        return usable(numbered(prefix, self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, Any]) -> Utterance:
        offset, duration = float(row["offset"]), float(row["duration"])
        return Utterance(
            instruction=_instruction(
                identity, text=row["text"], translation=row["translation"], source="en", target=self._target,
                context=self._context, extra={"file": row["wav"], "offset": offset, "duration": duration},
            ),
            audio=read_stretch(self._audios / row["wav"], self._sampling_rate, offset=offset, duration=duration),
            sampling_rate=self._sampling_rate,
            speaker=row["speaker_id"],
        )  # fmt: skip


def _read_must_c(index: Path, words: Path, translations: Path) -> list[dict[str, Any]]:
    segments = load_yaml(index)
    texts = [_lines(words), _lines(translations)]
    if not len(segments) == len(texts[0]) == len(texts[1]):
        raise ValueError(
            f"must_c: {index.name} has {len(segments)} sentences, {words.name} {len(texts[0])} and {translations.name} "
            f"{len(texts[1])}; expected as many. Download {index.parent} again"
        )
    return [
        segment | {"text": text, "translation": translation}
        for segment, text, translation in zip(segments, *texts, strict=True)
    ]


def _lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [line.rstrip("\n") for line in lines]
