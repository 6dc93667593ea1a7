# SPDX-License-Identifier: Apache-2.0
"""Who was spoken by whom: from the manifest to the answers, their scores and the report."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_study as synthetic
import torch
from lhotse import CutSet

from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.document import Paragraph, Table
from nemo_rba.evaluation.parts import voice_blocks
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles, summarise
from nemo_rba.evaluation.runner import Prediction, read_answers, rescore, run
from nemo_rba.evaluation.tasks import InstructionFollowingTask
from nemo_rba.manifest import read_manifest, read_speakers, utterance_to_cut, write_shar
from nemo_rba.types import Instruction, Rollout, SpeechBatch, Utterance

ROLES = Roles(systems={"t": "T", "s": "S0", "a": "RBA", "b": "SFT"}, teacher="T", start="S0", arms=["RBA", "SFT"])
NUM_ITEMS = 60


def spoken(num_voices: int, num_items: int = NUM_ITEMS) -> list[Prediction]:
    """The made-up study, every ``num_voices``-th item by the same voice."""
    predictions = synthetic.make_predictions(num_items)
    return [replace(p, speaker=f"v{int(p.id.split('-')[-1]) % num_voices:02d}") for p in predictions]


def said(voice: str, rates: dict[str, float], *, num: int = 10, measure: str = "score", offset: int = 0) -> list:
    """``num`` items of one voice, of which each system gets a share right."""
    return [
        Prediction(
            system=system, task="set", measure=measure, id=f"{voice}-{offset + n}", family="f", kind="", context="",
            text=f"say {voice} {offset + n}", heard=f"say {voice} {offset + n}", speaker=voice, reference="",
            response="", truncated=False, value=100.0 * (n < rate * num), weight=1.0,
        )
        for system, rate in rates.items() for n in range(num)
    ]  # fmt: skip


def table(predictions: list[Prediction], roles: Roles = ROLES) -> tuple[list[str], str, bool]:
    """Rows of the table of voices, what is said above it, whether there is a figure."""
    (condition,) = summarise(predictions, roles, num_draws=50, seed=0)
    blocks = voice_blocks([condition], roles)
    rows = [row for block in blocks if isinstance(block, Table) for row in block.rows]
    words = [block.text for block in blocks if isinstance(block, Paragraph)]
    return rows, " ".join(words), len(blocks) == 4


def test_a_voice_is_scored_as_if_it_were_alone():
    predictions = spoken(3)
    for condition in summarise(predictions, synthetic.ROLES, num_draws=50, seed=0):
        assert condition.num_voices == 3
        assert {voice: part.num_items for voice, part in condition.voices.items()} == {"v00": 20, "v01": 20, "v02": 20}
        for voice, part in condition.voices.items():
            alone = [p for p in predictions if (p.task, p.speaker) == (condition.name, voice)]
            (expected,) = summarise(alone, synthetic.ROLES, num_draws=50, seed=0)
            assert repr(part) == repr(expected.whole), "scores, intervals, gap, differences"
            assert (expected.num_voices, expected.voices) == (1, {}), "one voice is the whole"
    unknown = [replace(p, speaker="") for p in predictions]
    assert {c.num_voices for c in summarise(unknown, synthetic.ROLES, num_draws=5, seed=0)} == {0}


def test_the_voice_on_which_the_first_arm_fails_is_on_top_and_the_best_arm_bold():
    teacher = {"t": 1.0, "s": 0.3}
    predictions = [
        *said("anna", {**teacher, "a": 0.9, "b": 0.5}), *said("ben", {**teacher, "a": 0.2, "b": 0.6}),
        *said("carl", {**teacher, "a": 0.5, "b": 0.5}),
    ]  # fmt: skip
    rows, words, has_figure = table(predictions)
    assert [[cell.split(" [")[0] for cell in row] for row in rows] == [
        ["ben", "10", "100.0", "30.0", "20.0", "60.0"],
        ["carl", "10", "100.0", "30.0", "50.0", "50.0"],
        ["anna", "10", "100.0", "30.0", "90.0", "50.0"],
    ]
    assert [[type(cell).__name__ == "Strong" for cell in row] for row in rows] == [
        [False] * 5 + [True], [False] * 6, [False] * 4 + [True, False],
    ]  # fmt: skip
    assert words.startswith("3 voices speak; that on which RBA does worst is on top. The worst of several is")
    assert has_figure


def test_of_error_rates_the_highest_is_on_top_and_the_lowest_bold():
    some = {"s": 0.5, "a": 0.4, "b": 0.3}
    predictions = [*said("anna", some, measure="wer"), *said("ben", {**some, "a": 0.6}, measure="wer")]
    rows, _, has_figure = table(predictions)
    assert [row[0] for row in rows] == ["ben", "anna"]
    assert [[type(cell).__name__ == "Strong" for cell in row] for row in rows] == [[False] * 5 + [True]] * 2
    assert not has_figure, "there may be no start and no teacher"
    only = [p for p in predictions if p.system == "s"]
    rows, words, _ = table(only)
    assert "that on which S0 does worst" in words
    assert rows[0][2:] == ["–", rows[0][3], "–", "–"]


def test_of_many_voices_the_worst_and_the_best_are_shown_and_the_others_counted():
    rates = {"t": 1.0, "s": 0.0, "b": 0.0}
    predictions = [p for n in range(21) for p in said(f"v{n:02d}", {**rates, "a": n / 20}, num=20)]
    rows, words, has_figure = table(predictions)
    assert [row[0] for row in rows] == [f"v{n:02d}" for n in (*range(6), *range(15, 21))]
    assert "The 6 worst and as many best of 21 are shown; results.json has all." in words
    assert has_figure
    (condition,) = summarise(predictions, ROLES, num_draws=5, seed=0)
    assert len(condition.voices) == 21


def test_voices_with_few_items_and_items_without_a_voice_are_counted():
    rates = {"t": 1.0, "s": 0.0, "a": 0.5, "b": 0.0}
    digest = "0123456789abcdef" * 8
    predictions = [*said(digest, rates, num=5), *said("two", rates, num=4), *said("", rates, num=3), *said("x", rates)]
    rows, words, _ = table(predictions)
    assert [row[:2] for row in rows] == [["x", "10"], ["0123456789a…56789abcdef", "5"]], "0.6 of 5 is more than half"
    assert "3 voices speak" in words
    assert "Left out, with fewer than 5 items: 1. These are 15 of 22 items." in words
    rows, words, _ = table([*said("one", rates, num=4), *said("two", rates, num=4)])
    assert rows == []
    assert "Left out, with fewer than 5 items: 2." in words


def test_the_report_has_the_table_and_its_figure_where_several_voices_speak(tmp_path):
    settings = {
        "title": "t", "roles": synthetic.ROLES, "curves": None, "budget": {}, "notes": [], "held_out": {},
        "num_samples": 2, "num_draws": 50, "seed": 0,
    }  # fmt: skip
    results = write_report(folder=tmp_path / "several", predictions=spoken(4), **settings)
    markdown, page = ((tmp_path / "several" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (markdown, page):
        assert text.count("By voice: ") == 2
    assert (tmp_path / "several" / "plots" / "voices.png").exists()
    score = results["conditions"][0]["voices"]["v02"]["scores"]["RBA"]
    cell = f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"
    lines = markdown.split("## By voice: held-out voices")[1].splitlines()
    (row,) = [line for line in lines if line.startswith("| v02")][:1]
    assert cell in row
    stored = json.loads((tmp_path / "several" / "results.json").read_text())
    assert stored["conditions"][0]["num_voices"] == 4
    assert stored["conditions"][1]["voices"]["v03"]["differences"]["SFT"]["p_value"] > 0
    for name, predictions in (("one", spoken(1)), ("none", synthetic.make_predictions(NUM_ITEMS))):
        results = write_report(folder=tmp_path / name, predictions=predictions, **settings)
        assert "By voice" not in (tmp_path / name / "report.md").read_text()
        assert not (tmp_path / name / "plots" / "voices.png").exists()
        assert results["conditions"][0]["voices"] == {}


# ---- from the manifest to the answers


WORDS = ["red", "green", "blue"]
SPEAKERS = {"id-red": "anna", "id-green": "ben", "id-blue": "anna"}


def utterances() -> list[Utterance]:
    return [
        Utterance(
            instruction=Instruction(id=f"id-{word}", text=f"say {word}", response=word, task="say"),
            audio=torch.zeros(160), sampling_rate=16000, speaker=SPEAKERS[f"id-{word}"],
        )
        for word in WORDS
    ]  # fmt: skip


def batch() -> SpeechBatch:
    size, ids = len(WORDS), torch.zeros(len(WORDS), 1, dtype=torch.int64)
    return SpeechBatch(
        instructions=tuple(utterance.instruction for utterance in utterances()), audio=torch.zeros(size, 8),
        audio_lens=torch.full((size,), 8), prompt_ids=ids, prompt_lens=ids[:, 0], response_ids=ids,
        response_lens=ids[:, 0],
    )  # fmt: skip


class Parrot:
    name, decoding = "parrot", {"temperature": 0.0}

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=row, instruction=item, response=item.text, token_ids=torch.tensor([1]), logprobs=None,
                truncated=False,
            )
            for row, item in enumerate(batch.instructions)
        ]  # fmt: skip


def make_task() -> InstructionFollowingTask:
    return InstructionFollowingTask(name="colours", batches=lambda: [batch()], verify=lambda *_: 1.0, kinds={})


def told(predictions: list[Prediction]) -> dict[str, str]:
    return {prediction.id: prediction.speaker for prediction in predictions}


@pytest.fixture
def manifest(tmp_path) -> Path:
    write_shar(utterances(), tmp_path / "colours", shard_size=2, audio_format="wav", teacher="t")
    return tmp_path / "colours"


def test_the_manifest_tells_who_speaks_and_who_reads_hears_nobody(manifest, tmp_path):
    assert HeldOut(manifest=manifest).speakers() == SPEAKERS
    assert HeldOut(manifest=manifest, typed=True).speakers() == {}
    cuts = [utterance_to_cut(utterance, teacher="t").drop_in_memory_data() for utterance in utterances()]
    cuts[1].custom = None
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    assert read_speakers(tmp_path / "cuts.jsonl") == {**SPEAKERS, "id-green": ""}, "not told"
    with (tmp_path / "cuts.jsonl").open("a") as file:
        file.write('{"id": "cut o')
    with pytest.raises(ValueError, match=r"cuts.jsonl line 4 is cut off"):
        read_speakers(tmp_path / "cuts.jsonl")
    with pytest.raises(ValueError, match="no manifest at"):
        read_speakers(tmp_path / "nowhere.jsonl")
    shard = manifest / "cuts.000001.jsonl.gz"
    shard.write_bytes(gzip.compress(gzip.decompress(shard.read_bytes()))[:-9])
    with pytest.raises(ValueError, match="ends early"):
        read_speakers(manifest)


def test_a_prediction_knows_who_spoke(manifest, tmp_path):
    speakers = HeldOut(manifest=manifest).speakers()
    answered = run(Parrot(), make_task(), tmp_path, {}, speakers)
    assert told(answered) == SPEAKERS
    lines = [json.loads(line) for line in (tmp_path / "colours" / "parrot.jsonl").read_text().splitlines()[1:]]
    assert {line["id"]: line["speaker"] for line in lines} == SPEAKERS
    saved = read_answers("parrot", "colours", tmp_path)
    assert rescore(saved, make_task(), list(batch().instructions)) == answered, "what the file says is kept"
    renamed = dict.fromkeys(speakers, "c")
    assert set(told(rescore(saved, make_task(), list(batch().instructions), renamed)).values()) == {"c"}


def test_a_file_of_before_speakers_were_kept_is_read_and_learns_them(manifest, tmp_path):
    run(Parrot(), make_task(), tmp_path)
    path = tmp_path / "colours" / "parrot.jsonl"
    header, *lines = path.read_text().splitlines()
    old = [{key: value for key, value in json.loads(line).items() if key != "speaker"} for line in lines]
    path.write_text("\n".join([header, *map(json.dumps, old)]) + "\n")
    speakers = HeldOut(manifest=manifest).speakers()
    again = run(Parrot(), make_task(), tmp_path, {}, speakers)
    items = [cut.id for cut in read_manifest(manifest)]
    assert told(again) == SPEAKERS == {id: speakers[id] for id in items}
    saved = read_answers("parrot", "colours", tmp_path)
    assert rescore(saved, make_task(), list(batch().instructions), speakers) == again
    assert set(told(list(saved.predictions.values())).values()) == {""}
