# SPDX-License-Identifier: Apache-2.0
"""Self-synthesis: a teacher's instructions and answers, spoken, as a Lhotse Shar folder per split.

Stages: text (``instructions.TextStage``: sample, filter, answer, filter), then speech (``speech.SpeechStage``: speak,
check, augment, write), one shard at a time. Both can be interrupted at any moment and go on where they were when run
again: text by finished batches, speech by finished shards. Everything is drawn by keys (batch number, utterance id),
never by order of work, so a resumed run gives what an uninterrupted one gives. The output folder:

    config.json  text/batch-*.jsonl  speech/*.json  <split>/cuts.* recording.*  counts.json  dropped.jsonl  card.*
    quality.jsonl  where clips are checked: the dropped and the borderline ones

A clip that is dropped is not made up for: its split has one less, the account says so, and the test sets of several
voices, which speak the same instructions, stay comparable.
"""

import copy
import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo.utils import logging

from nemo_rba.protocols import TTS, Teacher
from nemo_rba.synthesis.augment import Augmentation
from nemo_rba.synthesis.filters import Filter, normalize_text
from nemo_rba.synthesis.instructions import (
    BARREN_SAMPLES,
    Quota,
    Sampler,
    TextResult,
    TextStage,
    write_jsonl,
    write_text,
)
from nemo_rba.synthesis.quality import BORDERLINE, QualityControl
from nemo_rba.synthesis.speech import SpeechStage
from nemo_rba.synthesis.spoken_form import SpokenForm
from nemo_rba.types import Instruction, SamplingParams

