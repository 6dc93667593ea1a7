# SPDX-License-Identifier: Apache-2.0
"""What making speech costs beside the synthesizer alone, how memory grows with the data set, and de-duplication.

    python -m bench.synthesis 10000        # MB of a data set of so many items, in this process

The teacher is left out: instructions are words drawn at random, answered already.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.resident import highest_resident, resident
from nemo_rba.synthesis.augment import NoiseAugmentation
from nemo_rba.synthesis.deduplicate import NearDuplicateFilter
from nemo_rba.synthesis.filters import DuplicateFilter, Filter
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.pipeline import SelfSynthesis
from nemo_rba.synthesis.quality import ClippingCheck, DurationCheck, FiniteCheck, QualityControl, SilenceCheck
from nemo_rba.synthesis.speech import SpeechStage
from nemo_rba.synthesis.splits import Split, one_name
from nemo_rba.synthesis.tts import EspeakTTS
from nemo_rba.types import Instruction, SamplingParams

SAMPLE = (
    "please tell me what the weather will be like tomorrow and write a short note to my sister about our garden where "
    "birds sing every morning before people go to work or school because trees make good homes for small animals"
)
WORDS = SAMPLE.split()
SHARD_SIZE = 200
ROWS = ("synthesizer alone", "+ FLAC and Shar", "+ checks", "+ noise", "whole pipeline")


class RandomWords:
    """A sampler of answered instructions."""

    def __init__(self, *, num_words: int, batch_size: int):
        self._num_words, self._batch_size = num_words, batch_size

    def batch(self, index: int) -> list[Draft]:
        """``batch_size`` drafts, of ``num_words`` words and a number each."""
        first = index * self._batch_size
        return [Draft(text=sentence(first + n, self._num_words), response="yes") for n in range(self._batch_size)]


def sentence(number: int, num_words: int) -> str:
    """Words drawn by the number, and the number's digits as words, so that no two are alike."""
    rng = np.random.default_rng(number)
    return " ".join(
        [*(WORDS[i] for i in rng.integers(len(WORDS), size=num_words)), *(WORDS[int(d)] for d in str(number))]
    )


def voices() -> EspeakTTS:
    """Twelve speakers at 16 kHz."""
    return EspeakTTS(voices=["en-us", "en-us+m3", "en-us+f2", "en"], rates=[150, 170, 190], pitches=[50],
                     sampling_rate=16000)  # fmt: skip


def checks() -> QualityControl:
    """Those of conf/synthesis/magpie.yaml, without the ASR round trip."""
    limits = {"minimum": 0.03, "borderline_minimum": 0.04, "borderline_maximum": 0.15, "maximum": 0.25}
    return QualityControl(max_dropped_share=0.5, checks={
        "finite": FiniteCheck(), "duration": DurationCheck(**limits),
        "clipping": ClippingCheck(borderline=0.001, maximum=0.01),
        "silence": SilenceCheck(level_db=-50.0, borderline=0.4, maximum=0.6),
    })  # fmt: skip


def noise() -> NoiseAugmentation:
    """As the tiny recipe's."""
    return NoiseAugmentation(snr_db_min=15, snr_db_max=35, color="white", peak_min=0.3, peak_max=0.9, seed=1)


