# SPDX-License-Identifier: Apache-2.0
"""How the items of a held-out set reach the student: heard as they are, heard through something, or read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from nemo_rba.evaluation.tasks import ItemTask
from nemo_rba.manifest import read_speakers
from nemo_rba.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How everybody answers the items of a held-out set."""

    params: SamplingParams  # of answers
    transcribe_context: str  # typed prompt that makes the SpeechLM write down what it hears, for the cascade
    transcribe_params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One condition of an evaluation.

    Several with the same ``curve`` are points of one robustness curve, e.g. over the signal-to-noise ratio.
    """

    manifest: Path
    typed: bool = False  # the student reads the words: what it would have said had it heard everything
    augmentation: Callable[[Tensor, int, str], Tensor] | None = None  # (audio (A,), Hz, key) -> audio, while reading
    settings: Mapping[str, object] = field(default_factory=dict)  # of the augmentation, for the record; plain JSON
    curve: str = ""  # what is varied, with its unit, e.g. "SNR, dB"; "" for a condition of its own
    at: float = 0.0  # where on the curve
    make_task: Callable[..., ItemTask] | None = None  # (name=, batches=) -> its measures; None for the evaluation's own
    decoding: Decoding | None = None  # None for the evaluation's own
    notes: tuple[str, ...] = ()  # what a reader must know of these measures

    def __post_init__(self) -> None:
        if self.typed and (self.augmentation is not None or self.curve):
            raise ValueError(
                f"conditions: a typed condition of {self.manifest.name} has an augmentation or a curve; expected "
                "neither, as nothing is heard"
            )

    @property
    def way(self) -> dict[str, object]:
        """How items reach the student, as far as answers depend on it; plain JSON."""
        return {"typed": self.typed, "augmentation": dict(self.settings) if self.augmentation is not None else None}

    def speakers(self) -> dict[str, str]:
        """Id of every item -> who speaks it, read from the manifest; nobody where items are read."""
        return {} if self.typed else read_speakers(self.manifest)


def check_curves(held_out: Mapping[str, HeldOut]) -> None:
    """Refuse, with a ``ValueError``, two conditions at the same place of one curve: it could show but one of them."""
    places: dict[tuple[str, float], str] = {}
    for name, condition in held_out.items():
        place = (condition.curve, condition.at)
        if condition.curve and place in places:
            raise ValueError(
                f"conditions {places[place]!r} and {name!r} are both at {condition.at:g} of the curve "
                f"{condition.curve!r}; expected different places: change at, or give one of them a curve of its own"
            )
        places[place] = name
