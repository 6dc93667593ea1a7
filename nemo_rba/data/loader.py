# SPDX-License-Identifier: Apache-2.0
"""Batches for the loop: sharded over data-parallel ranks, reshuffled every epoch, resumed exactly.

NeMo's own Lhotse loader cannot be resumed (its samplers carry a constraint, and Lhotse then refuses ``state_dict``), so
the order of items is ours and as plain as it can be. A batch is a function of (seed, epoch, batch index, rank) alone;
"where were we" is two integers, the same on all ranks, and a resumed run cannot help but see the batches the
uninterrupted one would have seen. Only *reading* follows Lhotse: manifests, Shar, audio backends, resampling.

Limits: the manifest's entries are held in memory. For cuts in JSONL that is some 3 kB each; for Shar, whose tar files
are sequential, it is the encoded audio too (a 5 s FLAC: 100 kB), so a large corpus is better kept as JSONL and files.
"""

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from nemo_rba.data.dataset import SpeechInstructionDataset, SpeechItem
from nemo_rba.manifest import check_manifest, read_manifest
from nemo_rba.types import SpeechBatch


class EpochSampler:
    """Which items come when. Pure arithmetic; ``SpeechLoader`` reads what it names.

    The order of an epoch is the identity or a permutation drawn from (seed, epoch). Global batch k is the k-th run of
    ``batch_size * world_size`` items of it, and rank r takes every ``world_size``-th of those from the r-th on: no item
    is lost to sharding and none is repeated.

    With ``drop_last`` the items beyond the last full global batch sit out (others in each epoch, if shuffled), and all
    ranks have the same number of batches. Without it every item is handed out, the last batches may be short, and the
    last ranks may have one batch less: meant for evaluation, where ranks need not keep step.
    """

    def __init__(
        self,
        *,
        num_items: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1 item per rank")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size")
        self.num_items = num_items
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out
        self._begun = False  # iterated or restored: from here on the place is ours to keep

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        if self.drop_last:
            return self.num_items // self.global_batch_size
        mine = len(range(self.rank, self.num_items, self.world_size))
        return -(-mine // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Start from ``epoch``; without effect once begun. Lightning calls this before every epoch.

        Its count cannot be followed further: after a resume within an epoch Lightning (2.4) believes one batch less
        to be done than was done, and takes the first batch of the next epoch for the last of the old one. It is needed
        all the same, because Lightning does not restore loaders from a checkpoint taken between two epochs.
        """
        if not self._begun:
            self.epoch = epoch

    def enter(self) -> None:
        """Begin an iteration: with ``drop_last`` go on from the present place, without it from the first item."""
        if self.position >= len(self) or (self._begun and not self.drop_last):
            self.epoch, self.position = self.epoch + 1, 0
        self._begun = True

    def restore(self, *, epoch: int, position: int) -> None:
        self.epoch, self.position, self._begun = epoch, position, True

    def shard(self) -> list[int]:
        """This rank's items in this epoch, in order; batch k is the k-th run of ``batch_size`` of them."""
        order = list(range(self.num_items))
        if self.shuffle:
            # Python's generator, because its stream is the same under every version of torch and numpy.
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        if self.drop_last:
            order = order[: len(self) * self.global_batch_size]
        return order[self.rank :: self.world_size]


class SpeechLoader:
    """Iterable over the ``SpeechBatch``es of one epoch; iterate again for the next, without end.

    With ``drop_last`` (training) the batches are one stream cut into epochs: an iteration broken off is taken up
    by the next. Without it (evaluation) every iteration is the whole set, the longest clips first.

    It always knows its length, so that Lightning does not fetch ahead of the batch it is processing and the state saved
    after a step is the state of that step. Lightning finds ``state_dict``/``load_state_dict`` here and saves them with
    its loop, and finds ``sampler.set_epoch``.

    Args:
        manifest: Shar folder or JSONL of cuts, see ``nemo_rba.manifest``.
        dataset: reads, encodes and pads.
        batch_size: items per rank.
        shuffle: another order in every epoch.
        seed: of the orders; the same on all ranks.
        rank, world_size: the *data-parallel* ones; ranks of one model-parallel group pass the same and read the same.
        drop_last: True for training. Batches are then always full: an unusable item is replaced by the next usable
            one of this rank, so that ranks keep step, at the price of meeting that one twice. With False (evaluation)
            nothing is replaced or repeated, and a batch without usable items is left out.
        num_prompts: use no more than so many prompts of the manifest, drawn by ``seed``, with all recordings of each;
            None uses all. Cuts with the same words and the same context are recordings of one prompt.

    Raises:
        ValueError: the manifest is missing, empty or smaller than a global batch, or as for ``EpochSampler``.
    """

    def __init__(
        self,
        *,
        manifest: str | Path,
        dataset: SpeechInstructionDataset,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        num_prompts: int | None = None,
    ):
        self.manifest = Path(manifest)
        self.dataset = dataset
        self._cuts = self._read()
        if num_prompts is not None:
            self._cuts = self._draw(num_prompts, seed)
        if not (shuffle or drop_last):  # evaluation: little padding, and memory runs out at once or never
            self._cuts.sort(key=lambda cut: -cut.duration)
        self._digest = hashlib.sha256("\n".join(cut.id for cut in self._cuts).encode()).hexdigest()
        self.sampler = EpochSampler(
            num_items=len(self._cuts),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        if drop_last and len(self.sampler) == 0:
            raise ValueError(
                f"'{self.manifest}' holds {len(self._cuts)} items, fewer than one global batch of "
                f"{self.sampler.global_batch_size} (batch_size={batch_size} on {world_size} data-parallel ranks); "
                "lower batch_size or add items to the manifest"
            )

    @property
    def heard(self) -> str:
        """Fingerprint of what is to be heard, as far as a manifest tells: ids, lengths and speakers, in any order."""
        told = sorted(f"{c.id} {c.duration} {[s.speaker for s in c.supervisions]}" for c in self._cuts)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Batches per epoch on this rank; without ``drop_last`` an upper bound, when items are unusable."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[SpeechBatch]:
        """The batches of one epoch, from the restored position on.

        Raises:
            ValueError: nothing in this rank's share of the manifest is usable.
        """
        sampler = self.sampler
        sampler.enter()
        shard, usable = sampler.shard(), sampler.position > 0
        while sampler.position < len(sampler):
            items = self._items(shard, sampler.position * sampler.batch_size)
            sampler.position += 1
            if items:
                usable = True
                yield self.dataset.collate(items)
        if shard and not usable:
            self._raise_nothing_usable(len(shard))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after the batch handed out last. Equal on all ranks."""
        return {**self._identity(), "epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, also with another number of ranks for the same global batch.

        Raises:
            ValueError: the state belongs to another manifest, seed, order or global batch size.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(
                    f"cannot resume the data of '{self.manifest}': {key} was {state[key]!r} when the checkpoint was "
                    f"written and is {mine!r} now; restore the old value, or start a new run from the .nemo file"
                )
        self.sampler.restore(epoch=state["epoch"], position=state["position"])

    def _read(self) -> list[Cut]:
        lazy_cuts = read_manifest(self.manifest)
        try:
            cuts = list(lazy_cuts)
        except Exception as error:  # whatever damaged JSON, gzip or tar may raise
            problems = "; ".join(check_manifest(self.manifest).problems[:5])
            raise ValueError(f"manifest '{self.manifest}' cannot be read: {problems or error}") from error
        if not cuts:
            raise ValueError(f"manifest '{self.manifest}' is empty; run the synthesis again or name another manifest")
        return cuts

    def _draw(self, num_prompts: int, seed: int) -> list[Cut]:
        recordings: dict[tuple, list[Cut]] = {}
        for cut in self._cuts:
            said = tuple(supervision.text for supervision in cut.supervisions)
            recordings.setdefault((said, (cut.custom or {}).get("context")), []).append(cut)
        if not 1 <= num_prompts <= len(recordings):
            raise ValueError(
                f"num_prompts={num_prompts}: expected 1 to {len(recordings)}, the prompts of '{self.manifest}'; change "
                "data.train_prompts or data.dev_prompts, or make the manifest larger"
            )
        drawn = random.Random(f"{seed}/items").sample(list(recordings.values()), num_prompts)
        return [cut for cuts in drawn for cut in cuts]

    def _identity(self) -> dict[str, Any]:
        return {
            "items": self._digest,
            "seed": self.sampler.seed,
            "shuffle": self.sampler.shuffle,
            "drop_last": self.sampler.drop_last,
            "global_batch_size": self.sampler.global_batch_size,
        }

    def _items(self, shard: list[int], start: int) -> list[SpeechItem]:
        """The usable items of the batch that begins at ``start``, filled up from what follows if ``drop_last``."""
        size = self.sampler.batch_size
        own, following = shard[start : start + size], [*shard[start + size :], *shard[:start]]
        epoch = self.sampler.epoch if self.sampler.shuffle else None  # a set that is asked in order always sounds alike
        items = [item for index in own if (item := self.dataset.load(self._cuts[index], epoch)) is not None]
        if self.sampler.drop_last and len(items) < size:
            loaded = (self.dataset.load(self._cuts[index], epoch) for index in following)
            items += islice((item for item in loaded if item is not None), size - len(items))
            if not items:
                self._raise_nothing_usable(len(shard))
            items = [items[i % len(items)] for i in range(size)]  # fewer usable items in all than one batch
        return items

    def _raise_nothing_usable(self, num_items: int) -> None:
        raise ValueError(
            f"none of the {num_items} items of '{self.manifest}' on rank {self.sampler.rank} is usable: "
            f"{dict(self.dataset.counts)}; see {self.dataset.quarantine}"
        )
