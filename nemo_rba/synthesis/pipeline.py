# SPDX-License-Identifier: Apache-2.0
"""Self-synthesis: a teacher's instructions and answers, spoken, as a Lhotse Shar folder per split.

Text (``text.TextStage``: sample, filter, answer, filter) and speech (``speech.SpeechStage``: speak, check, augment,
write; one shard at a time) go on side by side: a shard is spoken as soon as its instructions are known. All that costs
is an order (``orders.py``) that any rank may take; the first rank decides. Everything can be interrupted at any moment
and goes on where it was when run again: text by finished batches, speech by finished shards. Everything is drawn by
keys (batch number, utterance id), never by order of work, so a resumed run gives what an uninterrupted one gives, and
many ranks what one gives. The output folder:

    config.json  text/batch-*.jsonl  speech/*.json  <split>/cuts.* recording.*  counts.json  dropped.jsonl  card.*
    quality.jsonl  where clips are checked: the dropped and the borderline ones
    orders/  while ranks work

A clip that is dropped is not made up for: its split has one less, the account says so, and the test sets of several
voices, which speak the same instructions, stay comparable.
"""

import copy
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemo.utils import logging

from nemo_rba import __version__
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.card import account, write_card
from nemo_rba.synthesis.files import write_text
from nemo_rba.synthesis.filters import Filter
from nemo_rba.synthesis.instructions import Sampler
from nemo_rba.synthesis.orders import SCRATCH, Orders
from nemo_rba.synthesis.quality import QualityControl
from nemo_rba.synthesis.shards import Shards
from nemo_rba.synthesis.speech import SpeechStage
from nemo_rba.synthesis.splits import Split, check_disjoint, check_splits, made
from nemo_rba.synthesis.spoken_form import SpokenForm
from nemo_rba.synthesis.text import BARREN_SAMPLES, TextResult, TextStage
from nemo_rba.synthesis.text_work import TextWork
from nemo_rba.types import SamplingParams

# may change between two runs of one data set
FREE_KEYS = ("output", "max_batches", "allow_fewer", "on_change", "max_failed_share", "language")
FREE_QUALITY_KEYS = ("max_dropped_share",)  # and these of ``quality``
CLIP_SECONDS_GUESS = 4.0  # for the estimate of disk space


