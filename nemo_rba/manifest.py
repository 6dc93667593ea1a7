# SPDX-License-Identifier: Apache-2.0
"""Utterance <-> Lhotse cut: the one contract on disk, and the only file that knows its field names.

A cut holds the speech as its recording and ``supervisions[0].text`` = the words said. Its custom fields are
``response`` (the teacher's answer), ``task``, ``context`` (typed text beside the speech), ``speaker``, ``teacher`` (who
answered), ``rba_manifest`` = 1, and, where there are any, ``typed`` (how the words are written, if not as they are
spoken), ``aliases`` (a list of other right answers) and ``extra`` (what a benchmark's measure needs besides, such as
IFEval's constraints). On disk it is a Lhotse Shar folder (``cuts.000000.jsonl.gz`` beside ``recording.000000.tar``) or
a JSONL of cuts that name audio files. Sounds are 16-bit.
"""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import torch
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.shar import SharWriter

from nemo_rba.types import Instruction, Utterance

MANIFEST_VERSION = 1
CUSTOM_FIELDS = ("response", "task", "context", "speaker", "teacher")
AUDIO_FORMATS = ("flac", "wav")


def utterance_to_cut(utterance: Utterance, *, teacher: str) -> MonoCut:
    """A cut that carries its own 16-bit sound in memory. ``teacher`` names who wrote the response."""
    instruction = utterance.instruction
    buffer = io.BytesIO()
    samples = utterance.audio.detach().cpu().float().numpy()  # (A,)
    soundfile.write(buffer, samples, utterance.sampling_rate, format="WAV", subtype="PCM_16")
    recording = Recording(
        id=instruction.id,
        sources=[AudioSource(type="memory", channels=[0], source=buffer.getvalue())],
        sampling_rate=utterance.sampling_rate,
        num_samples=len(samples),
        duration=len(samples) / utterance.sampling_rate,
    )
    cut = recording.to_cut()
    words = SupervisionSegment(
        id=instruction.id,
        recording_id=instruction.id,
        start=0.0,
        duration=cut.duration,
        text=instruction.text,
        speaker=utterance.speaker,
    )
    cut.supervisions = [words]
    cut.custom = {
        "response": instruction.response,
        "task": instruction.task,
        "context": instruction.context,
        "speaker": utterance.speaker,
        "teacher": teacher,
        "rba_manifest": MANIFEST_VERSION,
    }
    if instruction.typed:
        cut.custom["typed"] = instruction.typed
    if instruction.aliases:
        cut.custom["aliases"] = list(instruction.aliases)
    if instruction.extra:
        cut.custom["extra"] = dict(instruction.extra)
    return cut


def cut_to_instruction(cut: MonoCut) -> Instruction:
    """What is said in a cut and how the teacher answers; a cut that ``validate_cut`` accepts has all of it."""
    custom = cut.custom
    return Instruction(
        id=cut.id,
        text=cut.supervisions[0].text,
        response=custom["response"],
        task=custom["task"],
        context=custom["context"],
        typed=custom.get("typed", ""),
        aliases=tuple(custom.get("aliases", ())),
        extra=custom.get("extra", {}),
    )


def cut_to_utterance(cut: MonoCut) -> Utterance:
    """The cut with its sound loaded: audio (A,), mono float32."""
    audio = torch.from_numpy(cut.load_audio()[0]).float()
    return Utterance(
        instruction=cut_to_instruction(cut),
        audio=audio,
        sampling_rate=cut.sampling_rate,
        speaker=cut.custom["speaker"],
    )


def validate_cut(
    cut: MonoCut, *, sampling_rate: int, max_duration_seconds: float, needs_response: bool = True
) -> str | None:
    """Why a cut cannot be used, or None. Reasons hold no per-item values, so that they can be counted."""
    if not isinstance(cut, MonoCut):
        return f"is a {type(cut).__name__}, expected a MonoCut (one channel)"
    texts = [supervision.text for supervision in cut.supervisions]
    reason = _content_problem(texts, cut.custom, needs_response)
    if reason is not None:
        return reason
    if not cut.has_recording:
        return "has no recording"
    if cut.sampling_rate != sampling_rate:
        return f"is sampled at {cut.sampling_rate} Hz, expected {sampling_rate} Hz"
    if cut.num_samples < 1:
        return "has no audio (duration 0)"
    if cut.duration > max_duration_seconds:
        return f"is longer than {max_duration_seconds:g} s"
    return None


