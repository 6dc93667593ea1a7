# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from nemo_rba.benchmarks.voicebench import SPLITS, SpeechIFEval, VoiceBench

from .conftest import NO_SOUND, check_round_trip, embedded, pitch, write_lines, write_parquet, write_sound

QUESTION = "Which is wet?\nA. a marsh\nB. a desert\nC. the moon\nD. a bone\nPlease choose one."
FIELDS = {
    "sd-qa": {"reference": "Paris"},
    "openbookqa": {"reference": "A"},
    "mmsu": {"reference": "B", "question_id": 7, "category": "law", "src": "stemez"},
    "bbh": {"reference": "Yes", "id": "bbh_navigate_147"},
    "ifeval": {
        "key": 1000, "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None, "relation": None}, {"num_words": 300, "relation": "at least"}],
    },
    "mtbench": {
        "question_id": 111, "category": "math", "turns": [QUESTION, "And which of them is far?"],
        "reference": ["A marsh.", "The moon."], "audio2": None,
    },
}  # fmt: skip


def row(subset: str, hertz: float = 400.0, **changes) -> dict:
    if subset == "mtbench":
        return {"audio1": embedded(hertz), **FIELDS[subset], **changes}
    return {"audio": embedded(hertz), "prompt": QUESTION, **FIELDS.get(subset, {}), **changes}


def subset_of(folder, subset: str, splits=()) -> VoiceBench:
    return VoiceBench(folder=str(folder), subset=subset, splits=splits, sampling_rate=16000)


@pytest.mark.parametrize("subset", SPLITS)
def test_every_subset_is_read_and_kept_by_a_manifest(tmp_path, subset):
    for split in SPLITS[subset]:
        write_parquet(tmp_path / subset / f"{split}-00000-of-00001.parquet", [row(subset), row(subset, 600)])
    items = check_round_trip(subset_of(tmp_path, subset), tmp_path / "manifest")
    assert len(items) == 2 * len(SPLITS[subset])
    assert [pitch(item.audio) for item in items[:2]] == [400, 600]
    assert all(len(item.audio) == 3200 and item.sampling_rate == 16000 for item in items)
    assert {item.instruction.text for item in items} == {QUESTION}


def test_regions_are_tasks_and_can_be_chosen(tmp_path):
    for split in SPLITS["sd-qa"]:
        write_parquet(tmp_path / "sd-qa" / f"{split}-00000-of-00001.parquet", [row("sd-qa", reference=split)])
    (item,) = subset_of(tmp_path, "sd-qa", ["ind_n"])
    instruction = item.instruction
    assert (instruction.id, instruction.task) == ("voicebench-sd-qa-ind_n-000000", "sd-qa-ind_n")
    assert (instruction.response, instruction.extra) == ("ind_n", {})


def test_what_a_measure_needs_is_in_extra(tmp_path):
    expected = {
        "alpacaeval": ("", {}),
        "advbench": ("", {}),
        "bbh": ("Yes", {"id": "bbh_navigate_147"}),
        "openbookqa": ("A", {"options": ["a marsh", "a desert", "the moon", "a bone"]}),
        "ifeval": ("", {
            "key": 1000, "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": 300, "relation": "at least"}],
        }),
    }  # fmt: skip
    for subset, found in expected.items():
        write_parquet(tmp_path / subset / "test-00000-of-00001.parquet", [row(subset)])
        (item,) = subset_of(tmp_path, subset)
        assert (item.instruction.response, item.instruction.extra) == found
        assert item.instruction.task == subset


def test_of_a_conversation_the_first_turn_is_asked_and_the_others_are_counted(tmp_path):
    rows = [row("mtbench"), row("mtbench", 600, category="writing", reference=[None, None])]
    write_parquet(tmp_path / "mtbench" / "test-00000-of-00001.parquet", rows)
    benchmark = subset_of(tmp_path, "mtbench")
    first, second = (item.instruction for item in benchmark)
    assert [first.id, second.id] == ["voicebench-mtbench-test-000000", "voicebench-mtbench-test-000001"]
    assert [first.task, second.task] == ["mtbench-math", "mtbench-writing"]
    assert [first.response, second.response] == ["A marsh.", ""]
    assert first.extra == {"question_id": 111, "category": "math"}
    assert dict(benchmark.counts) == {"a turn after the first": 2}


def test_a_prompt_without_lettered_lines_has_nameless_options(tmp_path):
    path = tmp_path / "openbookqa" / "test-00000-of-00001.parquet"
    write_parquet(path, [row("openbookqa", prompt="Is it a marsh, a desert, the moon or a bone?", reference="D")])
    (item,) = subset_of(tmp_path, "openbookqa")
    assert item.instruction.extra["options"] == ["option A", "option B", "option C", "option D"]


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    rows = [
        row("openbookqa"),
        row("openbookqa", audio={"bytes": NO_SOUND, "path": "x.wav"}),
        row("openbookqa", audio=None),
        row("openbookqa", audio=embedded(seconds=0.0)),
        row("openbookqa", prompt=" "),
        row("openbookqa", prompt=None),
        row("openbookqa", reference="E"),
        row("openbookqa", reference=None),
    ]
    write_parquet(tmp_path / "openbookqa" / "test-00000-of-00001.parquet", rows)
    benchmark = subset_of(tmp_path, "openbookqa")
    items = check_round_trip(benchmark, tmp_path / "manifest")
    assert [item.instruction.id for item in items] == ["voicebench-openbookqa-test-000000"]
    assert dict(benchmark.counts) == {
        "unreadable audio": 1, "no audio in the table": 1, "empty audio": 1, "no words": 2, "reference is no option": 1,
        "no answer": 1,
    }  # fmt: skip


