# SPDX-License-Identifier: Apache-2.0
"""Cuts in, ``SpeechBatch`` out. What cannot be used is skipped, counted by reason and named in a file, never fatal.

A real corpus always holds a missing file, a 20-minute recording or a broken header. One of them must neither end a run
nor vanish unseen: each process writes it once to the quarantine file (JSONL: id, reason, detail) and counts it once in
``SpeechInstructionDataset.counts``. How a batch is kept full in spite of them is the loader's affair.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MultiCut
from nemo.utils import logging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_rba.manifest import cut_to_instruction, validate_cut
from nemo_rba.protocols import PromptEncoder
from nemo_rba.types import Instruction, SpeechBatch

_MAX_PEAK = 2.0  # beyond this a float file is not on the [-1, 1] scale; up to it, clipping hides resampler overshoot


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechItem:
    """One row of a ``SpeechBatch``, before padding."""

    instruction: Instruction
    audio: Tensor  # (A,)
    prompt_ids: Tensor  # (P,)
    response_ids: Tensor  # (T,)


class Unusable(Exception):
    """An item that is skipped: ``reason`` is one of a few phrases to count by, ``detail`` is for a human."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SpeechInstructionDataset(torch.utils.data.Dataset):
    """Dataset in Lhotse's sense: indexed by a ``CutSet``, one mini-batch per call.

    Args:
        prompt: words to ids, the student's own.
        sampling_rate: Hz the speech encoder expects; other rates are resampled and counted as "resampled".
        max_duration_seconds: longer cuts are unusable.
        max_response_tokens: longer responses, with their end of turn, are unusable.
        quarantine: JSONL file to append unusable items to. Ranks may share it: a line is one write.
        needs_response: whether an item without a response is unusable; False for benchmarks that have none.
        augmentation: ``(audio (A,), sampling_rate, key) -> audio (A',)``, applied to what was read. The key is made of
            the cut's id, of the epoch where there are several, and of "read/", so that the draws are not those that
            another augmentation of the same seed made when the cut was written.

    Raises:
        ValueError: a limit is not positive, or the quarantine file cannot be written.
    """

    def __init__(
        self,
        *,
        prompt: PromptEncoder,
        sampling_rate: int,
        max_duration_seconds: float,
        max_response_tokens: int,
        quarantine: Path,
        needs_response: bool = True,
        augmentation: Callable[[Tensor, int, str], Tensor] | None = None,
    ):
        limits = {
            "sampling_rate": sampling_rate,
            "max_duration_seconds": max_duration_seconds,
            "max_response_tokens": max_response_tokens,
        }
        for key, value in limits.items():
            if value <= 0:
                raise ValueError(f"{key}={value}: expected a number above 0")
        self.prompt = prompt
        self.sampling_rate = sampling_rate
        self.max_duration_seconds = max_duration_seconds
        self.max_response_tokens = max_response_tokens
        self.quarantine = Path(quarantine)
        self.needs_response = needs_response
        self.augmentation = augmentation
        self.counts: Counter[str] = Counter()  # "resampled", and the reasons for skipping, -> number of cuts
        self._counted: set[tuple[str, str]] = set()
        self._require_writable_quarantine()

    def __getitem__(self, cuts: CutSet) -> SpeechBatch | None:
        """The usable ones among ``cuts``, in their order; None when there is none."""
        items = [item for cut in cuts if (item := self.load(cut)) is not None]
        return self.collate(items) if items else None

    def load(self, cut: Cut, epoch: int | None = None) -> SpeechItem | None:
        """Read and encode one cut; None, counted and written down, when it is unusable.

        An augmentation draws anew in every ``epoch``; without one a cut always sounds the same.
        """
        try:
            return self._load(cut, f"read/{cut.id}" if epoch is None else f"read/{epoch}/{cut.id}")
        except Unusable as problem:
            self._set_aside(cut.id, problem)
            return None

    def collate(self, items: Sequence[SpeechItem]) -> SpeechBatch:
        """Pad B items on the right."""
        audio, prompts, responses = zip(*((i.audio, i.prompt_ids, i.response_ids) for i in items), strict=True)
        return SpeechBatch(
            instructions=tuple(item.instruction for item in items),
            audio=pad_sequence(audio, batch_first=True),
            audio_lens=_lengths(audio),
            prompt_ids=pad_sequence(prompts, batch_first=True, padding_value=self.prompt.pad_id),
            prompt_lens=_lengths(prompts),
            response_ids=pad_sequence(responses, batch_first=True, padding_value=self.prompt.pad_id),
            response_lens=_lengths(responses),
        )

    def _load(self, cut: Cut, key: str) -> SpeechItem:
        resampled = cut.has_recording and cut.sampling_rate != self.sampling_rate
        if resampled:
            cut = cut.resample(self.sampling_rate)
        first = (
            cut.to_mono()[0].with_id(cut.id) if isinstance(cut, MultiCut) else cut
        )  # the manifest's rules speak of one channel
        reason = validate_cut(
            first, sampling_rate=self.sampling_rate, max_duration_seconds=self.max_duration_seconds,
            needs_response=self.needs_response,
        )  # fmt: skip
        if reason is not None:
            raise Unusable(reason, f"{cut.duration:.2f} s of audio")
        instruction = cut_to_instruction(first)
        try:
            prompt_ids = self.prompt.encode_prompt(instruction)
            response_ids = self.prompt.encode_response(instruction.response)
        except ValueError as error:
            raise Unusable("text cannot be encoded", str(error)) from error
        if len(response_ids) > self.max_response_tokens:
            raise Unusable("response too long", f"{len(response_ids)} tokens, limit {self.max_response_tokens}")
        audio = self._augment(self._audio(cut), key)
        if resampled:
            self._count(cut.id, "resampled")
        return SpeechItem(
            instruction=instruction,
            audio=audio,
            prompt_ids=torch.tensor(prompt_ids, dtype=torch.int64),
            response_ids=torch.tensor(response_ids, dtype=torch.int64),
        )

    def _audio(self, cut: Cut) -> Tensor:
        """Mono float32 (A,) in [-1, 1]; channels are averaged."""
        for source in cut.recording.sources:
            if source.type == "file" and not Path(source.source).is_file():
                raise Unusable("missing audio", f"no file {source.source}")
        try:
            samples = torch.from_numpy(cut.load_audio())  # (channels, A)
        except Exception as error:  # whatever a decoder may raise
            message = " ".join(str(error).split())[:300]  # Lhotse's run to a page
            raise Unusable("unreadable audio", f"{type(error).__name__}: {message}") from error
        audio = samples.to(torch.float32).mean(dim=0)
        if audio.numel() == 0:
            raise Unusable("empty audio", "0 samples")
        if not torch.isfinite(audio).all():
            raise Unusable("audio not finite", f"{int((~torch.isfinite(audio)).sum())} samples are NaN or infinite")
        peak = float(audio.abs().max())
        if peak > _MAX_PEAK:
            raise Unusable("audio out of range", f"peak {peak:.1f}, expected samples in [-1, 1]")
        return audio.clamp_(-1.0, 1.0)

    def _augment(self, audio: Tensor, key: str) -> Tensor:
        """The audio (A,) as it is to be heard, (A',); an augmentation that slows down can make it too long."""
        if self.augmentation is None:
            return audio
        audio = self.augmentation(audio, self.sampling_rate, key)
        if audio.numel() == 0 or not torch.isfinite(audio).all():
            raise Unusable("not finite after augmentation", f"{audio.numel()} samples")
        if len(audio) > self.max_duration_seconds * self.sampling_rate:
            raise Unusable(
                "too long after augmentation",
                f"{len(audio) / self.sampling_rate:.2f} s, limit {self.max_duration_seconds:g} s",
            )
        return audio

    def _count(self, cut_id: str, event: str) -> bool:
        """Count an event once per cut; False when it was met before, in an earlier epoch."""
        if (cut_id, event) in self._counted:
            return False
        self._counted.add((cut_id, event))
        self.counts[event] += 1
        return True

    def _set_aside(self, cut_id: str, problem: Unusable) -> None:
        if not self._count(cut_id, problem.reason):
            return
        logging.warning(f"skipping '{cut_id}': {problem.reason}, see {self.quarantine}")
        entry = {"id": cut_id, "reason": problem.reason, "detail": problem.detail}
        with self.quarantine.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _require_writable_quarantine(self) -> None:
        try:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            self.quarantine.open("a").close()
        except OSError as error:
            raise ValueError(
                f"quarantine='{self.quarantine}' cannot be written ({error.strerror}); name another file"
            ) from error


def _lengths(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