def _content_problem(texts: list[str | None], custom: dict | None, needs_response: bool) -> str | None:
    if not texts:
        return "has no supervision (supervisions[0].text is what is said)"
    if not texts[0] or not texts[0].strip():
        return "has an empty supervisions[0].text"
    if custom is None or "rba_manifest" not in custom:
        return "has no custom field rba_manifest; it was not written by nemo_rba (examples/rba_synthesize.py)"
    if custom["rba_manifest"] != MANIFEST_VERSION:
        return f"has rba_manifest {custom['rba_manifest']!r}, this version of nemo_rba reads {MANIFEST_VERSION}"
    for name in CUSTOM_FIELDS:
        if name not in custom:
            return f"has no custom field {name}"
        if not isinstance(custom[name], str):
            return f"has a custom field {name} that is not text"
    if needs_response and not custom["response"].strip():
        return "has an empty response"
    if not isinstance(custom.get("typed", ""), str):
        return "has a custom field typed that is not text"
    aliases = custom.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        return "has a custom field aliases that is not a list of answers"
    if not isinstance(custom.get("extra", {}), dict):
        return "has a custom field extra that is not an object"
    return None


def read_manifest(path: str | Path) -> CutSet:
    """A lazy CutSet, in the order written, of a Shar folder or of a ``.jsonl``/``.jsonl.gz`` of cuts.

    Raises:
        ValueError: nothing there, not a manifest, or a shard without its counterpart. Damage inside files is found by
            ``check_manifest``.
    """
    path = Path(path)
    if path.is_dir():
        cuts, recordings = _list_shards(path)
        return CutSet.from_shar(fields={"cuts": cuts, "recording": recordings})
    _require_jsonl(path)
    return CutSet.from_jsonl_lazy(path)


def _list_shards(folder: Path) -> tuple[list[str], list[str]]:
    """The cuts and the recording files of a Shar folder, pairwise."""
    cuts = {p.name.split(".")[1]: str(p) for p in sorted(folder.glob("cuts.*.jsonl*"))}
    recordings = {p.name.split(".")[1]: str(p) for p in sorted(folder.glob("recording.*.tar*"))}
    if not cuts:
        raise ValueError(f"{folder} holds no cuts.*.jsonl.gz, so it is not a Lhotse Shar folder; check the path")
    lonely = [f"recording.{shard}.tar" for shard in cuts.keys() - recordings.keys()]
    lonely += [f"cuts.{shard}.jsonl.gz" for shard in recordings.keys() - cuts.keys()]
    numbers = sorted(int(shard) for shard in cuts if shard.isdigit())
    if numbers:
        gaps = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        lonely += [f"cuts.{number:06d}.jsonl.gz" for number in gaps]
    if lonely:
        raise ValueError(f"{folder} lacks {len(lonely)} shard files: {', '.join(sorted(lonely)[:5])}; copy them again")
    return list(cuts.values()), list(recordings.values())


def _require_jsonl(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"no manifest at {path}; expected a Lhotse Shar folder or a .jsonl(.gz) of cuts")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is not a manifest; expected a Lhotse Shar folder or a file ending in .jsonl(.gz)")


@dataclass(slots=True, kw_only=True)
class ManifestReport:
    """What ``check_manifest`` saw. ``problems`` is empty for a sound manifest."""

    num_cuts: int = 0  # readable lines
    num_broken: int = 0  # lines, or items of an archive, that cannot be read
    seconds: float = 0.0
    tasks: Counter = field(default_factory=Counter)
    speakers: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)  # why readable cuts cannot be used
    problems: list[str] = field(default_factory=list)  # one sentence each, naming file and item


def check_manifest(path: str | Path, *, needs_response: bool = True) -> ManifestReport:
    """Scan every line and every archive header (not the sound) at setup. Raises ValueError as ``read_manifest``."""
    path = Path(path)
    report = ManifestReport()
    if path.is_dir():
        for cuts, recordings in zip(*_list_shards(path), strict=True):
            ids = _scan_cuts(Path(cuts), report, needs_response)
            _scan_archive(Path(recordings), ids, report)
    else:
        _require_jsonl(path)
        _scan_cuts(path, report, needs_response)
    report.problems += [f"{count} cuts of {path}: {reason}" for reason, count in report.reasons.items()]
    if report.num_cuts == 0:
        report.problems.append(f"{path} holds no readable cut")
    return report


