# SPDX-License-Identifier: Apache-2.0
"""A text-only benchmark, spoken by a synthesizer."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from nemo_rba.benchmarks.benchmark import TextBenchmark, Unusable, draw_numbers, skip
from nemo_rba.protocols import TTS
from nemo_rba.types import Instruction, Utterance

ITEMS_AT_ONCE = 32  # texts in one call of the synthesizer

SpokenForm = Callable[[Sequence[str]], Sequence[tuple[str, str | None]]]  # texts -> (words to say, or why not) of each


class Spoken:
    """Makes utterances of a text-only benchmark: every item by a speaker that its id and the seed decide.

    What is spoken becomes ``text``; where that is not what was typed, ``typed`` keeps it, and a reader is given that.

    Args:
        benchmark: what to speak.
        tts: its voices.
        spoken_form: puts numbers and symbols into words (``synthesis.spoken_form``); what it refuses is skipped. None
            leaves that to the synthesizer.
        num_items: how many items to draw, by the seed, in the benchmark's order; None for all.
        seed: decides items and speakers.
    """

    def __init__(
        self, *, benchmark: TextBenchmark, tts: TTS, spoken_form: SpokenForm | None, num_items: int | None, seed: int
    ):
        self.name, self.measure = benchmark.name, benchmark.measure
        self.counts: Counter[str] = Counter()
        self._benchmark, self._tts, self._spoken_form = benchmark, tts, spoken_form
        self._num_items, self._seed = num_items, seed

    def __iter__(self) -> Iterator[Utterance]:
        items = list(self._benchmark)
        drawn = draw_numbers(self.name, len(items), self._num_items, self._seed)
        items = [item for number, item in enumerate(items) if number in drawn]
        self.counts.clear()
        self.counts.update(self._benchmark.counts)
        for start in range(0, len(items), ITEMS_AT_ONCE):
            batch = items[start : start + ITEMS_AT_ONCE]
            for item, spoken in zip(batch, self._speak(batch), strict=True):
                if isinstance(spoken, Unusable):
                    skip(item.id, spoken, self.counts)
                else:
                    yield spoken

    def _speak(self, items: Sequence[Instruction]) -> Iterator[Utterance | Unusable]:
        """The utterance of each item, or why there is none."""
        texts = [item.text for item in items]
        forms = self._spoken_form(texts) if self._spoken_form is not None else [(text, None) for text in texts]
        said = [(item, words) for item, (words, reason) in zip(items, forms, strict=True) if reason is None]
        speakers = [random.Random(f"{self._seed}|{item.id}").choice(self._tts.speakers) for item, _ in said]
        clips = iter(_synthesize(self._tts, [words for _, words in said], speakers) if said else [])
        voices = iter(speakers)
        for item, (words, reason) in zip(items, forms, strict=True):
            if reason is not None:
                yield Unusable(f"spoken form: {reason}", item.text)
                continue
            clip, speaker = next(clips), next(voices)
            if isinstance(clip, ValueError):
                yield Unusable("the synthesizer refused the text", str(clip))
                continue
            if words != item.text:
                item = replace(item, text=words, typed=item.text)
            yield Utterance(instruction=item, audio=clip, sampling_rate=self._tts.sampling_rate, speaker=speaker)


def _synthesize(tts: TTS, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor | ValueError]:
    """One waveform or refusal per text; where a text spoils its batch, the batch is spoken one by one."""
    try:
        return list(tts.synthesize(texts, speakers))
    except ValueError as error:
        if len(texts) == 1:
            return [error]
    return [_synthesize(tts, [text], [speaker])[0] for text, speaker in zip(texts, speakers, strict=True)]
