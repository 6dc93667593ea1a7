# SPDX-License-Identifier: Apache-2.0
"""Instructions become clips: spoken, checked, augmented and written, one Shar shard at a time, on any rank.

A shard is made in a temporary folder and moved into place, then its report is written; a shard that has its report is
not made again. Speakers and augmentations are drawn by the id of an instruction and the synthesizer speaks in calls of
the same clips, so a resumed run gives what an uninterrupted one gives, and many ranks what one gives.
"""

import inspect
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from nemo.utils import logging
from torch import Tensor

from nemo_rba.manifest import AUDIO_FORMATS, ManifestWriter, write_empty_shard
from nemo_rba.protocols import TTS
from nemo_rba.synthesis.augment import Augmentation, keyed_rng
from nemo_rba.synthesis.files import write_text
from nemo_rba.synthesis.orders import Closed, Place
from nemo_rba.synthesis.quality import FiniteCheck, QualityControl, dropped_for
from nemo_rba.synthesis.splits import check_splits
from nemo_rba.types import Instruction, Utterance

CLIPS_PER_CALL = 32  # clips given to the synthesizer at once
FAILED = "speech: "  # before the reasons of this stage; those of the quality checks have the names of the checks
MACHINE_TROUBLE = ("out of memory", "allocate memory", "CUDA error")  # in errors of torch that are of no one text
HISTOGRAMS = {"seconds": 0.5, "words spoken": 1, "words answered": 2}  # of clips, with the width of a bar


