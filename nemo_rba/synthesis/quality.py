# SPDX-License-Identifier: Apache-2.0
"""Quality control of synthetic speech: each clip is kept, kept as borderline, or dropped, for a reason that is counted.

Synthesizers fail now and then: silence, noise, a sentence broken off, words that are not there. A check is a callable
``(utterances) -> one Finding each`` that looks at clips as the synthesizer made them, before any augmentation. Its
reasons name the rule and not the item, so that their counts mean something; the item's own number is ``value``. Here
are the checks that look at samples and lengths, and ``QualityControl``, which runs all; the one that listens, an ASR
round trip, is in ``quality_asr.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_rba.types import Utterance

KEEP, BORDERLINE, DROP = "keep", "borderline", "drop"
FULL_SCALE = 0.999  # from here on a sample counts as clipped
FRAME_SECONDS = 0.02  # of the check for silence


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check says of one clip."""

    verdict: str  # KEEP, BORDERLINE or DROP
    reason: str  # the rule that was broken, "" where it was kept
    value: float  # what was measured
    heard: str = ""  # the words an ASR heard


QualityCheck = Callable[[Sequence[Utterance]], list[Finding]]
Row = dict[str, str | float]  # id, verdict, reason, value, text, heard: a line of quality.jsonl


class QualityControl:
    """All checks, one after the other, each on the clips that the ones before it did not drop.

    Clips without samples, or with one that is no number, are shown to ``FiniteCheck`` alone: others reckon with them.
    ``SpeechStage`` drops them also where nobody checks.

    Args:
        checks: by name, in the order of doing, cheap ones before dear ones. None switches one off. The name stands
            before its reasons.
        max_dropped_share: of a split's clips; a run that loses more, for whatever reason, stops with an error.

    Raises:
        ValueError: no checks, or a share outside 0 to 1.
    """

    def __init__(self, *, checks: Mapping[str, QualityCheck | None], max_dropped_share: float):
        self._checks = {name: check for name, check in checks.items() if check is not None}
        if not self._checks or not 0 <= max_dropped_share <= 1:
            raise ValueError(f"quality: checks {list(self._checks)}, max_dropped_share={max_dropped_share}; expected "
                             "at least one check and a share from 0 to 1 (1 never stops)")  # fmt: skip
        self.max_dropped_share = max_dropped_share

    def __call__(self, utterances: Sequence[Utterance]) -> list[list[Row]]:
        """For each utterance what is not as it should be: nothing, borderline findings, at the end one that drops."""
        rows: list[list[Row]] = [[] for _ in utterances]
        places = list(range(len(utterances)))
        for name, check in self._checks.items():
            shown = places if isinstance(check, FiniteCheck) else [p for p in places if is_sound(utterances[p].audio)]
            findings = check([utterances[place] for place in shown]) if shown else []
            for place, finding in zip(shown, findings, strict=True):
                if finding.verdict != KEEP:
                    rows[place].append(_row(utterances[place], name, finding))
            places = [place for place in places if dropped_for(rows[place]) is None]
        return rows


def is_sound(audio: torch.Tensor) -> bool:
    """Whether (A,) has samples, all of them numbers."""
    return len(audio) > 0 and bool(torch.isfinite(audio).all())


def dropped_for(rows: Sequence[Row]) -> str | None:
    """The reason to drop a clip, or None; ``rows`` is what ``QualityControl`` says of it."""
    return next((str(row["reason"]) for row in rows if row["verdict"] == DROP), None)


class FiniteCheck:
    """Drops clips without samples, or with one that is NaN or infinite. Value: the share of such samples."""

    def __call__(self, utterances: Sequence[Utterance]) -> list[Finding]:
        """See ``QualityCheck``."""
        return [self._look(utterance.audio) for utterance in utterances]

    def _look(self, audio: torch.Tensor) -> Finding:
        if len(audio) == 0:
            return Finding(verdict=DROP, reason="no samples", value=1.0)
        share = float((~torch.isfinite(audio)).float().mean())
        if share > 0:
            return Finding(verdict=DROP, reason="samples are NaN or infinite", value=share)
        return Finding(verdict=KEEP, reason="", value=0.0)


