# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.benchmarks.questions import LlamaQuestions, OpenAudioBench, TriviaQA, WebQuestions

from .conftest import NO_SOUND, check_round_trip, pitch, write_lines, write_parquet, write_sound


def test_llama_questions_as_their_authors_publish_them(tmp_path):
    rows = [
        "Questions\tAnswer\tWav Filename",
        'Who wrote "The Raven"? \tEdgar Allan Poe\t1.wav',
        "Capital?\tParis\t2.wav",
    ]
    write_lines(tmp_path / "llama_questions_300.tsv", rows, end="\r\n")
    with pytest.raises(ValueError, match=r"lacks 2 of 2 files: 1.wav, 2.wav"):
        LlamaQuestions(folder=str(tmp_path), sampling_rate=16000)
    for number in (1, 2):
        write_sound(tmp_path / f"{number}.wav", 200 + 200 * number, rate=24000)
    benchmark = LlamaQuestions(folder=str(tmp_path), sampling_rate=16000)
    items = check_round_trip(benchmark, tmp_path / "manifest")
    assert items[0].instruction.text == 'Who wrote "The Raven"?'
    assert (items[0].instruction.response, items[0].instruction.extra) == ("Edgar Allan Poe", {"file": "1.wav"})
    assert [pitch(item.audio) for item in items] == [400, 600]
    (tmp_path / "1.wav").write_bytes(NO_SOUND)
    assert [item.instruction.response for item in benchmark] == ["Paris"]
    assert benchmark.counts == {"unreadable audio": 1}


def open_audio_bench(folder, subset: str, lines: list[str], sounds: list[str]) -> OpenAudioBench:
    place = folder / "eval_datas" / subset
    write_lines(place / f"{subset}.csv", lines)
    for name in sounds:
        write_sound(place / "audios" / name)
    return OpenAudioBench(folder=str(folder), subset=subset, sampling_rate=16000)


@pytest.mark.parametrize(
    ("subset", "lines", "expected"),
    [
        (
            "llama_questions",
            ["Questions,Answer,audio_filename", '"Is it red, or blue?","Red, mostly",a.mp3'],
            ("Is it red, or blue?", "Red, mostly", (), {"file": "a.mp3"}),
        ),
        (
            "web_questions",
            ["question,answers,audio_filename", "who coached?,George Seifert;Dom Capers; John Fox;Dom Capers,a.mp3"],
            ("who coached?", "George Seifert", ("Dom Capers", "John Fox"), {"file": "a.mp3"}),
        ),
        (
            "trivia_qa",
            ["question,answer_normalized_aliases,answer_normalized_value,audio_filename",
             '"Where, then?","city of paris,paris",paris,a.mp3'],
            ("Where, then?", "paris", ("city of paris",), {"file": "a.mp3"}),
        ),
        (
            "alpaca_eval",
            ["instruction,output,audio_filename", '"Write a ""poem"".",Roses are red.,a.mp3'],
            ('Write a "poem".', "", (), {"file": "a.mp3", "baseline": "Roses are red."}),
        ),
    ],
)  # fmt: skip
def test_openaudiobench_is_read_from_its_tables(tmp_path, subset, lines, expected):
    (item,) = check_round_trip(open_audio_bench(tmp_path, subset, lines, ["a.mp3"]), tmp_path / "manifest")
    found = item.instruction
    assert (found.text, found.response, found.aliases, found.extra) == expected
    assert (found.id, found.task) == (f"openaudiobench-{subset}-000000", subset)


def test_openaudiobench_counts_and_names_what_is_wrong(tmp_path):
    lines = ["question,answers,audio_filename", "a?,,a.mp3", ",b,a.mp3", "c?,c,c.mp3", "d?,d,a.mp3"]
    with pytest.raises(ValueError, match=r"lacks 1 of 4 files: eval_datas/web_questions/audios/c.mp3"):
        open_audio_bench(tmp_path, "web_questions", lines, ["a.mp3"])
    benchmark = open_audio_bench(tmp_path, "web_questions", lines, ["a.mp3", "c.mp3"])
    (tmp_path / "eval_datas" / "web_questions" / "audios" / "c.mp3").write_bytes(NO_SOUND)
    assert [item.instruction.text for item in benchmark] == ["d?"]
    assert benchmark.counts == {"no answer": 1, "no words": 1, "unreadable audio": 1}
    with pytest.raises(ValueError, match=r"web_questions.csv has no question, answers; it has Questions, Answer"):
        open_audio_bench(tmp_path, "web_questions", ["Questions,Answer,audio_filename"], [])
    with pytest.raises(ValueError, match=r"web_questions.csv line 3 is cut off"):
        open_audio_bench(tmp_path, "web_questions", [lines[0], "a?,a,a.mp3", "b?,b"], [])
    with pytest.raises(ValueError, match="subset is 'reasoning_qa'"):
        OpenAudioBench(folder=str(tmp_path), subset="reasoning_qa", sampling_rate=16000)
    with pytest.raises(ValueError, match=r"eval_datas/trivia_qa/trivia_qa.csv"):
        OpenAudioBench(folder=str(tmp_path), subset="trivia_qa", sampling_rate=16000)


def trivia_row(question: str, value: str, aliases: list[str]) -> dict:
    answer = {
        "aliases": aliases, "normalized_aliases": [alias.lower() for alias in aliases],
        "matched_wiki_entity_name": "", "normalized_matched_wiki_entity_name": "", "normalized_value": value.lower(),
        "type": "WikipediaEntity", "value": value,
    }  # fmt: skip
    return {"question": question, "question_id": "tc_1", "question_source": "http://x", "answer": answer}


def test_trivia_qa_has_aliases(tmp_path):
    rows = [trivia_row("Who?", "Sinclair Lewis", ["Harry Lewis", "Sinclair Lewis", "Lewis, Sinclair"])] * 3
    rows += [trivia_row("What?", "", []), trivia_row("", "x", ["x"])]
    write_parquet(tmp_path / "rc.nocontext" / "validation-00000-of-00001.parquet", rows)
    benchmark = TriviaQA(folder=str(tmp_path), split="validation")
    items = list(benchmark)
    assert [item.id for item in items] == [f"trivia_qa-validation-{number:06d}" for number in range(3)]
    assert (items[0].response, items[0].aliases) == ("Sinclair Lewis", ("Harry Lewis", "Lewis, Sinclair"))
    assert items[0].extra == {"question_id": "tc_1"}
    assert benchmark.counts == {"no answer": 1, "no words": 1}
    with pytest.raises(ValueError, match=r"rc.nocontext/train-00000-of-00001.parquet"):
        TriviaQA(folder=str(tmp_path), split="train")
    with pytest.raises(ValueError, match="split is 'test'; expected one of validation, train"):
        TriviaQA(folder=str(tmp_path), split="test")


def test_web_questions_has_several_answers(tmp_path):
    rows = [{"url": "http://x/a", "question": "what does he play?", "answers": ["Guitar", "Piano"]},
            {"url": "http://x/b", "question": "where?", "answers": []}]  # fmt: skip
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    benchmark = WebQuestions(folder=str(tmp_path), split="test")
    (item,) = benchmark
    assert (item.response, item.aliases, item.extra) == ("Guitar", ("Piano",), {"url": "http://x/a"})
    assert benchmark.counts == {"no answer": 1}
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [{"question": "?", "answers": ["x"]}])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet has no url"):
        WebQuestions(folder=str(tmp_path), split="train")
