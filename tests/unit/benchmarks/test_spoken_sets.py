# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from nemo_rba.benchmarks import spoken as spoken_module
from nemo_rba.benchmarks.benchmark import Unusable, numbered, usable
from nemo_rba.benchmarks.spoken import Spoken
from nemo_rba.functional import typed
from nemo_rba.types import Instruction

from .conftest import check_round_trip, pitch


class Texts:
    """A typed benchmark whose third item cannot be used."""

    name = "texts"
    measure: ClassVar = {"evaluation": "spoken_qa"}

    def __init__(self, texts: Sequence[str]):
        self._texts, self.counts = texts, Counter()

    def __iter__(self) -> Iterator[Instruction]:
        return usable(numbered("texts", self._texts), self._make, self.counts)

    def _make(self, identity: str, text: str) -> Instruction:
        if not text:
            raise Unusable("no words", "")
        return Instruction(id=identity, text=text, response="", task="t", extra={"key": text})


class ToneTTS:
    """A voice is a tone; refuses every text with "mute" in it."""

    sampling_rate = 16000
    speakers = ("400", "600", "800")

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        if any("mute" in text for text in texts):
            raise ValueError("nothing to say")
        return [0.5 * torch.sin(torch.arange(1600) / 16000 * 2 * torch.pi * float(s)) for s in speakers]


def in_words(texts: Sequence[str]) -> list[tuple[str, str | None]]:
    return [(text.replace("3", "three"), "has symbols left" if "%" in text else None) for text in texts]


def spoken(texts: Sequence[str], spoken_form=in_words, num_items=None, seed=0) -> Spoken:
    return Spoken(benchmark=Texts(texts), tts=ToneTTS(), spoken_form=spoken_form, num_items=num_items, seed=seed)


def test_a_typed_set_is_spoken_in_words_and_keeps_what_was_typed(tmp_path):
    benchmark = spoken(["say 3 words", "", "say a word", "10 %", "mute", "say more"])
    items = check_round_trip(benchmark, tmp_path / "manifest")
    assert [item.instruction.text for item in items] == ["say three words", "say a word", "say more"]
    assert [item.instruction.typed for item in items] == ["say 3 words", "", ""]
    assert typed(items[0].instruction) == "say 3 words", "who reads is given what was typed"
    assert items[0].instruction.extra == {"key": "say 3 words"}
    assert all(pitch(item.audio) == int(item.speaker) for item in items)
    assert benchmark.counts == {
        "no words": 1, "spoken form: has symbols left": 1, "the synthesizer refused the text": 1
    }  # fmt: skip


def test_without_a_spoken_form_texts_are_spoken_as_they_are():
    (item,) = spoken(["10 % of 3"], spoken_form=None)
    assert (item.instruction.text, item.instruction.typed) == ("10 % of 3", "")


def test_a_speaker_is_decided_by_item_and_seed_alone(monkeypatch):
    texts = [f"text {n}" for n in range(40)]
    speakers = {item.instruction.id: item.speaker for item in spoken(texts)}
    assert set(speakers.values()) == set(ToneTTS.speakers)
    monkeypatch.setattr(spoken_module, "ITEMS_AT_ONCE", 7)
    drawn = list(spoken(texts, num_items=11))
    assert len(drawn) == 11
    assert all(speakers[item.instruction.id] == item.speaker for item in drawn)
    assert [item.instruction.id for item in drawn] == sorted(item.instruction.id for item in drawn)
    assert {item.instruction.id: item.speaker for item in spoken(texts, seed=1)} != speakers


def test_no_more_items_can_be_drawn_than_there_are():
    with pytest.raises(ValueError, match="texts: num_items is 3; expected 1 to 2, which the set has"):
        list(spoken(["a", "", "b"], num_items=3))
