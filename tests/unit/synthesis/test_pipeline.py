# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rba.manifest import check_manifest, cut_to_utterance, read_manifest
from nemo_rba.synthesis import speech as speech_module
from nemo_rba.synthesis.augment import NoiseAugmentation
from nemo_rba.synthesis.augment_effects import Speed
from nemo_rba.synthesis.filters import DuplicateFilter, LengthFilter, ResponseFilter
from nemo_rba.synthesis.instructions import Draft, MagpieSampler
from nemo_rba.synthesis.pipeline import SelfSynthesis
from nemo_rba.synthesis.splits import Split, hash_split, one_name
from nemo_rba.types import SamplingParams

from .conftest import FakeTeacher, FakeTTS

CONFIG = {"seed": 1, "teacher": {"path": "x"}, "max_batches": 60}


def split_of(text: str) -> str:
    return hash_split(text, shares={"train": 0.6, "dev": 0.2, "test": 0.2})


def make_splits(train_tts: FakeTTS, **changes) -> list[Split]:
    other = FakeTTS(["c", "d"])
    noise = NoiseAugmentation(snr_db_min=10, snr_db_max=20, color="white", peak_min=0.5, peak_max=0.9, seed=1)
    common = {"augment": None, "shares": {}, "seen_speakers": False, "num_responses": 1, "recordings": 1}
    rows = {
        "train": {"size": 50, "tts": train_tts, "augment": noise, "shares": {"open": 0.5, "closed": 0.5}},
        "dev": {"size": 8, "tts": other},
        "test": {"size": 10, "tts": other},
        "test_seen": {"size": 10, "tts": train_tts, "instructions_of": "test", "seen_speakers": True},
    }
    merged = {name: common | {"name": name, "instructions_of": name} | row for name, row in rows.items()}
    for name, change in changes.items():
        merged[name].update(change)
    return [Split(**row) for row in merged.values()]


def build(output: Path, *, teacher=None, tts=None, **changes) -> SelfSynthesis:
    teacher = teacher or FakeTeacher()
    tts = tts or FakeTTS(["a", "b"])
    sampler = MagpieSampler(teacher=teacher, batch_size=25, temperature=1.0, top_p=1.0, max_new_tokens=9, seed=1)
    settings = {
        "teacher": teacher,
        "teacher_name": "fake",
        "sampler": sampler,
        "instruction_filters": [LengthFilter(min_words=1, max_words=9, max_characters=99), DuplicateFilter()],
        "spoken_form": None,
        "speech_filters": [],
        "response_filters": [ResponseFilter(max_words=9)],
        "response_params": SamplingParams(max_new_tokens=9),
        "context": "",
        "splits": make_splits(tts),
        "train_split": "train",
        "split_of": split_of,
        "task_of": lambda text: one_name(text, name="any"),
        "kind_of": lambda text: "closed" if text[0] < "n" else "open",
        "batches_at_once": 1,
        "max_batches": 60,
        "allow_fewer": False,
        "max_failed_share": 1.0,
        "language": None,
        "max_duration_seconds": 10.0,
        "quality": None,
        "shard_size": 20,
        "audio_format": "flac",
        "output": str(output),
        "on_change": "refuse",
        "seed": 1,
    }
    return SelfSynthesis(**(settings | changes))


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder as a hash, cuts and recordings as what they hold."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".gz":
            files[str(path.relative_to(folder))] = hashlib.md5(path.read_bytes()).hexdigest()
    for split in ("train", "dev", "test", "test_seen"):
        for cut in read_manifest(folder / split):
            found = cut_to_utterance(cut)
            said = repr((found.instruction, found.speaker, found.audio.numpy().tobytes()))
            files[cut.id] = hashlib.md5(said.encode()).hexdigest()
    return files


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "data"
    build(folder).run(CONFIG)
    return folder


def test_the_data_set_is_what_was_asked_for(finished):
    cuts = {name: list(read_manifest(finished / name)) for name in ("train", "dev", "test", "test_seen")}
    assert {name: len(found) for name, found in cuts.items()} == {"train": 50, "dev": 8, "test": 10, "test_seen": 10}
    texts = {name: [cut.supervisions[0].text for cut in found] for name, found in cuts.items()}
    assert texts["test"] == texts["test_seen"]
    assert not set(texts["train"]) & set(texts["dev"] + texts["test"])
    assert all(split_of(text) == "dev" for text in texts["dev"])
    assert sum(text[0] < "n" for text in texts["train"]) == 25
    speakers = {name: {cut.custom["speaker"] for cut in found} for name, found in cuts.items()}
    assert speakers == {"train": {"a", "b"}, "dev": {"c", "d"}, "test": {"c", "d"}, "test_seen": {"a", "b"}}
    assert [cut.id for cut in cuts["dev"]] == [f"dev-{i:06d}" for i in range(8)]
    assert all(check_manifest(finished / name).problems == [] for name in cuts)
    assert len(list((finished / "train").glob("cuts.*"))) == 3
    assert not list(finished.glob(".*"))


