# SPDX-License-Identifier: Apache-2.0
"""Which shards are to be spoken, which are being spoken, and what became of those that are done."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from nemo.utils import logging
from tqdm import tqdm

from nemo_rba.synthesis.orders import Orders, Place
from nemo_rba.synthesis.quality import QualityControl
from nemo_rba.synthesis.speech import FAILED, SpeechStage
from nemo_rba.synthesis.splits import Split
from nemo_rba.types import Instruction

MAX_ORDERS = 256  # placed at a time: far more than ranks, and few enough to look through

Key = tuple[str, int]  # (split, number of the shard)


class Shards:
    """The shards of all splits. All ranks ``speak``; the first one adds, collects and waits.

    Args:
        lost: called before the error is raised that a split has lost too many clips.
        show: how far the speech is.
    """

    def __init__(self, *, splits: Sequence[Split], speech: SpeechStage, orders: Orders,
                 quality: QualityControl | None, lost: Callable[[], None], show: bool):  # fmt: skip
        self._splits, self._speech, self._orders = splits, speech, orders
        self._quality, self._lost = quality, lost
        self._begun = Counter()  # split -> utterances whose shards were added
        self._queue: deque[tuple[Key, list[Instruction]]] = deque()
        self._waiting: dict[Key, int] = {}  # items of what was ordered, or was there before
        self._reports: dict[Key, dict] = {}
        self._dropped: dict[str, Counter] = {split.name: Counter() for split in splits}  # by reason
        total = sum(split.num_utterances for split in splits)
        self._progress = tqdm(total=total, desc="speech", unit="clip", position=1, disable=not show)

    def add(self, instructions: Mapping[str, Sequence[Instruction]], *, finished: bool) -> None:
        """The shards whose instructions are known; all of them, if no more will be ``finished``."""
        size = self._speech.shard_size
        for split in self._splits:
            found, casts = instructions.get(split.instructions_of, ()), len(split.casts)
            known = min(len(found), split.size) * casts
            whole = known if finished or known == split.num_utterances else known // size * size
            for start in range(self._begun[split.name], whole, size):
                numbers = range(start, min(start + size, whole))
                named = [replace(found[n // casts], id=f"{split.name}-{n:06d}") for n in numbers]
                self._queue.append(((split.name, start // size), named))
            self._begun[split.name] = max(whole, self._begun[split.name])
        self.collect()

    def collect(self) -> None:
        """Read the reports of shards that are done, and have others made.

        Raises:
            ValueError: a split has lost too many clips; what is still to be spoken cannot bring them back.
        """
        there = self._speech.finished()
        for key in [key for key in self._waiting if key in there]:
            report = self._speech.report(*key, self._waiting[key])
            if report is not None:
                del self._waiting[key]
                self._take_note(key, report)
        while self._queue and len(self._waiting) < MAX_ORDERS:
            (split, shard), items = self._queue.popleft()
            report = self._speech.report(split, shard, len(items))
            if report is not None:
                self._take_note((split, shard), report)
                continue
            self._waiting[split, shard] = len(items)
            order = {"split": split, "shard": shard, "items": [asdict(item) for item in items]}
            number = [s.name for s in self._splits].index(split)
            self._orders.place("speech", f"{number:02d}-{split}-{shard:06d}", order)

    def wait(self) -> None:
        """Until all that were added are done.

        Raises:
            ValueError: a split has lost too many of the clips that there were to speak, fewer than asked for maybe.
        """
        self._orders.wait(self._all_done, handlers={})
        for name, count in self._begun.items():
            self._check_losses(name, count)
        for name, reasons in self._dropped.items():
            if reasons:
                logging.warning(f"split {name}: {reasons.total()} of {self._begun[name]} clips dropped, not made up "
                                f"for: {_most_common(reasons)}")  # fmt: skip

    def reports(self) -> dict[str, list[dict]]:
        """By split, of the shards that are done, in order; see ``SpeechStage.report``."""
        keys = sorted(self._reports)
        return {split.name: [self._reports[key] for key in keys if key[0] == split.name] for split in self._splits}

    def speak(self, order: dict) -> Place:
        """Make one shard; on any rank."""
        split = next(split for split in self._splits if split.name == order["split"])
        items = [Instruction(**(item | {"aliases": tuple(item["aliases"])})) for item in order["items"]]
        first = order["shard"] * self._speech.shard_size
        casts = [split.casts[(first + n) % len(split.casts)] for n in range(len(items))]
        where = {"split": split.name, "shard": order["shard"]}
        return self._speech.make(items, casts, **where, tts=split.tts, augment=split.augment)

    def _all_done(self) -> bool:
        self.collect()
        return not (self._queue or self._waiting)

    def close(self) -> None:
        """No more is shown of how far the speech is."""
        self._progress.close()

    def _take_note(self, key: Key, report: dict) -> None:
        self._progress.update(report["items"])
        self._reports[key] = report
        self._dropped[key[0]].update(row["reason"] for row in report["dropped"])
        self._check_losses(key[0], next(split.num_utterances for split in self._splits if split.name == key[0]))

    def _check_losses(self, name: str, asked: int) -> None:
        lost = self._dropped[name]
        failed = Counter({reason: count for reason, count in lost.items() if reason.startswith(FAILED)})
        if failed.total() > self._speech.max_failed_share * asked:
            self._stop(name, asked, failed, f"synthesis.max_failed_share={self._speech.max_failed_share:g}",
                       "in dropped.jsonl of the output: mend the synthesizer (splits.*.tts), change what it is given "
                       "(synthesis.spoken_form, speech_filters) or max_duration_seconds,")  # fmt: skip
        if self._quality is not None and lost.total() > self._quality.max_dropped_share * asked:
            self._stop(name, asked, lost, f"quality.max_dropped_share={self._quality.max_dropped_share:g}",
                       "in dropped.jsonl and quality.jsonl of the output: mend the synthesizer (splits.*.tts), loosen "
                       "quality.checks,")  # fmt: skip

    def _stop(self, name: str, asked: int, lost: Counter, limit: str, advice: str) -> None:
        self._lost()
        raise ValueError(f"split {name}: {lost.total()} of {asked} clips dropped so far, more than {limit} allows, for "
                         f"{_most_common(lost)}. They are listed {advice} or allow a larger share")  # fmt: skip


def _most_common(reasons: Counter) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(4))