class DurationCheck:
    """Seconds per character of the text: words that are missing, or babble after them.

    English is read at 0.05 to 0.1. The pauses at both ends count as well, so short texts come out slower.

    Args:
        minimum, maximum: outside of these a clip is dropped.
        borderline_minimum, borderline_maximum: outside of these it is borderline.

    Raises:
        ValueError: limits that are not in the order minimum, borderline minimum, borderline maximum, maximum.
    """

    def __init__(self, *, minimum: float, borderline_minimum: float, borderline_maximum: float, maximum: float):
        limits = (minimum, borderline_minimum, borderline_maximum, maximum)
        if not 0 <= minimum <= borderline_minimum < borderline_maximum <= maximum:
            raise ValueError(f"DurationCheck: {limits} seconds per character; expected 0 <= minimum <= "
                             "borderline_minimum < borderline_maximum <= maximum")  # fmt: skip
        self._limits = limits

    def __call__(self, utterances: Sequence[Utterance]) -> list[Finding]:
        """See ``QualityCheck``."""
        return [self._look(utterance) for utterance in utterances]

    def _look(self, utterance: Utterance) -> Finding:
        minimum, low, high, maximum = self._limits
        value = len(utterance.audio) / utterance.sampling_rate / max(1, len(utterance.instruction.text))
        if value < low:
            verdict, limit = (DROP, minimum) if value < minimum else (BORDERLINE, low)
            return Finding(verdict=verdict, reason=f"shorter than {limit:g} s a character", value=value)
        return grade(value, borderline=high, maximum=maximum, reason="longer than {:g} s a character")


class ClippingCheck:
    """The share of samples at full scale: distortion.

    Args:
        maximum: above it a clip is dropped.
        borderline: above it, it is borderline.

    Raises:
        ValueError: limits upside down, or outside 0 to 1.
    """

    def __init__(self, *, borderline: float, maximum: float):
        check_shares("ClippingCheck", borderline, maximum)
        self._borderline, self._maximum = borderline, maximum

    def __call__(self, utterances: Sequence[Utterance]) -> list[Finding]:
        """See ``QualityCheck``."""
        shares = [float((utterance.audio.abs() >= FULL_SCALE).float().mean()) for utterance in utterances]
        return [
            grade(share, borderline=self._borderline, maximum=self._maximum, reason="more than {:g} of it clipped")
            for share in shares
        ]


class SilenceCheck:
    """The share of frames of 20 ms that are silent: a synthesizer that said nothing, or fell silent on the way.

    Args:
        level_db: a frame is silent when its root mean square is below, in decibels of full scale, e.g. -50.
        maximum: above this share a clip is dropped.
        borderline: above it, it is borderline.

    Raises:
        ValueError: a level that is not below 0, limits upside down or outside 0 to 1.
    """

    def __init__(self, *, level_db: float, borderline: float, maximum: float):
        check_shares("SilenceCheck", borderline, maximum)
        if not level_db < 0:
            raise ValueError(f"SilenceCheck: level_db={level_db}; expected decibels below 0, which is full scale")
        self._level, self._borderline, self._maximum = 10 ** (level_db / 20), borderline, maximum

    def __call__(self, utterances: Sequence[Utterance]) -> list[Finding]:
        """See ``QualityCheck``."""
        return [
            grade(self._share(utterance), borderline=self._borderline, maximum=self._maximum,
                  reason="more than {:g} of it silent")
            for utterance in utterances
        ]  # fmt: skip

    def _share(self, utterance: Utterance) -> float:
        size = max(1, min(len(utterance.audio), round(FRAME_SECONDS * utterance.sampling_rate)))
        frames = utterance.audio.unfold(0, size, size)  # (frames, size), what is left at the end does not count
        return float((frames.square().mean(dim=1).sqrt() < self._level).float().mean())


def grade(value: float, *, borderline: float, maximum: float, reason: str) -> Finding:
    """Drop above ``maximum``, borderline above ``borderline``; ``reason`` holds a place for the limit."""
    if value > maximum:
        return Finding(verdict=DROP, reason=reason.format(maximum), value=value)
    if value > borderline:
        return Finding(verdict=BORDERLINE, reason=reason.format(borderline), value=value)
    return Finding(verdict=KEEP, reason="", value=value)


def check_shares(name: str, borderline: float, maximum: float) -> None:
    """Raise ValueError unless 0 <= borderline <= maximum < 1: nothing is above 1, and the check would be none."""
    if not 0 <= borderline <= maximum < 1:
        raise ValueError(f"{name}: borderline={borderline}, maximum={maximum}; expected 0 <= borderline <= maximum < 1")


def _row(utterance: Utterance, name: str, finding: Finding) -> Row:
    return {
        "id": utterance.instruction.id, "verdict": finding.verdict, "reason": f"{name}: {finding.reason}",
        "value": round(finding.value, 6), "text": utterance.instruction.text, "heard": finding.heard,
    }  # fmt: skip