class SelfSynthesis:
    """The whole pipeline; ``run`` does what is not yet done.

    Args:
        teacher, sampler, instruction_filters, spoken_form, speech_filters, response_filters, response_params, context,
            split_of, task_of, kind_of, batches_at_once: the text stage, see ``TextStage`` and ``TextWork``.
        teacher_name: kept in every cut, e.g. ``meta-llama/Llama-3.1-8B-Instruct``.
        splits: what to make, in the order of making.
        train_split: the split that the others must share no instruction with, nor a speaker unless ``seen_speakers``.
        max_batches: sampling stops here, met quotas or not.
        allow_fewer: True goes on with what was found, False stops with an error.
        language: that the voices must speak, as far as they tell, e.g. ``en``; None for any.
        max_duration_seconds: longer clips are dropped.
        max_failed_share: of a split's clips that may be lost otherwise than by ``quality``; where it is more, it stops.
        shard_size: clips per shard; what an interruption can cost.
        audio_format: ``flac`` or ``wav``.
        output: folder to write; the same for all ranks.
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
                 batches_at_once: int, max_batches: int, allow_fewer: bool, language: str | None,
                 max_duration_seconds: float, max_failed_share: float, shard_size: int, audio_format: str, output: str,
                 on_change: str, seed: int, quality: QualityControl | None):  # fmt: skip
        check_splits(splits, train_split, response_params, language)
        if on_change not in ("refuse", "restart"):
            raise ValueError(f"synthesis.on_change is {on_change!r}; expected 'refuse' or 'restart'")
        if batches_at_once < 1:
            raise ValueError(f"synthesis.batches_at_once is {batches_at_once}; expected at least 1")
        splits = made(splits)
        self._teacher_name, self._splits = teacher_name, splits
        self._max_batches, self._allow_fewer, self._on_change = max_batches, allow_fewer, on_change
        self._output, self._quality, self._seed = Path(output), quality, seed
        self._work = TextWork(
            teacher=teacher, sampler=sampler, spoken_form=spoken_form, response_params=response_params,
            folder=self._output / "text", seed=seed,
        )  # fmt: skip
        self._text = {
            "context": context, "split_of": split_of, "task_of": task_of, "kind_of": kind_of,
            "num_responses": {split.name: split.num_responses for split in splits}, "batches_at_once": batches_at_once,
        }  # fmt: skip
        self._filters = {
            "instruction_filters": instruction_filters, "speech_filters": speech_filters,
            "response_filters": response_filters,
        }  # fmt: skip
        self._speech = SpeechStage(
            output=self._output, teacher_name=teacher_name, quality=quality, max_duration_seconds=max_duration_seconds,
            shard_size=shard_size, audio_format=audio_format, max_failed_share=max_failed_share, seed=seed,
            scratch=self._output / "orders" / SCRATCH, has_ended=lambda: self._orders.has_ended(),
        )  # fmt: skip
        _check_output(self._output, splits)

    def run(self, config: Mapping, rank: int = 0) -> dict:
        """Make the data set; returns what ``card.json`` holds, or {} on all ranks but the first.

        Args:
            config: the configuration this object was built from, as plain values. It is kept beside the data, and a
                later run with another one is refused.
            rank: of this process among those that were started with the same configuration and output.

        Raises:
            ValueError: another configuration's data in the output, quotas not met, instructions shared between splits,
                too many clips dropped; or another rank's error.
        """
        settings = _settings(config)
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._orders = Orders(self._output / "orders", rank=rank, identity=identity)
        self._found = TextResult()  # so far
        self._shards = Shards(splits=self._splits, speech=self._speech, orders=self._orders, quality=self._quality,
                              lost=self._account, show=rank == 0)  # fmt: skip
        try:
            return self._help() if rank > 0 else self._lead(settings)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"the disk of {self._output} is full; free some space and run again: it goes on"
            ) from error

    def _help(self) -> dict:
        """Take orders until the first rank has no more."""
        while self._orders.join():
            beside = self._orders.work_beside({"speech": self._shards.speak})
            self._orders.work(self._work.handlers)
            beside.join()
            self._orders.check()
        return {}

    def _lead(self, settings: dict) -> dict:
        self._check_config(settings)
        self._orders.open()
        beside, problem = self._orders.work_beside({"speech": self._shards.speak}), None
        try:
            self._run_text()
            self._shards.add(self._found.splits, finished=True)
            self._shards.wait()
            card = self._account()
            write_card(self._output, card)
            return card
        except BaseException as error:
            problem = error
            raise
        finally:
            self._orders.close(problem)
            beside.join()
            self._shards.close()

    def _have_done(self, kind: str, orders: Mapping[str, dict]) -> None:
        for name, order in orders.items():
            self._orders.place(kind, name, order)
        results = [self._work.part(order["index"], kind) for order in orders.values()]
        self._orders.wait(lambda: all(path.exists() for path in results), self._work.handlers)

    def _check_config(self, settings: dict) -> None:
        stored = self._output / "config.json"
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

    def _take_note(self, found: TextResult) -> None:
        """After every round of the text stage: speak what can be spoken."""
        self._found = found
        self._shards.add(found.splits, finished=False)

    def _run_text(self) -> None:
        quotas = {quota: size for split in self._splits for quota, size in split.quotas().items()}
        filters = copy.deepcopy(self._filters)  # a filter may remember, and a second run must not
        stage = TextStage(work=self._work, have_done=self._have_done, **self._text, **filters)
        result = self._found = stage.run(quotas, max_batches=self._max_batches, found=self._take_note)
        shutil.rmtree(self._work.folder / "parts", ignore_errors=True)
        self._account()
        if result.missing:
            lacking = ", ".join(
                f"{'/'.join(filter(None, q))} lacks {n} of {quotas[q]}" for q, n in result.missing.items()
            )
            message = f"{result.num_sampled} instructions sampled in {result.num_batches} batches: {lacking}"
            if result.num_barren >= BARREN_SAMPLES:
                message += f" (given up, as the last {result.num_barren} were of no use)"
            if not self._allow_fewer:
                raise ValueError(
                    f"{message}. {result.losses()}. Raise synthesis.max_batches or sampler.temperature, ask for fewer "
                    "(splits.*.size, shares), or set synthesis.allow_fewer=true; what was sampled is kept"
                )
            logging.warning(f"{message}; going on with fewer, as synthesis.allow_fewer says")
        check_disjoint(result.splits)

    def _account(self) -> dict:
        """Write what is known so far: ``counts.json`` and the lists of what was dropped; returns the card."""
        voices = {s.name: f"{type(s.tts).__name__}, {len(s.tts.speakers)} speakers" for s in self._splits}
        origin = {"code": f"nemo_rba {__version__}", "teacher": self._teacher_name, "seed": self._seed,
                  "voices": voices}  # fmt: skip
        return account(self._output, self._found, self._shards.reports(), origin, checked=self._quality is not None)


def _settings(config: Mapping) -> dict:
    """What the data depend on."""
    settings = json.loads(json.dumps({key: config[key] for key in config if key not in FREE_KEYS}))
    for key in FREE_QUALITY_KEYS:
        (settings.get("quality") or {}).pop(key, None)
    return settings


def _differing_keys(old, new, prefix: str) -> list[str]:
    """Dotted names of the settings that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = [key for key in {**old, **new} if key not in old or key not in new]
    found = [f"{prefix}.{key}".lstrip(".") for key in keys]
    for key in old.keys() & new.keys():
        found += _differing_keys(old[key], new[key], f"{prefix}.{key}".lstrip("."))
    return sorted(found)


def _check_output(output: Path, splits: Sequence[Split]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / ".probe", "writable")
        (output / ".probe").unlink(missing_ok=True)  # ranks probe at the same time
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise ValueError(f"cannot write to {output} (synthesis.output): {error}; choose a writable folder") from error
    needed = sum(split.num_utterances * split.tts.sampling_rate * 2 for split in splits) * CLIP_SECONDS_GUESS
    if free < needed:
        raise ValueError(f"{output} (synthesis.output) has {free / 1e9:.2f} GB left, the speech takes about "
                         f"{needed / 1e9:.2f} GB; free some space or choose another disk")  # fmt: skip
