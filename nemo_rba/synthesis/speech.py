# SPDX-License-Identifier: Apache-2.0
"""Instructions become clips: spoken, checked, augmented and written, one Shar shard at a time.

A shard is made in a temporary folder and moved into place, then its report is written; a shard that has its report is
not made again. Speakers and augmentations are drawn by the id of an instruction and the synthesizer speaks in calls of
the same clips, so a resumed run gives what an uninterrupted one gives.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo.utils import logging
from torch import Tensor
from tqdm import tqdm

from nemo_rba.manifest import ManifestWriter
from nemo_rba.protocols import TTS
from nemo_rba.synthesis.augment import Augmentation, keyed_rng
from nemo_rba.synthesis.instructions import write_text
from nemo_rba.synthesis.quality import QualityControl, dropped_for
from nemo_rba.types import Instruction, Utterance

CLIPS_PER_CALL = 32  # clips synthesized between two movements of the progress bar


class SpeechStage:
    """Synthesize -> refuse what is too long -> check -> augment -> write.

    Args:
        output: a split's shards go to ``<output>/<split>``, their reports to ``<output>/speech``.
        teacher_name: who wrote the responses, kept in every cut.
        quality: checks the clips before augmentation; None checks nothing.
        max_duration_seconds: longer clips are dropped, before and after augmentation.
        shard_size: clips per shard; what an interruption can cost.
        audio_format: ``flac`` or ``wav``.
        seed: with an instruction's id it decides the speaker.
    """

    def __init__(self, *, output: Path, teacher_name: str, quality: QualityControl | None, max_duration_seconds: float,
                 shard_size: int, audio_format: str, seed: int):  # fmt: skip
        self._output, self._teacher_name, self._quality, self._seed = output, teacher_name, quality, seed
        self._max_duration, self._shard_size, self._audio_format = max_duration_seconds, shard_size, audio_format

    def run(
        self, items: Sequence[Instruction], *, split: str, tts: TTS, augment: Augmentation | None
    ) -> Iterator[dict]:
        """Write the missing shards of a split; yields the report of each shard, as soon as it is there.

        A report holds the numbers of ``items`` and ``clips``, the ``seconds``, clips by ``speakers`` and by ``tasks``,
        what was ``dropped`` (id, text, reason) and, where clips are checked, ``quality``: what the checks found.
        """
        (self._output / "speech").mkdir(exist_ok=True)
        first = 0  # number of the next shard's files: those of a shard without clips do not exist
        with tqdm(total=len(items), desc=f"speech {split}", unit="clip") as progress:
            for shard, start in enumerate(range(0, len(items), self._shard_size)):
                done = self._output / "speech" / f"{split}.{shard:06d}.json"
                batch = items[start : start + self._shard_size]
                report = json.loads(done.read_text(encoding="utf-8")) if done.exists() else None
                if report is None or report["items"] != len(batch):  # a last shard may have grown, by allow_fewer
                    report = self._write_shard(batch, split, first, tts, augment, progress)
                    write_text(done, json.dumps(report, ensure_ascii=False) + "\n")
                else:
                    progress.update(len(batch))
                first += report["clips"] > 0
                yield report

    def _write_shard(self, items: Sequence[Instruction], split: str, number: int, tts: TTS,
                     augment: Augmentation | None, progress: tqdm) -> dict:  # fmt: skip
        """Synthesize one shard in a temporary folder and move it into place; returns its report."""
        temporary, folder = self._output / f".{split}.tmp", self._output / split
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        report = {
            "items": len(items),
            "seconds": 0.0,
            "clips": 0,
            "speakers": Counter(),
            "tasks": Counter(),
            "dropped": [],
        }
        if self._quality is not None:
            report["quality"] = []
        with ManifestWriter(folder=temporary, shard_size=self._shard_size, audio_format=self._audio_format,
                            teacher=self._teacher_name, first_shard=number) as writer:  # fmt: skip
            for start in range(0, len(items), CLIPS_PER_CALL):
                batch = items[start : start + CLIPS_PER_CALL]
                for item, clip in zip(batch, self._utter(batch, tts, augment, report), strict=True):
                    if isinstance(clip, str):
                        report["dropped"].append({"id": item.id, "text": item.text, "reason": clip})
                        continue
                    writer.write(clip)
                    report["clips"] += 1
                    report["seconds"] += len(clip.audio) / clip.sampling_rate
                    report["speakers"][clip.speaker] += 1
                    report["tasks"][item.task] += 1
                progress.update(len(batch))
        for path in sorted(temporary.iterdir(), reverse=True):  # recordings before cuts
            path.replace(folder / path.name)
        temporary.rmdir()
        return report

    def _utter(
        self, items: Sequence[Instruction], tts: TTS, augment: Augmentation | None, report: dict
    ) -> list[Utterance | str]:
        """For each instruction its utterance, or why there is none; what the checks found goes into ``report``."""
        speakers = [self._draw_speaker(tts, item) for item in items]
        audio = _synthesize(tts, items, speakers)
        clips = [
            self._clip(*spoken, tts.sampling_rate) for spoken in zip(items, speakers, audio, strict=True)
        ]  # fmt: skip
        if self._quality is not None:
            clips = self._check(clips, report)
        if augment is None:
            return clips
        return [clip if isinstance(clip, str) else self._augment(clip, augment) for clip in clips]

    def _clip(self, item: Instruction, speaker: str, audio: Tensor | ValueError, sampling_rate: int) -> Utterance | str:
        if isinstance(audio, ValueError):
            logging.warning(f"{item.id} dropped: {audio}")
            return "speech: the synthesizer refused the text"
        if len(audio) > self._max_duration * sampling_rate:
            return f"speech: longer than {self._max_duration:g} s"
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
        return self._clip(clip.instruction, clip.speaker, audio, clip.sampling_rate)

    def _draw_speaker(self, tts: TTS, item: Instruction) -> str:
        rng = keyed_rng(self._seed, f"speaker/{item.id}")
        return tts.speakers[int(rng.integers(len(tts.speakers)))]


def _synthesize(tts: TTS, items: Sequence[Instruction], speakers: Sequence[str]) -> list[Tensor | ValueError]:
    """One waveform or refusal per item; where a text spoils its batch, the batch is spoken one by one."""
    try:
        return tts.synthesize([item.text for item in items], speakers)
    except ValueError as error:
        if len(items) == 1:
            return [error]
    return [_synthesize(tts, [item], [speaker])[0] for item, speaker in zip(items, speakers, strict=True)]
