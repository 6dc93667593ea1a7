# SPDX-License-Identifier: Apache-2.0
import itertools
import pickle
from collections import Counter

import pytest
import torch
from lhotse import CutSet

from nemo_rba.data.loader import EpochSampler
from nemo_rba.manifest import write_shar
from nemo_rba.types import Instruction, Utterance

from .conftest import tone


def ids(batch) -> list[str]:
    return [instruction.id for instruction in batch.instructions]


def epoch_of(loader) -> list[list[str]]:
    return [ids(batch) for batch in loader]


def names(*numbers: int) -> list[str]:
    return [f"item-{i:02d}" for i in numbers]


def flat(batches) -> list[str]:
    return list(itertools.chain.from_iterable(batches))


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_in_manifest_order(items, make_loader):
    loader = make_loader(items(5), shuffle=False, drop_last=False)
    assert len(loader) == 3
    assert epoch_of(loader) == epoch_of(loader) == [names(0, 1), names(2, 3), names(4)]


def test_evaluation_begins_with_the_longest_clips(make_loader, cut_of, tmp_path):
    lengths = {"short": 400, "long": 1200, "also short": 400, "middle": 800}
    CutSet.from_cuts([cut_of(name, tone(0.1, n)) for name, n in lengths.items()]).to_jsonl(tmp_path / "some.jsonl")
    manifest, evaluation = tmp_path / "some.jsonl", {"shuffle": False, "drop_last": False}
    assert epoch_of(make_loader(manifest, **evaluation)) == [["long", "middle"], ["short", "also short"]]
    ranks = [epoch_of(make_loader(manifest, **evaluation, batch_size=1, world_size=2, rank=rank)) for rank in (0, 1)]
    assert ranks == [[["long"], ["short"]], [["middle"], ["also short"]]]
    assert flat(epoch_of(make_loader(manifest, shuffle=False))) == list(lengths)


