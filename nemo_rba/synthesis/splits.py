# SPDX-License-Identifier: Apache-2.0
"""What sets a synthesis makes, and which instruction belongs to which."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_rba.protocols import TTS
from nemo_rba.synthesis.augment import Augmentation, check_rate
from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.synthesis.text import Quota
from nemo_rba.types import Instruction, SamplingParams

EVERY_VOICE = "every_voice"


@dataclass(frozen=True, kw_only=True)
class Split:
    """One named set of utterances."""

    name: str  # folder below the output
    size: int  # instructions, with one answer each; 0 leaves the split out
    tts: TTS  # its voices
    augment: Augmentation | None  # None = clean speech
    instructions_of: str  # its own name, or the split whose first ``size`` instructions it speaks again
    shares: Mapping[str, float]  # kind -> share of ``size``, e.g. {open: 0.5, closed: 0.5}; {} = as they come
    seen_speakers: bool  # True allows voices of the training split
    num_responses: int  # of the teacher to each instruction; each is an instruction of its own in ``size``
    recordings: int | str  # of each instruction: how many, by speakers that are drawn, or "every_voice": in each voice

    @cached_property
    def casts(self) -> list[list[str]]:
        """Whom the speaker of each recording is drawn from: all speakers, or with "every_voice" those of one voice."""
        if self.recordings != EVERY_VOICE:
            return [list(self.tts.speakers)] * self.recordings
        voices = voices_of(self.tts)
        return [[s for s in self.tts.speakers if voices[s] == voice] for voice in dict.fromkeys(voices.values())]

    @property
    def num_utterances(self) -> int:
        return self.size * len(self.casts)

    def quotas(self) -> dict[Quota, int]:
        """How many instructions of each kind to find; none where another split's are spoken."""
        if self.instructions_of != self.name:
            return {}
        if not self.shares:
            return {(self.name, ""): self.size}
        sizes = {(self.name, kind): int(self.size * share) for kind, share in self.shares.items()}
        first = next(iter(sizes))
        sizes[first] += self.size - sum(sizes.values())
        return sizes


def hash_split(text: str, *, shares: Mapping[str, float]) -> str:
    """A split by the hash of the words: the same words are never in two splits. Shares need not add up to 1."""
    point = int(hashlib.md5(normalize_text(text).encode()).hexdigest(), 16) / 2**128 * sum(shares.values())
    for name, share in shares.items():
        point -= share
        if point < 0:
            return name
    return name


def one_name(text: str, *, name: str) -> str:
    """The same task or kind for every text, where nothing finer is known."""
    return name


def check_splits(
    splits: Sequence[Split], train_split: str, response_params: SamplingParams, language: str | None
) -> None:
    """Raise ValueError where splits contradict each other, share voices that they must not, or cannot be spoken.

    Args:
        language: that all voices must speak, as far as they tell, see ``check_language``; None for any.
    """
    splits = made(splits)
    by_name = {split.name: split for split in splits}
    if len(by_name) != len(splits) or train_split not in by_name:
        raise ValueError(f"synthesis.splits are {[s.name for s in splits]}, synthesis.train_split is {train_split!r}; "
                         "expected different names, the training split among them")  # fmt: skip
    train = by_name[train_split]
    for split in splits:
        if split.size < 0 or split.instructions_of not in by_name:
            raise ValueError(f"split {split.name}: size {split.size}, instructions_of {split.instructions_of!r}; "
                             f"expected a size of at least 0 and one of {sorted(by_name)}")  # fmt: skip
        if split.recordings != EVERY_VOICE and not (type(split.recordings) is int and split.recordings >= 1):
            raise ValueError(f"split {split.name}: recordings {split.recordings!r}; expected how many of each "
                             f"instruction, at least 1, or {EVERY_VOICE}")  # fmt: skip
        if split.num_responses < 1 or (split.num_responses > 1 and response_params.temperature == 0):
            raise ValueError(f"split {split.name}: num_responses {split.num_responses} at response_params.temperature "
                             f"{response_params.temperature:g}; expected at least 1, and for several a temperature "
                             "above 0, or all would be the same")  # fmt: skip
        if split.num_responses > 1 and split.instructions_of != split.name:
            raise ValueError(f"split {split.name}: num_responses {split.num_responses}, but it speaks what "
                             f"{split.instructions_of} has found; set it there, and 1 here")  # fmt: skip
        source = by_name[split.instructions_of]
        if source.instructions_of != source.name or split.size > source.size:
            raise ValueError(f"split {split.name} wants {split.size} instructions of {source.name}, which finds "
                             f"{sum(source.quotas().values())} of its own; lower its size")  # fmt: skip
        if split.shares and abs(sum(split.shares.values()) - 1) > 1e-6:
            raise ValueError(f"split {split.name}: shares {dict(split.shares)} add up to "
                             f"{sum(split.shares.values()):g}; expected 1")  # fmt: skip
        if split.tts.sampling_rate != train.tts.sampling_rate:
            raise ValueError(f"split {split.name} is spoken at {split.tts.sampling_rate} Hz, {train.name} at "
                             f"{train.tts.sampling_rate} Hz; give all the same tts.sampling_rate")  # fmt: skip
        check_language(split, language)
        check_rate(split.augment, split.tts.sampling_rate)
        voices, taken = voices_of(split.tts), set(voices_of(train.tts).values())
        shared = sorted(speaker for speaker, voice in voices.items() if voice in taken)
        if split is not train and shared and not split.seen_speakers:
            raise ValueError(f"split {split.name} shares {len(shared)} speakers with {train.name} ({shared[0]}, which "
                             f"is the voice {voices[shared[0]]}, ...); give it other tts.voices, or set seen_speakers: "
                             "true")  # fmt: skip


def made(splits: Sequence[Split]) -> list[Split]:
    """Those that are not left out."""
    return [split for split in splits if split.size]


def voices_of(tts: TTS) -> dict[str, str]:
    """Speaker -> voice: what the synthesizer's ``voices`` say; else a speaker is a voice of its own."""
    told = getattr(tts, "voices", {})
    return {speaker: told.get(speaker, speaker) for speaker in tts.speakers}


def check_language(split: Split, language: str | None) -> None:
    """Raise ValueError where a voice tells, by the synthesizer's ``languages``, that it speaks another language.

    Regional codes belong to their language: en-us and en-gb-x-rp to en.
    """
    told = getattr(split.tts, "languages", {})
    others = {speaker: told[speaker] for speaker in split.tts.speakers if speaker in told}
    others = {s: code for s, code in others.items() if language and not _belongs(code.lower(), language.lower())}
    if others:
        listed = ", ".join(f"{code} ({speaker})" for code, speaker in {c: s for s, c in others.items()}.items())
        raise ValueError(f"split {split.name}: {len(others)} of {len(split.tts.speakers)} speakers do not speak "
                         f"synthesis.language={language}, but {listed}; give it other voices (splits.*.tts), or set "
                         "synthesis.language to null where every text is in the language of its voice")  # fmt: skip


def _belongs(code: str, language: str) -> bool:
    return code == language or code.startswith(f"{language}-")


def check_disjoint(splits: Mapping[str, list[Instruction]]) -> None:
    """Raise ValueError where the same words are in two splits."""
    owner: dict[str, str] = {}
    for name, items in splits.items():
        for item in items:
            other = owner.setdefault(normalize_text(item.text), name)
            if other != name:
                raise ValueError(f"the instruction {item.text!r} is in {other} and in {name}; synthesis.split_of must "
                                 "give the same split to texts that sound alike")  # fmt: skip