FREE_KEYS = ("output", "max_batches", "allow_fewer", "on_change")  # may change between two runs of one data set
FREE_QUALITY_KEYS = ("max_dropped_share",)  # and these of ``quality``
CLIP_SECONDS_GUESS = 4.0  # for the estimate of disk space


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One named set of utterances."""

    name: str  # folder below the output
    size: int  # utterances
    tts: TTS  # its voices
    augment: Augmentation | None  # None = clean speech
    instructions_of: str  # its own name, or the split whose first ``size`` instructions it speaks again
    shares: Mapping[str, float]  # kind -> share of ``size``, e.g. {open: 0.5, closed: 0.5}; {} = as they come
    seen_speakers: bool  # True allows speakers of the training split

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


class SelfSynthesis:
    """The whole pipeline; ``run`` does what is not yet done.

    Args:
        teacher, sampler, instruction_filters, spoken_form, speech_filters, response_filters, response_params, context,
            split_of, task_of, kind_of: the text stage, see ``TextStage``.
        teacher_name: kept in every cut, e.g. ``meta-llama/Llama-3.1-8B-Instruct``.
        splits: what to make, in the order of making.
        train_split: the split that the others must share no instruction with, nor a speaker unless ``seen_speakers``.
        max_batches: sampling stops here, met quotas or not.
        allow_fewer: True goes on with what was found, False stops with an error.
        max_duration_seconds: longer clips are dropped.
        shard_size: clips per shard; what an interruption can cost.
        audio_format: ``flac`` or ``wav``.
        output: folder to write.
        on_change: what to do where ``output`` holds data of another configuration: ``refuse``, or ``restart``, which
            sets the old folder aside.
        seed: decides answers and speakers.
        quality: checks every clip; None checks nothing.

    Raises:
        ValueError: splits that contradict each other, speakers shared with the training split, an unusable output.
    """

    def __init__(self, *, teacher: Teacher, teacher_name: str, sampler: Sampler,
                 instruction_filters: Sequence[Filter], spoken_form: SpokenForm | None,
                 speech_filters: Sequence[Filter], response_filters: Sequence[Filter],
                 response_params: SamplingParams, context: str, splits: Sequence[Split], train_split: str,
                 split_of: Callable[[str], str], task_of: Callable[[str], str], kind_of: Callable[[str], str],
                 max_batches: int, allow_fewer: bool, max_duration_seconds: float, shard_size: int, audio_format: str,
                 output: str, on_change: str, seed: int, quality: QualityControl | None):  # fmt: skip
        _check_splits(splits, train_split)
        if on_change not in ("refuse", "restart"):
            raise ValueError(f"synthesis.on_change is {on_change!r}; expected 'refuse' or 'restart'")
        self._teacher_name, self._splits, self._train_split = teacher_name, splits, train_split
        self._max_batches, self._allow_fewer, self._on_change = max_batches, allow_fewer, on_change
        self._output, self._quality = Path(output), quality
        self._text = {
            "teacher": teacher, "sampler": sampler, "response_params": response_params, "context": context,
            "spoken_form": spoken_form, "split_of": split_of, "task_of": task_of, "kind_of": kind_of, "seed": seed,
        }  # fmt: skip
        self._filters = {
            "instruction_filters": instruction_filters, "speech_filters": speech_filters,
            "response_filters": response_filters,
        }  # fmt: skip
        self._speech = SpeechStage(
            output=self._output, teacher_name=teacher_name, quality=quality, max_duration_seconds=max_duration_seconds,
            shard_size=shard_size, audio_format=audio_format, seed=seed,
        )  # fmt: skip
        _check_output(self._output, splits)

    def run(self, config: Mapping) -> dict:
        """Make the data set; returns what ``card.json`` holds.

        Args:
            config: the configuration this object was built from, as plain values. It is kept beside the data, and a
                later run with another one is refused.

        Raises:
            ValueError: another configuration's data in the output, quotas not met, instructions shared between splits,
                too many clips dropped.
        """
        try:
            self._check_config(config)
            text = self._run_text()
            reports = self._run_speech(text)
            card = self._account(text, reports)
            write_text(self._output / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
            write_text(self._output / "card.md", render_card(card))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"the disk of {self._output} is full; free some space and run again: it goes on"
            ) from error
        return card

    def _check_config(self, config: Mapping) -> None:
        stored = self._output / "config.json"
        settings = json.loads(json.dumps({key: config[key] for key in config if key not in FREE_KEYS}))
        for key in FREE_QUALITY_KEYS:
            (settings.get("quality") or {}).pop(key, None)
        if stored.exists():
            different = _differing_keys(json.loads(stored.read_text()), settings, "")
            if different and self._on_change == "refuse":
                raise ValueError(
                    f"{self._output} holds data made with other settings ({', '.join(different[:8])}); choose another "
                    "synthesis.output, or set synthesis.on_change=restart to set the old folder aside and start again"
                )
            if different:
                number = next(
                    n for n in range(1, 10**6) if not self._output.with_name(f"{self._output.name}.old{n}").exists()
                )
                self._output.rename(self._output.with_name(f"{self._output.name}.old{number}"))
                logging.warning(f"{self._output} was made with other settings: set aside as {self._output}.old{number}")
                self._output.mkdir()
        write_text(stored, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _run_text(self) -> TextResult:
        quotas = {quota: size for split in self._splits for quota, size in split.quotas().items()}
        filters = copy.deepcopy(self._filters)  # a filter may remember, and a second run must not
        result = TextStage(**self._text, **filters, folder=self._output / "text").run(
            quotas, max_batches=self._max_batches
        )
        self._account(result, {})
        if result.missing:
            lacking = ", ".join(
                f"{'/'.join(filter(None, q))} lacks {n} of {quotas[q]}" for q, n in result.missing.items()
            )
            reasons = ", ".join(f"{reason} ({n})" for reason, n in _count_reasons(result).most_common(4))
            message = f"{result.num_sampled} instructions sampled in {result.num_batches} batches: {lacking}"
            if result.num_barren >= BARREN_SAMPLES:
                message += f" (given up, as the last {result.num_barren} were of no use)"
            if not self._allow_fewer:
                raise ValueError(
                    f"{message}. Most dropped for: {reasons}. Raise synthesis.max_batches or sampler.temperature, ask "
                    "for fewer (splits.*.size, shares), or set synthesis.allow_fewer=true; what was sampled is kept"
                )
            logging.warning(f"{message}; going on with fewer, as synthesis.allow_fewer says")
        _check_disjoint(result.splits)
        return result

    def _run_speech(self, text: TextResult) -> dict[str, list[dict]]:
        """The reports of all shards, by split."""
        reports: dict[str, list[dict]] = {}
        for split in self._splits:
            chosen = text.splits[split.instructions_of][: split.size]
            items = [replace(item, id=f"{split.name}-{number:06d}") for number, item in enumerate(chosen)]
            reports[split.name] = []
            for report in self._speech.run(items, split=split.name, tts=split.tts, augment=split.augment):
                reports[split.name].append(report)
                self._check_losses(split.name, len(items), text, reports)
            dropped = [row for report in reports[split.name] for row in report["dropped"]]
            if dropped:
                logging.warning(f"split {split.name}: {len(dropped)} of {len(items)} clips dropped, not made up for: "
                                f"{_most_common(dropped)}")  # fmt: skip
        return reports

    def _check_losses(self, name: str, asked: int, text: TextResult, reports: dict[str, list[dict]]) -> None:
        """Stop as soon as a split has lost too many clips: what is still to be spoken cannot bring them back."""
        dropped = [row for report in reports[name] for row in report["dropped"]]
        if self._quality is None or len(dropped) <= self._quality.max_dropped_share * asked:
            return
        self._account(text, reports)
        raise ValueError(
            f"split {name}: {len(dropped)} of {asked} clips dropped so far, more than quality.max_dropped_share="
            f"{self._quality.max_dropped_share:g} allows, for {_most_common(dropped)}. They are listed in "
            f"{self._output}/dropped.jsonl and quality.jsonl: mend the synthesizer (splits.*.tts), loosen "
            "quality.checks, or allow a larger share"
        )

    def _account(self, text: TextResult, reports: dict[str, list[dict]]) -> dict:
        """Write ``counts.json``, ``dropped.jsonl`` and, if clips are checked, ``quality.jsonl``; returns the card."""
        dropped = [{"id": i.id, "text": i.text, "response": i.response, "reason": r} for i, r in text.dropped]
        dropped += [row for shards in reports.values() for report in shards for row in report["dropped"]]
        write_jsonl(self._output / "dropped.jsonl", dropped)
        card = {
            "teacher": self._teacher_name,
            "sampled": text.num_sampled,
            "batches": text.num_batches,
            "dropped": dict(Counter(row["reason"] for row in dropped).most_common()),
            "instructions": {name: len(items) for name, items in text.splits.items()},
            "splits": {name: _sum_reports(shards) for name, shards in reports.items()},
        }
        if self._quality is not None:
            rows = [row for shards in reports.values() for report in shards for row in report["quality"]]
            write_jsonl(self._output / "quality.jsonl", rows)
            card["quality"] = {name: _sum_quality(shards) for name, shards in reports.items()}
        write_text(self._output / "counts.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        examples = {name: [(i.text, i.response, i.task) for i in items[:5]] for name, items in text.splits.items()}
        return card | {"examples": examples}


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


def render_card(card: Mapping) -> str:
    """``card.json`` as Markdown."""
    lines = [
        "# Synthetic spoken instructions",
        "",
        f"Teacher: {card['teacher']}. All speech and text is synthetic.",
        "",
    ]
    lines += ["| split | clips | hours | speakers | tasks |", "|---|---|---|---|---|"]
    for name, split in card["splits"].items():
        counts = f"{len(split['speakers'])} | {len(split['tasks'])}"
        lines.append(f"| {name} | {split['clips']} | {split['hours']:.3f} | {counts} |")
    for key, title in (("tasks", "task"), ("speakers", "speaker")):
        totals = {name: split[key] for name, split in card["splits"].items()}
        names = sorted({entry for counts in totals.values() for entry in counts})
        lines += ["", f"| {title} | {' | '.join(totals)} |", "|---" * (len(totals) + 1) + "|"]
        lines += [f"| {e} | {' | '.join(str(counts.get(e, 0)) for counts in totals.values())} |" for e in names]
    lines += ["", f"{card['sampled']} instructions were sampled in {card['batches']} batches.", ""]
    lines += ["| dropped for | count |", "|---|---|"] + [f"| {r} | {n} |" for r, n in card["dropped"].items()]
    if "quality" in card:
        lines += ["", "| split | spoken | kept | dropped | borderline |", "|---|---|---|---|---|"]
        for name, found in card["quality"].items():
            borderline = ", ".join(f"{reason} ({count})" for reason, count in found["borderline"].items())
            lines.append(f"| {name} | {found['spoken']} | {found['kept']} | {found['dropped']} | {borderline} |")
    lines += ["", "| split | instruction | response | task |", "|---|---|---|---|"]
    for name, rows in card["examples"].items():
        lines += [
            f"| {name} | {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |" for row in rows
        ]
    return "\n".join(lines) + "\n"


def _sum_reports(shards: list[dict]) -> dict:
    total = {key: sum((Counter(shard[key]) for shard in shards), Counter()) for key in ("speakers", "tasks")}
    seconds = sum(shard["seconds"] for shard in shards)
    ordered = {key: dict(sorted(counts.items())) for key, counts in total.items()}
    return {"clips": sum(shard["clips"] for shard in shards), "hours": seconds / 3600, **ordered}


def _sum_quality(shards: list[dict]) -> dict:
    borderline = Counter(row["reason"] for s in shards for row in s["quality"] if row["verdict"] == BORDERLINE)
    return {
        "spoken": sum(shard["items"] for shard in shards),
        "kept": sum(shard["clips"] for shard in shards),
        "dropped": sum(len(shard["dropped"]) for shard in shards),
        "borderline": dict(borderline.most_common()),
    }


def _most_common(dropped: list[dict]) -> str:
    return ", ".join(f"{r} ({n})" for r, n in Counter(row["reason"] for row in dropped).most_common(4))


def _count_reasons(result: TextResult) -> Counter:
    return Counter(reason for _, reason in result.dropped)


def _differing_keys(old, new, prefix: str) -> list[str]:
    """Dotted names of the settings that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = [key for key in {**old, **new} if key not in old or key not in new]
    found = [f"{prefix}.{key}".lstrip(".") for key in keys]
    for key in old.keys() & new.keys():
        found += _differing_keys(old[key], new[key], f"{prefix}.{key}".lstrip("."))
    return sorted(found)