def test_every_item_is_accounted_for(finished):
    counts = json.loads((finished / "counts.json").read_text())
    dropped = [json.loads(line) for line in (finished / "dropped.jsonl").read_text().splitlines()]
    assert counts["instructions"] == {"train": 50, "dev": 8, "test": 10}
    assert sum(counts["dropped"].values()) == len(dropped) == counts["sampled"] - 68
    assert all(row["reason"] and row["id"] for row in dropped)
    card = json.loads((finished / "card.json").read_text())
    assert card["splits"]["train"]["tasks"] == {"any": 50}
    assert sum(card["splits"]["train"]["speakers"].values()) == 50
    seconds = sum(cut.duration for cut in read_manifest(finished / "train"))
    assert card["splits"]["train"]["hours"] * 3600 == pytest.approx(seconds)
    table = (finished / "card.md").read_text()
    assert "| train | 50 |" in table
    assert "duplicate: seen before" in table


def test_a_finished_run_is_not_done_again(finished):
    before = contents(finished)
    teacher, tts = FakeTeacher(), FakeTTS(["a", "b"])
    build(finished, teacher=teacher, tts=tts).run(CONFIG)
    assert teacher.calls == tts.calls == 0
    assert contents(finished) == before


def failing(function: Callable, *, at: int) -> Callable:
    """The function, but its ``at``-th call is cut short as by Ctrl-C."""
    calls = 0

    def wrapped(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize(
    ("part", "at"),
    [("teacher", 1), ("teacher", 2), ("teacher", 5), ("tts", 1), ("tts", 4), ("write", 2), ("write", 30), ("rename", 9)]
    + [("rename", at) for at in range(13, 22, 2)],
)
def test_an_interrupted_run_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, part, at):
    teacher, tts = FakeTeacher(), FakeTTS(["a", "b"])
    with monkeypatch.context() as patch:
        if part == "teacher":
            teacher.generate = failing(teacher.generate, at=at)
        elif part == "tts":
            tts.synthesize = failing(tts.synthesize, at=at)
        elif part == "write":
            patch.setattr(speech_module.ManifestWriter, "write", failing(speech_module.ManifestWriter.write, at=at))
        else:  # between two files that belong together
            patch.setattr(Path, "replace", failing(Path.replace, at=at - 10))
            patch.setattr("os.replace", failing(__import__("os").replace, at=at))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "data", teacher=teacher, tts=tts).run(CONFIG)
    build(tmp_path / "data").run(CONFIG)
    assert contents(tmp_path / "data") == contents(finished)


def test_a_clip_that_an_augmentation_made_too_long_is_dropped_and_counted(tmp_path):
    slow = Speed(factors=[0.5], seed=1)
    splits = make_splits(FakeTTS(["a", "b"]), dev={"augment": slow})
    card = build(tmp_path, splits=splits, max_duration_seconds=0.2).run(CONFIG)
    long = [row for row in rows_of(tmp_path, "dropped.jsonl") if row["reason"] == "speech: longer than 0.2 s"]
    assert long
    assert all(row["id"].startswith("dev-") and len(row["text"]) * 200 > 0.2 * 8000 for row in long)
    assert card["splits"]["dev"]["clips"] + len(long) == 8


def test_other_settings_are_refused_or_set_aside(tmp_path):
    output = tmp_path / "data"
    build(output).run(CONFIG)
    build(output).run(CONFIG | {"max_batches": 999})  # may change
    changed = {"seed": 2, "teacher": {"path": "y", "dtype": "float32"}}
    with pytest.raises(ValueError, match=r"other settings \(seed, teacher.dtype, teacher.path\); choose another"):
        build(output).run(changed)
    build(output, on_change="restart", seed=2).run(changed)
    assert (tmp_path / "data.old1" / "card.json").exists()
    assert json.loads((output / "config.json").read_text())["seed"] == 2


def test_unmet_quotas_stop_or_go_on(tmp_path):
    with pytest.raises(ValueError, match=r"50 instructions sampled in 2 batches: train/open lacks \d+ of 25") as caught:
        build(tmp_path, max_batches=2).run(CONFIG)
    assert "quota: " in str(caught.value)
    assert (tmp_path / "counts.json").exists()
    card = build(tmp_path, max_batches=2, allow_fewer=True).run(CONFIG)
    assert 0 < card["splits"]["train"]["clips"] < 50
    card = build(tmp_path).run(CONFIG)  # more batches: the last shards grow
    assert card["splits"]["train"]["clips"] == 50
    assert len(list(read_manifest(tmp_path / "train"))) == 50