class SpeechStage:
    """Synthesize -> refuse what is too long -> check -> augment -> write.

    A clip without samples, or with one that is no number, is never written, whatever the checks are.

    Args:
        output: a split's shards go to ``<output>/<split>``, their reports to ``<output>/speech``.
        teacher_name: who wrote the responses, kept in every cut.
        quality: checks the clips before augmentation; None checks nothing.
        max_duration_seconds: longer clips are dropped, before and after augmentation.
        shard_size: clips per shard; what an interruption can cost.
        audio_format: ``flac`` or ``wav``.
        max_failed_share: of a split's clips that this stage may lose without the checks: texts that the synthesizer
            refuses or fails on, clips that are too long, empty or no numbers. ``Shards`` stops where it is more.
        seed: with an item's id it decides the speaker.
        scratch: folder on the same disk for shards that are not finished; made when needed.
        has_ended: asked before every call of the synthesizer; True breaks the shard off.

    Raises:
        ValueError: settings that ``check_stage`` refuses.
    """

    def __init__(self, *, output: Path, teacher_name: str, quality: QualityControl | None, max_duration_seconds: float,
                 shard_size: int, audio_format: str, max_failed_share: float, seed: int, scratch: Path,
                 has_ended: Callable[[], bool]):  # fmt: skip
        check_stage(max_duration_seconds=max_duration_seconds, shard_size=shard_size, audio_format=audio_format,
                    max_failed_share=max_failed_share)  # fmt: skip
        self._output, self._teacher_name, self._quality, self._seed = output, teacher_name, quality, seed
        self._max_duration, self._audio_format = max_duration_seconds, audio_format
        self._scratch, self._has_ended = scratch, has_ended
        self.shard_size, self.max_failed_share = shard_size, max_failed_share

    def report(self, split: str, shard: int, num_items: int) -> dict | None:
        """What a finished shard of so many items holds; None if it is not there, or was made of fewer items: a last
        shard may have grown, by allow_fewer.

        The numbers of ``items`` and ``clips``, the ``seconds``, clips by ``speakers``, ``tasks`` and ``languages``,
        ``histograms``, what was ``dropped`` (id, text, reason) and, where clips are checked, ``quality``: what the
        checks found.
        """
        path = self._report_path(split, shard)
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return report if report is not None and report["items"] == num_items else None

    def finished(self) -> set[tuple[str, int]]:
        """(split, shard) of all that have a report."""
        names = (path.stem.rpartition(".") for path in (self._output / "speech").glob("*.json"))
        return {(split, int(shard)) for split, _, shard in names}

    def make(self, items: Sequence[Instruction], casts: Sequence[Sequence[str]], *, split: str, shard: int, tts: TTS,
             augment: Augmentation | None) -> Place:  # fmt: skip
        """Make one shard in a temporary folder; what is returned moves it into place, the report last.

        Args:
            casts: for each item, the speakers of ``tts`` of whom one is drawn.

        Raises:
            Closed: the job has ended meanwhile.
            ValueError: what the synthesizer or the augmentation gives is no mono audio.
        """
        temporary = self._scratch / f"{split}.{shard:06d}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        report = {"items": len(items), "seconds": 0.0, "clips": 0, "dropped": []}
        report |= {name: Counter() for name in ("speakers", "tasks", "languages")}
        report |= {"histograms": {name: Counter() for name in HISTOGRAMS}}
        report |= {} if self._quality is None else {"quality": []}
        with ManifestWriter(folder=temporary, shard_size=self.shard_size, audio_format=self._audio_format,
                            teacher=self._teacher_name, first_shard=shard) as writer:  # fmt: skip
            for start in range(0, len(items), CLIPS_PER_CALL):
                if self._has_ended():
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise Closed
                batch = items[start : start + CLIPS_PER_CALL]
                speakers = list(map(self._draw_speaker, batch, casts[start : start + CLIPS_PER_CALL]))
                for item, clip in zip(batch, self._utter(batch, speakers, tts, augment, report), strict=True):
                    if isinstance(clip, str):
                        report["dropped"].append({"id": item.id, "text": item.text, "reason": clip})
                    else:
                        writer.write(clip)
                        _count(clip, getattr(tts, "languages", {}), report)
        if report["clips"] == 0:  # so that a shard's number is its place
            write_empty_shard(temporary, shard)
        return partial(self._place, temporary, report, split, shard)

    def _place(self, temporary: Path, report: dict, split: str, shard: int) -> None:
        folder = self._output / split
        folder.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir(), reverse=True):  # recordings before cuts
            path.replace(folder / path.name)
        temporary.rmdir()
        self._report_path(split, shard).parent.mkdir(exist_ok=True)
        write_text(self._report_path(split, shard), json.dumps(report, ensure_ascii=False) + "\n")

    def _report_path(self, split: str, shard: int) -> Path:
        return self._output / "speech" / f"{split}.{shard:06d}.json"

    def _utter(
        self, items: Sequence[Instruction], speakers: Sequence[str], tts: TTS, augment: Augmentation | None,
        report: dict,
    ) -> list[Utterance | str]:  # fmt: skip
        """For each instruction its utterance, or why there is none; what the checks found goes into ``report``."""
        audio = _synthesize(tts, items, speakers)
        clips = [
            self._clip(*spoken, tts.sampling_rate) for spoken in zip(items, speakers, audio, strict=True)
        ]  # fmt: skip
        if self._quality is not None:
            clips = self._check(clips, report)
        clips = [_sound(clip, "") for clip in clips]
        if augment is None:
            return clips
        return [clip if isinstance(clip, str) else self._augment(clip, augment) for clip in clips]

    def _clip(self, item: Instruction, speaker: str, audio: Tensor | Exception, sampling_rate: int) -> Utterance | str:
        if isinstance(audio, Exception):
            logging.warning(f"{item.id} dropped: {type(audio).__name__}: {audio}")
            refused = isinstance(audio, ValueError)
            return f"{FAILED}the synthesizer {'refused the text' if refused else f'failed ({type(audio).__name__})'}"
        if len(audio) > self._max_duration * sampling_rate:
            return f"{FAILED}longer than {self._max_duration:g} s"
        return Utterance(instruction=item, audio=audio, sampling_rate=sampling_rate, speaker=speaker)

    def _check(self, clips: list[Utterance | str], report: dict) -> list[Utterance | str]:
        found = iter(self._quality([clip for clip in clips if isinstance(clip, Utterance)]))
        checked: list[Utterance | str] = []
        for clip in clips:
            rows = next(found) if isinstance(clip, Utterance) else []
            report["quality"] += rows
            checked.append(dropped_for(rows) or clip)
        return checked

    def _augment(self, clip: Utterance, augment: Augmentation) -> Utterance | str:
        audio = augment(clip.audio, clip.sampling_rate, clip.instruction.id)
        _check_mono(audio, f"the augmentation {type(augment).__name__}")
        return _sound(self._clip(clip.instruction, clip.speaker, audio, clip.sampling_rate), " after augmentation")

    def _draw_speaker(self, item: Instruction, cast: Sequence[str]) -> str:
        rng = keyed_rng(self._seed, f"speaker/{item.id}")
        return cast[int(rng.integers(len(cast)))]