def pipeline(output: Path, num_items: int, num_words: int) -> SelfSynthesis:
    """The whole of synthesis, without a teacher."""
    train = Split(name="train", size=num_items, tts=voices(), augment=noise(), instructions_of="train", shares={},
                  seen_speakers=True, num_responses=1, recordings=1)  # fmt: skip
    return SelfSynthesis(
        teacher=None, teacher_name="none", sampler=RandomWords(num_words=num_words, batch_size=500),
        instruction_filters=[DuplicateFilter()], spoken_form=None, speech_filters=[], response_filters=[],
        response_params=SamplingParams(max_new_tokens=1), context="", splits=[train], train_split="train",
        split_of=lambda text: one_name(text, name="train"), task_of=lambda text: "any", kind_of=lambda text: "",
        batches_at_once=1, max_batches=10**6, allow_fewer=False, max_duration_seconds=20.0, shard_size=SHARD_SIZE,
        audio_format="flac", output=str(output), on_change="refuse", seed=1, quality=checks(), language="en",
        max_failed_share=0.5,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one way to make clips."""

    what: str
    clips: int
    audio_seconds: float
    seconds: list[float]  # CPU seconds of each repeat

    @property
    def per_clip(self) -> float:
        return statistics.median(self.seconds) / self.clips

    @property
    def times_real_time(self) -> float:
        return self.audio_seconds / statistics.median(self.seconds)


def stages(*, clips: int, num_words: int, repeats: int) -> list[Cost]:
    """CPU seconds of every row of ``ROWS``, in turns; the shard is made of the same clips by all."""
    items = [Instruction(id=f"train-{n:06d}", text=sentence(n, num_words), response="yes", task="any", context="")
             for n in range(clips)]  # fmt: skip
    tts = voices()
    speakers = [tts.speakers[n % len(tts.speakers)] for n in range(clips)]
    audio_seconds = sum(len(clip) for clip in tts.synthesize([i.text for i in items], speakers)) / tts.sampling_rate
    found = {row: [] for row in ROWS}

    def speech(quality: QualityControl | None, augment: NoiseAugmentation | None) -> Callable[[Path], object]:
        def make(folder: Path) -> None:
            stage = SpeechStage(output=folder, teacher_name="none", quality=quality, max_duration_seconds=20.0,
                                shard_size=clips, audio_format="flac", seed=1, scratch=folder / "scratch",
                                has_ended=lambda: False, max_failed_share=0.5)  # fmt: skip
            stage.make(items, [tts.speakers] * len(items), split="train", shard=0, tts=tts, augment=augment)()

        return make

    ways = dict(zip(ROWS, (
        lambda folder: tts.synthesize([item.text for item in items], speakers), speech(None, None),
        speech(checks(), None), speech(checks(), noise()),
        lambda folder: pipeline(folder, clips, num_words).run({}),
    ), strict=True))  # fmt: skip
    for _ in range(repeats):
        for row, way in ways.items():
            with tempfile.TemporaryDirectory() as name, quiet():
                begin = time.process_time()
                way(Path(name))
                found[row].append(time.process_time() - begin)
    return [Cost(what=row, clips=clips, audio_seconds=audio_seconds, seconds=found[row]) for row in ROWS]


def stage_rows(costs: Sequence[Cost]) -> list[dict[str, str]]:
    """Table 1."""
    alone = costs[0]
    return [
        {
            "": cost.what,
            "clips a CPU second": f"{1 / cost.per_clip:.0f}",
            "times real time": f"{cost.times_real_time:.0f}",
            "of the synthesizer's speed": f"**{100 * alone.per_clip / cost.per_clip:.0f} %**",
        }
        for cost in costs
    ]


def ranks(*, clips: int, num_words: int, numbers: Sequence[int]) -> list[dict[str, str]]:
    """Table 2: seconds on the wall of the whole pipeline by so many ranks, started at once."""
    fork, rows = multiprocessing.get_context("fork"), []
    for number in numbers:
        with tempfile.TemporaryDirectory() as name, quiet():
            processes = [fork.Process(target=_one_rank, args=(Path(name), clips, num_words, rank))
                         for rank in range(number)]  # fmt: skip
            begin = time.monotonic()
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            seconds = time.monotonic() - begin
            if any(process.exitcode for process in processes):
                raise RuntimeError(f"exit codes of {number} ranks: {[process.exitcode for process in processes]}")
        rows.append({"ranks": str(number), "seconds": f"{seconds:.1f}", "clips a second": f"{clips / seconds:.0f}"})
    return rows


def _one_rank(output: Path, clips: int, num_words: int, rank: int) -> None:
    pipeline(output, clips, num_words).run({}, rank)


def memory(numbers: Sequence[int]) -> list[dict[str, str]]:
    """Table 3: resident MB of the whole pipeline, each number of items in a process of its own."""
    rows = []
    for number in numbers:
        done = subprocess.run(
            [sys.executable, "-m", "bench.synthesis", str(number)], cwd=Path(__file__).parents[1], text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"bench.synthesis {number} failed:\n{done.stderr[-2000:]}")
        loaded, peak, seconds = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append({"items": f"{number:,}", "before, MB": f"{loaded:.0f}", "peak, MB": f"{peak:.0f}",
                     "more, MB": f"**{peak - loaded:.0f}**", "seconds": f"{seconds:.0f}"})  # fmt: skip
    return rows


def deduplication(num_texts: int) -> list[dict[str, str]]:
    """Table 4: texts of a dozen words, a tenth of them near copies of earlier ones."""
    texts = [sentence(n if n % 10 else max(n - 7, 0), 10) + (" too" if n % 10 == 0 else "") for n in range(num_texts)]
    items = [Instruction(id=str(n), text=text, response="", task="", context="") for n, text in enumerate(texts)]
    near = NearDuplicateFilter(ngram=2, threshold=0.8, num_permutations=64, seed=1)
    return [_filtered("exact", DuplicateFilter(), items), _filtered("MinHash, 64 permutations", near, items)]


def _filtered(name: str, judge: Filter, items: Sequence[Instruction]) -> dict[str, str]:
    gc.collect()
    before, begin = resident(), time.process_time()
    dropped = sum(judge.reason(item) is not None for item in items)
    seconds = time.process_time() - begin
    return {"filter": name, "texts": f"{len(items):,}", "dropped": f"{dropped:,}", "CPU seconds": f"{seconds:.1f}",
            "texts a second": f"{len(items) / seconds:,.0f}", "memory, MB": f"{resident() - before:.0f}"}  # fmt: skip


@contextlib.contextmanager
def quiet():
    """No progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def main(num_items: int) -> None:
    with tempfile.TemporaryDirectory() as name, quiet():
        whole = pipeline(Path(name), num_items, num_words=1)
        pipeline(Path(name) / "warm", 50, num_words=1).run({})  # what is loaded at the first use
        begin = time.monotonic()
        loaded, peak = highest_resident(lambda: whole.run({}))
    print(json.dumps([loaded, peak, time.monotonic() - begin]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