def _check_splits(splits: Sequence[Split], train_split: str) -> None:
    by_name = {split.name: split for split in splits}
    if len(by_name) != len(splits) or train_split not in by_name:
        raise ValueError(f"synthesis.splits are {[s.name for s in splits]}, synthesis.train_split is {train_split!r}; "
                         "expected different names, the training split among them")  # fmt: skip
    train = by_name[train_split]
    for split in splits:
        if split.size < 1 or split.instructions_of not in by_name:
            raise ValueError(f"split {split.name}: size {split.size}, instructions_of {split.instructions_of!r}; "
                             f"expected a size of at least 1 and one of {sorted(by_name)}")  # fmt: skip
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
        shared = sorted(set(split.tts.speakers) & set(train.tts.speakers))
        if split is not train and shared and not split.seen_speakers:
            raise ValueError(f"split {split.name} shares {len(shared)} speakers with {train.name} ({shared[0]}, ...); "
                             "give it other tts.voices, or set seen_speakers: true")  # fmt: skip


def _check_output(output: Path, splits: Sequence[Split]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / ".probe", "writable")
        (output / ".probe").unlink()
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise ValueError(f"cannot write to {output} (synthesis.output): {error}; choose a writable folder") from error
    needed = sum(split.size * split.tts.sampling_rate * 2 for split in splits) * CLIP_SECONDS_GUESS
    if free < needed:
        raise ValueError(f"{output} (synthesis.output) has {free / 1e9:.2f} GB left, the speech takes about "
                         f"{needed / 1e9:.2f} GB; free some space or choose another disk")  # fmt: skip


def _check_disjoint(splits: Mapping[str, list[Instruction]]) -> None:
    owner: dict[str, str] = {}
    for name, items in splits.items():
        for item in items:
            other = owner.setdefault(normalize_text(item.text), name)
            if other != name:
                raise ValueError(f"the instruction {item.text!r} is in {other} and in {name}; synthesis.split_of must "
                                 "give the same split to texts that sound alike")  # fmt: skip