def _count(clip: Utterance, languages: Mapping[str, str], report: dict) -> None:
    """Add a clip to its shard's report."""
    seconds, instruction = len(clip.audio) / clip.sampling_rate, clip.instruction
    report["clips"] += 1
    report["seconds"] += seconds
    report["speakers"][clip.speaker] += 1
    report["tasks"][instruction.task] += 1
    target = instruction.extra.get("target_language")
    report["languages"][languages.get(clip.speaker, "not told") + (f" to {target}" if target else "")] += 1
    values = (seconds, len(instruction.text.split()), len(instruction.response.split()))
    for (name, width), value in zip(HISTOGRAMS.items(), values, strict=True):
        report["histograms"][name][math.floor(value / width) * width] += 1


def check_setup(settings: Mapping) -> None:
    """Raise ValueError for what is wrong with the speech of a ``SelfSynthesis``, given its keyword arguments.

    Nothing here needs the teacher, which may take minutes to load and is paid for: ask before.
    """
    check_splits(settings["splits"], settings["train_split"], settings["response_params"], settings["language"])
    check_stage(**{name: settings[name] for name in inspect.signature(check_stage).parameters})


def check_stage(*, max_duration_seconds: float, shard_size: int, audio_format: str, max_failed_share: float) -> None:
    """Raise ValueError for settings with which no clip could be written; see ``SpeechStage``."""
    if not max_duration_seconds > 0:
        raise ValueError(f"synthesis.max_duration_seconds is {max_duration_seconds}; expected seconds above 0")
    if shard_size < 1:
        raise ValueError(f"synthesis.shard_size is {shard_size}; expected at least 1 clip per shard")
    if audio_format not in AUDIO_FORMATS:
        raise ValueError(f"synthesis.audio_format is {audio_format!r}; expected one of {', '.join(AUDIO_FORMATS)}")
    if not 0 <= max_failed_share <= 1:
        raise ValueError(f"synthesis.max_failed_share is {max_failed_share}; expected a share from 0 to 1 (1 never "
                         "stops)")  # fmt: skip


def _synthesize(tts: TTS, items: Sequence[Instruction], speakers: Sequence[str]) -> list[Tensor | Exception]:
    """One waveform or error per item; where a text spoils its batch, the batch is spoken one by one.

    Raises:
        Exception: what is not the fault of a text: no memory, a broken GPU, an error of programming.
        ValueError: what comes is not one mono waveform per text.
    """
    try:
        audio = tts.synthesize([item.text for item in items], speakers)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in MACHINE_TROUBLE):
            raise
        if len(items) == 1:
            return [error]
        return [_synthesize(tts, [item], [speaker])[0] for item, speaker in zip(items, speakers, strict=True)]
    name = f"the synthesizer {type(tts).__name__}"
    if len(audio) != len(items):
        raise ValueError(f"{name} gave {len(audio)} waveforms for {len(items)} texts; expected one for each")
    for waveform in audio:
        _check_mono(waveform, name)
    return audio


def _check_mono(audio: Tensor, name: str) -> None:
    if not (isinstance(audio, Tensor) and audio.dim() == 1 and audio.is_floating_point()):
        found = f"{tuple(audio.shape)}, {audio.dtype}" if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"{name} gave audio of {found}; expected mono, a float32 tensor (A,)")


def _sound(clip: Utterance | str, when: str) -> Utterance | str:
    """The clip, or why it must not be written."""
    if isinstance(clip, str):
        return clip
    (finding,) = FiniteCheck()([clip])
    return f"{FAILED}{finding.reason}{when}" if finding.reason else clip