def test_every_epoch_is_another_permutation(items, make_loader):
    loader = make_loader(items(8))
    epochs = [flat(epoch_of(loader)) for _ in range(3)]
    assert all(sorted(epoch) == names(*range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = make_loader(loader.manifest)
    assert [flat(epoch_of(again)) for _ in range(3)] == epochs
    assert flat(epoch_of(make_loader(loader.manifest, seed=2))) != epochs[0]


def test_some_prompts_are_drawn_by_the_seed(items, make_loader):
    manifest = items(12)
    drawn = {seed: set(flat(epoch_of(make_loader(manifest, num_prompts=4, seed=seed)))) for seed in (1, 2)}
    assert [len(found) for found in drawn.values()] == [4, 4]
    assert drawn[1] != drawn[2]
    loader = make_loader(manifest, num_prompts=4)
    assert set(flat(epoch_of(loader))) | set(flat(epoch_of(loader))) == drawn[1], "the same in every epoch"
    with pytest.raises(ValueError, match=r"num_prompts=13: expected 1 to 12.*data\.train_prompts"):
        make_loader(manifest, num_prompts=13)


def test_a_prompt_is_drawn_with_all_its_recordings(tmp_path, cut_of, make_loader):
    cuts = [cut_of(f"item-{i:02d}", tone(i / 100)) for i in range(12)]
    for i, cut in enumerate(cuts):  # 5 prompts, the last recorded four times: two by two, and 8 to 11
        cut.supervisions[0].text = f"say {min(i // 2, 4)}"
    CutSet.from_cuts(cuts).to_jsonl(tmp_path / "cuts.jsonl")
    drawn = flat(epoch_of(make_loader(tmp_path / "cuts.jsonl", num_prompts=3, seed=1, drop_last=False)))
    prompts = [min(int(name.split("-")[1]) // 2, 4) for name in drawn]
    assert len(set(prompts)) == 3
    assert all(prompts.count(prompt) == (4 if prompt == 4 else 2) for prompt in prompts)
    with pytest.raises(ValueError, match=r"num_prompts=6: expected 1 to 5, the prompts of"):
        make_loader(tmp_path / "cuts.jsonl", num_prompts=6)
    cuts[0].custom["context"] = "Answer in German."
    CutSet.from_cuts(cuts).to_jsonl(tmp_path / "cuts.jsonl")
    make_loader(tmp_path / "cuts.jsonl", num_prompts=6)  # other typed words beside the speech: another prompt


def test_the_order_is_frozen():
    """A resumed run may meet a newer Python or torch; if this fails, old checkpoints would see other batches."""
    sampler = EpochSampler(num_items=10, batch_size=2, shuffle=True, seed=1, rank=0, world_size=1, drop_last=True)
    assert sampler.shard() == [8, 5, 9, 0, 4, 2, 3, 1, 7, 6]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_without_loss_or_repetition(items, make_loader, world_size, drop_last):
    manifest = items(13)
    loaders = [make_loader(manifest, rank=r, world_size=world_size, drop_last=drop_last) for r in range(world_size)]
    for _ in range(2):
        shards = [epoch_of(loader) for loader in loaders]
        seen = Counter(flat(flat(shards)))
        assert set(seen.values()) == {1}
        assert [len(shard) for shard in shards] == [len(loader) for loader in loaders]
        if drop_last:
            assert len(seen) == 12
            assert all(len(batch) == 2 for batch in flat(shards))
            assert len({len(shard) for shard in shards}) == 1
        else:
            assert len(seen) == 13


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(items, make_loader):
    manifest = items(12)
    whole = epoch_of(make_loader(manifest, batch_size=4))
    halves = [epoch_of(make_loader(manifest, batch_size=2, rank=r, world_size=2)) for r in (0, 1)]
    assert [sorted(batch) for batch in whole] == [sorted(a + b) for a, b in zip(*halves, strict=True)]


# --- unusable items ---------------------------------------------------------------------------------------------------


def test_training_batches_stay_full(items, make_loader):
    loader = make_loader(items(8, unusable=[1, 4, 5]), shuffle=False)
    assert epoch_of(loader) == [names(0, 2), names(2, 3), names(6, 7), names(6, 7)]
    assert loader.dataset.counts == {"missing audio": 3}


def test_ranks_keep_step_when_a_whole_batch_is_unusable(items, make_loader):
    manifest = items(8, unusable=[0, 2])  # rank 0's first batch
    lengths = [len(epoch_of(make_loader(manifest, shuffle=False, rank=r, world_size=2))) for r in (0, 1)]
    assert lengths == [2, 2]


def test_evaluation_repeats_nothing(items, make_loader):
    loader = make_loader(items(7, unusable=[1, 4, 5]), shuffle=False, drop_last=False)
    assert epoch_of(loader) == [names(0), names(2, 3), names(6)]


def test_a_rank_without_a_share_of_a_small_evaluation_set_gets_nothing(items, make_loader):
    loader = make_loader(items(2), shuffle=False, drop_last=False, rank=2, world_size=3)
    assert len(loader) == 0
    assert epoch_of(loader) == []


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_without_usable_items_raises(items, make_loader, drop_last):
    loader = make_loader(items(4, unusable=range(4)), drop_last=drop_last)
    with pytest.raises(ValueError, match=r"none of the 4 items .* is usable: .*missing audio.*quarantine\.jsonl"):
        list(loader)


# --- resuming ---------------------------------------------------------------------------------------------------------


def stream(loader, num_batches: int) -> list[list[str]]:
    return [
        ids(batch) for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), num_batches)
    ]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 9, 12])
@pytest.mark.parametrize("unusable", [[], [2, 5]])
def test_a_resumed_stream_is_the_uninterrupted_one(items, make_loader, taken, unusable):
    manifest = items(8, unusable=unusable)  # 4 batches an epoch
    want = stream(make_loader(manifest), taken + 6)
    first = make_loader(manifest)
    assert stream(first, taken) == want[:taken]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = make_loader(manifest)
    second.load_state_dict(state)
    assert stream(second, 6) == want[taken:]


def test_an_augmentation_draws_anew_in_every_epoch_of_training_and_never_in_evaluation(items, make_loader):
    manifest, keys = items(4), []

    def heard(loader, num_batches: int) -> list[str]:
        loader.dataset.augmentation = lambda audio, rate, key: keys.append(key) or audio
        stream(loader, num_batches)
        return [keys.pop(0) for _ in range(2 * num_batches)]

    loader = make_loader(manifest)
    training = heard(loader, 4)
    assert sorted(training) == [f"read/{epoch}/{name}" for epoch in (0, 1) for name in names(*range(4))]
    again = make_loader(manifest)
    assert heard(again, 3) == training[:6]
    resumed = make_loader(manifest)
    resumed.load_state_dict(again.state_dict())
    assert heard(resumed, 1) == training[6:], "a resumed run hears what an uninterrupted one hears"
    assert (
        heard(make_loader(manifest, shuffle=False, drop_last=False), 4) == [f"read/{n}" for n in names(0, 1, 2, 3)] * 2
    )