def test_growing_gives_what_one_run_gives(finished, tmp_path):
    build(tmp_path, max_batches=2, allow_fewer=True).run(CONFIG)
    build(tmp_path).run(CONFIG)
    assert contents(tmp_path) == contents(finished)


def test_clips_that_fail_are_dropped_and_counted(tmp_path):
    card = build(tmp_path, tts=FakeTTS(["a", "b"], mute=["cat"]), max_duration_seconds=0.11).run(CONFIG)
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    mute = [row for row in dropped if row["reason"] == "speech: the synthesizer refused the text"]
    long = [row for row in dropped if row["reason"] == "speech: longer than 0.11 s"]
    assert mute
    assert all("cat" in row["text"].split() for row in mute)
    assert long
    assert all(len(row["text"]) * 100 > 0.11 * 8000 for row in long)
    speech = [row for row in mute + long if row["id"].startswith("train-")]
    assert card["splits"]["train"]["clips"] + len(speech) == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": {"tts": FakeTTS(["b", "c"])}}, r"split dev shares 1 speakers with train \(b"),
        ({"dev": {"size": -1}}, "split dev: size -1"),
        ({"train": {"size": 0}}, "splits are .'dev', 'test', 'test_seen'., synthesis.train_split is 'train'"),
        ({"dev": {"name": "test"}}, "expected different names"),
        ({"test_seen": {"instructions_of": "tset"}}, "instructions_of 'tset'"),
        ({"test_seen": {"size": 11}}, "wants 11 instructions of test, which finds 10"),
        ({"train": {"shares": {"open": 0.5, "closed": 0.6}}}, r"add up to 1.1; expected 1"),
        ({"train": {"size": 10**14}}, "free some space"),
        ({"train": {"num_responses": 2}}, r"num_responses 2 at response_params.temperature 0; expected"),
        ({"test_seen": {"num_responses": 0}}, "num_responses 0 at"),
    ],
)
def test_splits_that_contradict_each_other_are_refused(tmp_path, changes, message):
    greedy = SamplingParams(max_new_tokens=9, temperature=0.0)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, splits=make_splits(FakeTTS(["a", "b"]), **changes), response_params=greedy)


def test_several_answers_are_the_business_of_the_split_that_asks(tmp_path):
    splits = make_splits(FakeTTS(["a", "b"]), test_seen={"num_responses": 2})
    sampled = SamplingParams(max_new_tokens=9, temperature=1.0)
    with pytest.raises(ValueError, match="split test_seen: num_responses 2, but it speaks what test has found"):
        build(tmp_path, splits=splits, response_params=sampled)


def test_each_instruction_is_recorded_by_several_speakers(tmp_path):
    tts = FakeTTS([f"s{n}" for n in range(50)])
    splits = make_splits(tts, train={"size": 10, "recordings": 3}, dev={"size": 0}, test_seen={"size": 0})
    card = build(tmp_path / "data", splits=splits, shard_size=7).run(CONFIG)
    cuts = list(read_manifest(tmp_path / "data" / "train"))
    once = build(tmp_path / "once", splits=make_splits(tts, train={"size": 10}))
    once.run(CONFIG)
    first = [cut.supervisions[0].text for cut in read_manifest(tmp_path / "once" / "train")]
    assert [cut.supervisions[0].text for cut in cuts] == [text for text in first for _ in range(3)], "the same prompts"
    assert [cut.id for cut in cuts] == [f"train-{n:06d}" for n in range(30)]
    speakers = [cut.custom["speaker"] for cut in cuts]
    assert max(Counter(speakers).values()) < 5, "drawn for each recording"
    assert card["splits"]["train"]["clips"] == 30


@pytest.mark.parametrize("recordings", [0, "two", 1.5, True])
def test_a_number_of_recordings_that_is_none_is_refused(tmp_path, recordings):
    with pytest.raises(ValueError, match=rf"split train: recordings {recordings!r}; expected how many of each"):
        build(tmp_path, splits=make_splits(FakeTTS(["a", "b"]), train={"recordings": recordings}))


