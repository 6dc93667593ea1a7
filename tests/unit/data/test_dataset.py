# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from nemo_rba.data.dataset import SpeechInstructionDataset


@pytest.fixture
def dataset(tmp_path: Path, word_prompt) -> SpeechInstructionDataset:
    return SpeechInstructionDataset(
        prompt=word_prompt,
        sampling_rate=16000,
        max_duration_seconds=1.0,
        max_response_tokens=12,
        quarantine=tmp_path / "log" / "quarantine.jsonl",
    )


def listed(dataset: SpeechInstructionDataset) -> list[tuple[str, str]]:
    entries = [json.loads(line) for line in dataset.quarantine.read_text().splitlines()]
    assert all(set(entry) == {"id", "reason", "detail"} for entry in entries)
    return [(entry["id"], entry["reason"]) for entry in entries]


def level(value: float, num_samples: int = 800) -> torch.Tensor:
    return torch.full((num_samples,), value)


def test_a_batch_is_padded_on_the_right(dataset, cut_of):
    batch = dataset[CutSet.from_cuts([cut_of("a", level(0.5)), cut_of("bcd", level(-0.25, 500), context="x:")])]
    assert [instruction.id for instruction in batch.instructions] == ["a", "bcd"]
    assert batch.audio.shape == (2, 800)
    assert batch.audio.dtype == torch.float32
    assert batch.audio_lens.tolist() == [800, 500]
    torch.testing.assert_close(batch.audio[0], level(0.5))
    torch.testing.assert_close(batch.audio[1], torch.cat([level(-0.25, 500), torch.zeros(300)]))
    assert batch.prompt_ids.tolist() == [[1, 0, 0], [ord("x"), ord(":"), 1]]
    assert batch.prompt_lens.tolist() == [1, 3]
    assert batch.response_ids[0].tolist() == [*map(ord, "it is a"), 2, 0, 0]
    assert batch.response_lens.tolist() == [8, 10]
    assert batch.prompt_ids.dtype == batch.response_ids.dtype == batch.audio_lens.dtype == torch.int64


def test_the_same_cuts_give_the_same_batch(dataset, cut_of):
    cuts = CutSet.from_cuts([cut_of("a", torch.rand(700) - 0.5), cut_of("b", torch.rand(400) - 0.5, rate=8000)])
    one, two = dataset[cuts], dataset[cuts]
    assert torch.equal(one.audio, two.audio)
    assert torch.equal(one.response_ids, two.response_ids)


def test_other_rates_are_resampled_and_counted_not_dropped(dataset, cut_of):
    batch = dataset[CutSet.from_cuts([cut_of("a", level(0.5, 400), rate=8000)])]
    assert batch.audio_lens.tolist() == [800]
    assert batch.audio[0, 300:500].mean() == pytest.approx(0.5, abs=0.02)
    assert dataset.counts == {"resampled": 1}
    assert listed(dataset) == []


def test_channels_are_averaged(dataset, cut_of):
    batch = dataset[CutSet.from_cuts([cut_of("a", torch.stack([level(0.5), level(0.1)]))])]
    torch.testing.assert_close(batch.audio[0], level(0.3))
    assert batch.instructions[0].id == "a"


def test_slight_overshoot_is_clipped(dataset, cut_of):
    batch = dataset[CutSet.from_cuts([cut_of("a", level(1.1))])]
    torch.testing.assert_close(batch.audio[0], level(1.0))


def missing(cut_of):
    cut = cut_of("bad", level(0.5))
    Path(cut.recording.sources[0].source).unlink()
    return cut


def garbled(cut_of):
    cut = cut_of("bad", level(0.5))
    Path(cut.recording.sources[0].source).write_bytes(b"no sound at all")
    return cut


def emptied(cut_of):
    cut = cut_of("bad", level(0.5))
    Path(cut.recording.sources[0].source).write_bytes(b"")
    return cut


def twenty_minutes(cut_of):
    cut = cut_of("bad", level(0.5))
    cut.recording.num_samples = 20 * 60 * 16000
    cut.recording.duration = cut.duration = 20 * 60.0
    return cut


def holed(cut_of):
    audio = level(0.5)
    audio[3] = torch.nan
    return cut_of("bad", audio)


def foreign(cut_of):
    cut = cut_of("bad", level(0.5))
    cut.custom = None
    return cut