def test_the_state_describes_the_batch_in_hand(items, make_loader):
    loader = make_loader(items(8))
    positions = [loader.state_dict()["position"] for _ in loader]
    assert positions == [1, 2, 3, 4]


def test_the_state_is_the_same_on_all_ranks(items, make_loader):
    manifest = items(12, unusable=[3])
    loaders = [make_loader(manifest, rank=r, world_size=2) for r in (0, 1)]
    states = [(stream(loader, 2), loader.state_dict())[1] for loader in loaders]
    assert states[0] == states[1]


def test_resuming_on_other_ranks_keeps_the_global_batches(items, make_loader):
    manifest = items(12)
    want = [sorted(batch) for batch in stream(make_loader(manifest, batch_size=4), 5)]
    one = make_loader(manifest, batch_size=4)
    stream(one, 2)
    two = [make_loader(manifest, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
    for loader in two:
        loader.load_state_dict(one.state_dict())
    got = [sorted(a + b) for a, b in zip(*(stream(loader, 3) for loader in two), strict=True)]
    assert got == want[2:]


@pytest.mark.parametrize("change", [{"seed": 2}, {"shuffle": False}, {"batch_size": 4}, {"drop_last": False}])
def test_a_state_of_other_data_is_refused(items, make_loader, change):
    manifest = items(8)
    key = "global_batch_size" if "batch_size" in change else next(iter(change))
    with pytest.raises(ValueError, match=f"cannot resume the data of .*: {key} was"):
        make_loader(manifest, **change).load_state_dict(make_loader(manifest).state_dict())


def test_a_state_of_another_manifest_is_refused(items, make_loader):
    state = make_loader(items(8)).state_dict()
    with pytest.raises(ValueError, match="items was"):
        make_loader(items(6)).load_state_dict(state)


def test_an_abandoned_evaluation_starts_anew(items, make_loader):
    loader = make_loader(items(6), shuffle=False, drop_last=False)
    assert ids(next(iter(loader))) == names(0, 1)
    assert epoch_of(loader) == [names(0, 1), names(2, 3), names(4, 5)]


def test_a_training_iteration_broken_off_is_taken_up(items, make_loader):
    manifest = items(8)
    loader, want = make_loader(manifest), stream(make_loader(manifest), 8)
    assert ids(next(iter(loader))) == want[0]
    assert epoch_of(loader) == want[1:4]
    assert epoch_of(loader) == want[4:]


def test_set_epoch_chooses_the_first_epoch_only(items, make_loader):
    manifest = items(8)
    want = stream(make_loader(manifest), 12)
    loader = make_loader(manifest)
    loader.sampler.set_epoch(1)
    assert epoch_of(loader) == want[4:8]
    loader.sampler.set_epoch(0)
    assert epoch_of(loader) == want[8:]


# --- Shar and setup ---------------------------------------------------------------------------------------------------


def test_shar_is_shuffled_and_resumed_like_files(tmp_path, make_loader):
    utterances = [
        Utterance(
            instruction=Instruction(id=f"item-{i:02d}", text="hello", response="there", task="t"),
            audio=torch.full((400,), i / 100),
            sampling_rate=16000,
            speaker="s",
        )
        for i in range(8)
    ]
    write_shar(utterances, tmp_path / "shar", shard_size=3, audio_format="flac", teacher="nobody")
    loader = make_loader(tmp_path / "shar")
    batches = list(loader)
    assert sorted(flat(ids(batch) for batch in batches)) == names(*range(8))
    for batch in batches:
        want = torch.tensor([int(name.split("-")[1]) / 100 for name in ids(batch)])
        torch.testing.assert_close(batch.audio.mean(dim=1), want, atol=1e-4, rtol=0)
    assert flat(epoch_of(loader)) != flat(ids(batch) for batch in batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"rank": 2, "world_size": 2}, "expected 0 <= rank < world_size"),
        ({"batch_size": 2, "world_size": 4}, "holds 5 items, fewer than one global batch of 8"),
    ],
)
def test_bad_settings_are_refused_at_setup(items, make_loader, settings, message):
    with pytest.raises(ValueError, match=message):
        make_loader(items(5), **settings)


def test_bad_manifests_are_refused_at_setup(tmp_path, make_loader, items):
    with pytest.raises(ValueError, match="no manifest at"):
        make_loader(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        make_loader(tmp_path / "empty.jsonl")
    manifest = items(3)
    manifest.write_text(manifest.read_text()[:-50])
    with pytest.raises(ValueError, match=r"cannot be read: .*cuts\.jsonl line 3"):
        make_loader(manifest)