def _scan_cuts(path: Path, report: ManifestReport, needs_response: bool) -> list[str]:
    """Count the lines of one JSONL into ``report``; returns the ids of the readable ones."""
    ids = []
    for number, line in _read_lines(path, report):
        try:
            cut = json.loads(line)
            texts = [supervision.get("text") for supervision in cut["supervisions"]]
            custom = cut.get("custom")
            report.seconds += cut["duration"]
            ids.append(cut["id"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            named = re.search(r'"id":\s*"([^"]*)"', line)
            item = f"item {named[1]!r}" if named else repr(line[:40])
            report.num_broken += 1
            report.problems.append(f"{path} line {number} ({item}) is cut off or not a cut; write the manifest again")
            continue
        report.num_cuts += 1
        reason = _content_problem(texts, custom, needs_response)
        if reason is not None:
            report.reasons[reason] += 1
            continue
        report.tasks[custom["task"]] += 1
        report.speakers[custom["speaker"]] += 1
    return ids


def _read_lines(path: Path, report: ManifestReport) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        report.num_broken += 1
        report.problems.append(f"{path} ends early after line {number} ({error}); copy or write it again")


def read_speakers(path: str | Path) -> dict[str, str]:
    """Id of every cut -> who speaks, "" where that is not told. No sound is read.

    Raises:
        ValueError: as ``read_manifest``; a line that is no cut.
    """
    path = Path(path)
    if not path.is_dir():
        _require_jsonl(path)
    report, speakers = ManifestReport(), {}
    for file in map(Path, _list_shards(path)[0] if path.is_dir() else [path]):
        for number, line in _read_lines(file, report):
            try:
                cut = json.loads(line)
                speakers[cut["id"]] = str((cut.get("custom") or {}).get("speaker") or "")
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} line {number} is cut off or not a cut; write the manifest again") from error
    if report.problems:
        raise ValueError(report.problems[0])
    return speakers


def _scan_archive(path: Path, ids: list[str], report: ManifestReport) -> None:
    """Compare the names in a recording archive with the cut ids beside it."""
    names: list[str] = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if not member.name.endswith(".json"):
                    names.append(member.name.rpartition(".")[0])
    except (tarfile.TarError, OSError, EOFError) as error:
        report.num_broken += 1
        report.problems.append(f"{path} is damaged after {len(names)} recordings ({error}); copy or write it again")
    if names == ids:
        return
    first = next((cut_id for cut_id, name in zip(ids, names, strict=False) if cut_id != name), None)
    detail = f"first at cut {first!r}" if first else f"{len(ids)} cuts, {len(names)} recordings"
    report.problems.append(f"{path} does not match its cuts ({detail}); write the manifest again")


class ManifestWriter:
    """Writes utterances as a Shar folder; a context manager.

    Args:
        folder: created if missing.
        shard_size: utterances per shard.
        audio_format: ``flac`` or ``wav``, both 16-bit.
        teacher: who wrote the responses, kept in every cut.
        first_shard: number of the first shard written.
    """

    def __init__(self, *, folder: str | Path, shard_size: int, audio_format: str, teacher: str, first_shard: int):
        if audio_format not in AUDIO_FORMATS:
            raise ValueError(f"audio_format is {audio_format!r}; expected one of {', '.join(AUDIO_FORMATS)}")
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}; expected at least 1 utterance per shard")
        Path(folder).mkdir(parents=True, exist_ok=True)  # SharWriter does not
        self._teacher = teacher
        self._writer = SharWriter(
            str(folder), fields={"recording": audio_format}, shard_size=shard_size, shard_offset=first_shard
        )

    def __enter__(self) -> "ManifestWriter":
        self._writer.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._writer.__exit__(*exception)

    def write(self, utterance: Utterance) -> None:
        """Append one utterance; its instruction's id must be new to the folder."""
        self._writer.write(utterance_to_cut(utterance, teacher=self._teacher))


def write_empty_shard(folder: Path, shard: int) -> None:
    """A shard that lost all its utterances: the others keep their numbers, and readers pass over it."""
    with gzip.open(folder / f"cuts.{shard:06d}.jsonl.gz", "wt"):
        pass
    with tarfile.open(folder / f"recording.{shard:06d}.tar", "w"):
        pass


def write_shar(
    utterances: Iterable[Utterance], folder: str | Path, *, shard_size: int, audio_format: str, teacher: str
) -> None:
    """Write a whole Shar folder at once; see ``ManifestWriter``."""
    with ManifestWriter(
        folder=folder, shard_size=shard_size, audio_format=audio_format, teacher=teacher, first_shard=0
    ) as writer:
        for utterance in utterances:
            writer.write(utterance)