@pytest.mark.parametrize(
    ("bad_cut", "reason"),
    [
        (missing, "missing audio"),
        (garbled, "unreadable audio"),
        (emptied, "unreadable audio"),
        (twenty_minutes, "is longer than 1 s"),
        (holed, "audio not finite"),
        (lambda cut_of: cut_of("bad", level(20000.0)), "audio out of range"),
        (lambda cut_of: cut_of("bad", level(0.5), response=" "), "has an empty response"),
        (lambda cut_of: cut_of("bad", level(0.5), response="x" * 12), "response too long"),
        (lambda cut_of: cut_of("bad", level(0.5), context="<|audio|>"), "text cannot be encoded"),
        (foreign, "has no custom field rba_manifest"),
    ],
)
def test_unusable_items_are_skipped_counted_and_listed(dataset, cut_of, bad_cut, reason):
    cuts = [cut_of("a", level(0.5)), bad_cut(cut_of), cut_of("b", level(0.25))]
    for _ in range(2):  # the second time it is neither counted nor listed again
        batch = dataset[CutSet.from_cuts(cuts)]
        assert [instruction.id for instruction in batch.instructions] == ["a", "b"]
    ((bad_id, why),) = listed(dataset)
    assert bad_id == "bad"
    assert why.startswith(reason)
    assert dataset.counts[why] == 1


def test_a_batch_without_usable_items_is_none(dataset, cut_of):
    assert dataset[CutSet.from_cuts([missing(cut_of)])] is None


def test_an_augmentation_is_applied_to_what_was_read_by_the_cut_alone(tmp_path, word_prompt, cut_of):
    asked = []

    def slower(audio: torch.Tensor, sampling_rate: int, key: str) -> torch.Tensor:
        asked.append((len(audio), sampling_rate, key))
        return audio.repeat(2) * 0.5

    dataset = SpeechInstructionDataset(
        prompt=word_prompt,
        sampling_rate=16000,
        max_duration_seconds=0.1,
        max_response_tokens=12,
        quarantine=tmp_path / "quarantine.jsonl",
        augmentation=slower,
    )
    cuts = [cut_of("a", level(0.5)), cut_of("b", level(0.25, 300), rate=8000), cut_of("c", level(0.5, 801))]
    for _ in range(2):
        batch = dataset[CutSet.from_cuts(cuts)]
        assert batch.audio_lens.tolist() == [1600, 1200]
        torch.testing.assert_close(batch.audio[0], level(0.25, 1600))
    assert asked == [(800, 16000, "read/a"), (600, 16000, "read/b"), (801, 16000, "read/c")] * 2
    assert listed(dataset) == [("c", "too long after augmentation")]
    assert batch.instructions[0].text == "say a"


@pytest.mark.parametrize("broken", [torch.full((5,), torch.nan), torch.empty(0)])
def test_what_an_augmentation_breaks_is_set_aside(tmp_path, word_prompt, cut_of, broken):
    dataset = SpeechInstructionDataset(
        prompt=word_prompt, sampling_rate=16000, max_duration_seconds=1.0, max_response_tokens=12,
        quarantine=tmp_path / "quarantine.jsonl", augmentation=lambda audio, rate, key: broken,
    )  # fmt: skip
    assert dataset[CutSet.from_cuts([cut_of("a", level(0.5))])] is None
    assert listed(dataset) == [("a", "not finite after augmentation")]


@pytest.mark.parametrize("key", ["sampling_rate", "max_duration_seconds", "max_response_tokens"])
def test_limits_must_be_positive(tmp_path, word_prompt, key):
    settings = {"sampling_rate": 16000, "max_duration_seconds": 1.0, "max_response_tokens": 9} | {key: 0}
    with pytest.raises(ValueError, match=f"{key}=0: expected a number above 0"):
        SpeechInstructionDataset(prompt=word_prompt, quarantine=tmp_path / "q.jsonl", **settings)


def test_an_unwritable_quarantine_is_found_at_setup(tmp_path, word_prompt):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"quarantine='.*' cannot be written"):
        SpeechInstructionDataset(
            prompt=word_prompt,
            sampling_rate=16000,
            max_duration_seconds=1.0,
            max_response_tokens=9,
            quarantine=tmp_path / "file" / "q.jsonl",
        )