def test_shards_are_read_one_after_the_other_when_they_are_needed(tmp_path):
    paths = [tmp_path / "wildvoice" / f"test-{n:05d}-of-00002.parquet" for n in range(2)]
    for path in paths:
        write_parquet(path, [row("wildvoice")] * 3)
    benchmark = subset_of(tmp_path, "wildvoice")
    assert [item.instruction.id for item in benchmark][-1] == "voicebench-wildvoice-test-000005"
    paths[1].unlink()
    items = iter(benchmark)
    assert [next(items).instruction.id[-1] for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError):
        next(items)


def test_missing_things_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 1 of 1 files: bbh/test-00000-of-00001.parquet. Give source= the"):
        subset_of(tmp_path, "bbh")
    for number in (0, 2):
        write_parquet(tmp_path / "bbh" / f"test-{number:05d}-of-00004.parquet", [row("bbh")])
    with pytest.raises(ValueError, match=r"lacks 2 of 4 files: bbh/test-00001-of-00004.parquet, bbh/test-00003-of"):
        subset_of(tmp_path, "bbh")
    write_parquet(tmp_path / "mmsu" / "law-00000-of-00001.parquet", [row("advbench")])
    with pytest.raises(ValueError, match=r"law-00000-of-00001.parquet has no reference; it has audio, prompt"):
        subset_of(tmp_path, "mmsu", ["law"])
    (tmp_path / "mmsu" / "law-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="is no Parquet file"):
        subset_of(tmp_path, "mmsu", ["law"])
    with pytest.raises(ValueError, match="subset is 'sdqa'; expected one of alpacaeval"):
        subset_of(tmp_path, "sdqa")
    with pytest.raises(ValueError, match=r"splits \(mmsu\) is 'usa'; expected one of biology"):
        subset_of(tmp_path, "mmsu", ["usa"])


def speech_ifeval_row(**changes) -> dict:
    return {
        "id": 0, "audio_filepath": "Automatic_speech_recognition/a.flac",
        "textual_audio": "[00:00:00 - 00:00:05] He sat down. Zora!(Gender: Female, Emotion: sad)",
        "instruction": "Write down what is said.\nUse capital letters.", "dataset": "Automatic_speech_recognition",
        "metric": "wer", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}],
        "label": "HE SAT DOWN ZORA",
    } | changes  # fmt: skip


def write_speech_ifeval(folder, subset: str, rows: list[dict]) -> SpeechIFEval:
    write_lines(folder / "eval_data" / f"{subset}.jsonl", map(json.dumps, rows))
    for number, found in enumerate(rows):
        write_sound(folder / "audios" / found["audio_filepath"], 400 + 200 * number)
    return SpeechIFEval(folder=str(folder), subset=subset, sampling_rate=16000)


def test_speech_ifeval_has_a_typed_instruction_and_speech_to_apply_it_to(tmp_path):
    rows = [speech_ifeval_row(), speech_ifeval_row(audio_filepath="MMAU/b.mp3", dataset="MMAU", metric="accuracy")]
    items = check_round_trip(write_speech_ifeval(tmp_path, "closed_ended_questions", rows), tmp_path / "manifest")
    first = items[0].instruction
    assert first.text == "He sat down. Zora!"
    assert first.typed == "Speech Input: [00:00:00 - 00:00:05] He sat down. Zora!(Gender: Female, Emotion: sad)"
    assert first.context == "Write down what is said.\nUse capital letters."
    assert (first.response, first.task) == ("HE SAT DOWN ZORA", "Automatic_speech_recognition")
    assert first.extra["instruction_id_list"] == ["change_case:english_capital"]
    assert (first.extra["kwargs"], first.extra["metric"]) == ([{}], "wer")
    assert [pitch(item.audio) for item in items] == [400, 600]


def test_speech_ifeval_without_label_or_constraints(tmp_path):
    row = speech_ifeval_row(metric="cot")
    for key in ("id", "label", "instruction_id_list", "kwargs"):
        del row[key]
    (item,) = write_speech_ifeval(tmp_path, "chain-of-thought", [row])
    assert (item.instruction.response, set(item.instruction.extra)) == ("", {"dataset", "metric", "audio_filepath"})


def test_speech_ifeval_names_missing_sounds_and_counts_broken_ones(tmp_path):
    rows = [speech_ifeval_row(audio_filepath=f"MMAU/{n}.wav") for n in range(13)]
    benchmark = write_speech_ifeval(tmp_path, "creative_writing", rows)
    (tmp_path / "audios" / "MMAU" / "3.wav").write_bytes(NO_SOUND)
    assert len(list(benchmark)) == 12
    assert benchmark.counts == {"unreadable audio": 1}
    for number in range(1, 13):
        (tmp_path / "audios" / "MMAU" / f"{number}.wav").unlink()
    with pytest.raises(ValueError, match=r"lacks 12 of 13 files: audios/MMAU/1.wav, .*/10.wav and 2 more"):
        SpeechIFEval(folder=str(tmp_path), subset="creative_writing", sampling_rate=16000)
    (tmp_path / "eval_data" / "creative_writing.jsonl").write_text('{"id": 0,')
    with pytest.raises(ValueError, match=r"creative_writing.jsonl is damaged"):
        SpeechIFEval(folder=str(tmp_path), subset="creative_writing", sampling_rate=16000)
    (tmp_path / "eval_data" / "creative_writing.jsonl").write_text('{"id": 0}')
    with pytest.raises(ValueError, match=r"object 1 has no audio_filepath, textual_audio, .*; it has id"):
        SpeechIFEval(folder=str(tmp_path), subset="creative_writing", sampling_rate=16000)