def test_every_voice_speaks_every_instruction(tmp_path):
    tts = FakeTTS(["c fast", "c slow", "d"])
    tts.voices = {"c fast": "c", "c slow": "c", "d": "d"}
    small = {"train": {"size": 20}, "dev": {"size": 0}, "test": {"tts": tts, "size": 10}}
    every = {"tts": tts, "recordings": "every_voice", "size": 7, "seen_speakers": False}
    splits = make_splits(FakeTTS(["a", "b"]), **small, test_seen=every)
    build(tmp_path / "data", splits=splits, shard_size=5).run(CONFIG)
    first = [cut.supervisions[0].text for cut in read_manifest(tmp_path / "data" / "test")][:7]
    cuts = list(read_manifest(tmp_path / "data" / "test_seen"))
    assert [cut.supervisions[0].text for cut in cuts] == [text for text in first for _ in range(2)]
    assert [cut.id for cut in cuts] == [f"test_seen-{n:06d}" for n in range(14)]
    speakers = [cut.custom["speaker"] for cut in cuts]
    assert speakers[1::2] == ["d"] * 7
    assert set(speakers[::2]) == {"c fast", "c slow"}
    assert len(list((tmp_path / "data" / "test_seen").glob("cuts.*"))) == 3
    assert not (tmp_path / "data" / "dev").exists(), "of size 0"
    card = json.loads((tmp_path / "data" / "card.json").read_text())
    assert {name: split["clips"] for name, split in card["splits"].items()} == {
        "train": 20, "test": 10, "test_seen": 14
    }  # fmt: skip


def test_an_unusable_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose a writable folder"):
        build(tmp_path / "file" / "data")
    with pytest.raises(ValueError, match="on_change is 'ask'"):
        build(tmp_path, on_change="ask")


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    synthesis = build(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(speech_module.ManifestWriter, "write", full)
        with pytest.raises(ValueError, match="free some space and run again"):
            synthesis.run(CONFIG)
    synthesis.run(CONFIG)
    assert len(list(read_manifest(tmp_path / "train"))) == 50


def test_splits_that_leak_are_found(tmp_path):
    class Sampler:
        def batch(self, index: int) -> list[str]:
            return [f"say {index}", f"Say, {index}!"]

    rows = {"split_of": lambda text: "train" if text[0] == "s" else "dev", "sampler": Sampler(), "allow_fewer": True}
    with pytest.raises(ValueError, match=r"'Say, 0!' is in train and in dev; synthesis.split_of must"):
        build(tmp_path, instruction_filters=[], **rows).run(CONFIG)


def test_hash_split_keeps_its_shares():
    names = [hash_split(f"instruction {i}", shares={"train": 8, "test": 2}) for i in range(2000)]
    assert names.count("test") == pytest.approx(400, abs=60)
    assert hash_split("Hello, World", shares={"a": 1, "b": 1}) == hash_split("hello world!", shares={"a": 1, "b": 1})


class Translations:
    """Sentences with their translations, and one that could not be read."""

    def batch(self, index: int) -> list[Draft]:
        given = {"task": "translation", "context": "Translate into German.", "extra": {"target_language": "de"}}
        drafts = [Draft(text=f"say {w}", response=f"sag {w}", aliases=(f"sage {w}",), **given) for w in ("a", "b", "c")]
        return [*drafts, Draft(text="?", reason="garbage")]


def test_targets_reach_the_manifest_and_are_not_asked_for(tmp_path):
    teacher, tts = FakeTeacher(), FakeTTS(["a", "b"])
    row = {"name": "train", "instructions_of": "train", "size": 3, "tts": tts, "augment": None, "shares": {},
           "seen_speakers": True, "num_responses": 1, "recordings": 1}  # fmt: skip
    settings = {"sampler": Translations(), "splits": [Split(**row)], "split_of": lambda text: "train"}
    settings |= {"spoken_form": None, "max_batches": 1}
    card = build(tmp_path, teacher=teacher, tts=tts, **settings).run(CONFIG)
    assert teacher.calls == 0
    found = [cut_to_utterance(cut).instruction for cut in read_manifest(tmp_path / "train")]
    assert [(i.text, i.response, i.aliases) for i in found] == [
        (f"say {w}", f"sag {w}", (f"sage {w}",)) for w in ("a", "b", "c")
    ]
    assert {(i.task, i.context, i.extra["target_language"]) for i in found} == {
        ("translation", "Translate into German.", "de")
    }
    assert check_manifest(tmp_path / "train").problems == []
    assert card["splits"]["train"]["languages"] == {"not told to de": 3}
    assert card["dropped"] == {"sampler: garbage": 1}
    assert [row["text"] for row in rows_of(tmp_path, "dropped.jsonl")] == ["?"]


def test_a_sampler_that_repeats_itself_is_told_of(tmp_path, monkeypatch):
    class Parrot:
        def batch(self, index: int) -> list[str]:
            return ["say a"] * 500

    monkeypatch.setattr("nemo_rba.synthesis.text.BARREN_SAMPLES", 1000)
    monkeypatch.setattr("nemo_rba.synthesis.pipeline.BARREN_SAMPLES", 1000)
    given_up = r"1500 instructions sampled in 3 batches: .*\(given up, as the last 1000 were of no use\)"
    with pytest.raises(ValueError, match=given_up + r". Most dropped for: duplicate: seen before \(1499\)"):
        build(tmp_path, sampler=Parrot()).run(CONFIG)
