# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections import Counter

import pytest

from nemo_rba.synthesis.filters import DuplicateFilter, ResponseFilter
from nemo_rba.synthesis.filters_content import LanguageFilter
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.instructions_tasks import (
    AnswerFilter,
    SpeechTranslation,
    SpokenQA,
    TargetLanguageFilter,
    read_qa,
)
from nemo_rba.types import Instruction

from .test_instructions_plan import SHARED, Scripted
from .test_instructions_seeded import stage

QUESTIONS = (
    '{"question": "Who wrote Faust?", "answer": "Johann Wolfgang von Goethe", "aliases": ["Goethe", "goethe!"]}\n'
    '{"question": "What is the capital of Peru?", "answer": "Lima", "aliases": []}'
)


def spoken_qa(reply=lambda message, place: QUESTIONS, **changes):
    teacher = Scripted(reply)
    settings = {"teacher": teacher, "template": "{number} on {topic}", "topics": ["rain", "art"], "num_questions": 2,
                "answers": "short", "batch_size": 2}  # fmt: skip
    return SpokenQA(**SHARED | settings | changes), teacher


def test_questions_come_with_answers_and_aliases():
    sampler, teacher = spoken_qa()
    drafts = sampler.batch(0)
    assert drafts[:2] == [
        Draft(text="Who wrote Faust?", response="Johann Wolfgang von Goethe", task="qa", aliases=("Goethe",)),
        Draft(text="What is the capital of Peru?", response="Lima", task="qa"),
    ]
    assert len(drafts) == 4
    assert sorted(teacher.heard[0]) == ["2 on art", "2 on rain"]


def test_an_answer_in_full_is_left_to_the_teacher():
    drafts = spoken_qa(answers="sentence")[0].batch(0)
    assert drafts[0] == Draft(text="Who wrote Faust?", task="qa", aliases=("Johann Wolfgang von Goethe", "Goethe"))
    assert drafts[1] == Draft(text="What is the capital of Peru?", task="qa", aliases=("Lima",))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Sure, here are two questions:", "not a line of JSON"),
        ('{"question": "a", "answer": "b", "aliases": [', "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ('["a", "b", []]', "not an object of aliases, answer, question"),
        ('{"question": "a", "answer": "b"}', "not an object of aliases, answer, question"),
        ('{"question": "a", "answer": "b", "aliases": [], "why": ""}', "not an object of aliases, answer, question"),
        ('{"question": "a", "answer": 4, "aliases": []}', "a field is not of its type"),
        ('{"question": "a", "answer": "b", "aliases": "c"}', "a field is not of its type"),
        ('{"question": "a", "answer": "b", "aliases": [null]}', "a field is not of its type"),
        ('{"question": " ?! ", "answer": "b", "aliases": []}', "a field has no words"),
        ('{"question": "a", "answer": "b", "aliases": [""]}', "a field has no words"),
    ],
)
def test_a_line_that_is_not_as_asked_for_has_its_reason(line, reason):
    assert read_qa(line)[0] == reason


def test_names_of_one_answer_are_kept_once_in_order():
    line = '{"question": " Q? ", "answer": "The Moon", "aliases": ["Luna", "the moon.", "LUNA", "moon"]}'
    assert read_qa(line) == ("", "Q?", ["The Moon", "Luna", "moon"])


def test_garbage_is_dropped_counted_and_remembered(tmp_path):
    def write(message, place):
        return [f"Sure!\n```json\n{QUESTIONS}\n```\n", "", "{"][place]

    def run():
        sampler, teacher = spoken_qa(write, batch_size=3)
        return stage(tmp_path, sampler, teacher).run({("train", ""): 2}, max_batches=2), teacher

    result, teacher = run()
    assert [(i.text, i.response, i.task, i.aliases) for i in result.splits["train"]] == [
        ("Who wrote Faust?", "Johann Wolfgang von Goethe", "qa", ("Goethe",)),
        ("What is the capital of Peru?", "Lima", "qa", ()),
    ]
    assert Counter(reason for _, reason in result.dropped) == {
        "sampler: not a line of JSON": 2, "sampler: empty or never ended": 1,
    }  # fmt: skip
    assert teacher.calls == 1, "who has an answer is not asked for another"
    again, silent = run()
    assert again == result
    assert silent.calls == 0
    rows = [json.loads(row) for row in (tmp_path / "batch-00000.jsonl").read_text().splitlines()]
    assert rows[2] == {
        "text": "What is the capital of Peru?", "response": "Lima", "draft": {"response": "Lima", "task": "qa"},
    }  # fmt: skip


def test_only_questions_without_an_answer_are_asked_and_must_agree(tmp_path):
    def write(message, place):
        if " on " in message:
            return QUESTIONS
        return "That was Goethe, in Weimar." if "Faust" in message else "It is Quito."

    sampler, teacher = spoken_qa(write, answers="sentence")
    filters = {"response_filters": [AnswerFilter()]}
    result = stage(tmp_path, sampler, teacher, **filters).run({("train", ""): 2}, max_batches=1)
    assert teacher.heard[1] == ["Who wrote Faust?", "What is the capital of Peru?"]
    assert [i.response for i in result.splits["train"]] == ["That was Goethe, in Weimar."]
    assert [(i.response, reason) for i, reason in result.dropped if "answer" in reason] == [
        ("It is Quito.", "answer: the short answer is not in it")
    ]


def test_answers_are_compared_by_whole_words():
    said = Instruction(id="1", text="a", response="It is the quantum.", task="qa", aliases=("Quant",))
    assert AnswerFilter().reason(said) == "the short answer is not in it"
    assert AnswerFilter().reason(Instruction(id="1", text="a", response="b", task="")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_questions": 0}, "num_questions=0"),
        ({"answers": "long"}, "expected at least 1, and one of short, sentence"),
        ({"template": "{topic}"}, "expected a text with {topic}, {number}"),
        ({"topics": "nowhere.txt"}, "sampler.topics is 'nowhere.txt', which is no file"),
    ],
)
def test_impossible_question_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        spoken_qa(**changes)


def translate(message, place):
    if message.startswith("Say"):
        return f'"The train number {place} is late again today."'
    target = message.partition(": ")[0]
    return {"German": "Der Zug hat heute schon wieder Verspätung.", "French": "Le train est encore en retard."}[target]


def translation(reply=translate, **changes):
    teacher = Scripted(reply)
    settings = {
        "teacher": teacher, "template": "Say it in {source} about {topic}", "translation_template": "{target}: {text}",
        "context": "Translate the speech into {target}.", "source": "English", "topics": ["rain", "art", "food"],
        "targets": {"de": "German", "fr": "French"}, "max_translation_tokens": 50,
    }  # fmt: skip
    return SpeechTranslation(**SHARED | settings | changes), teacher


def test_sentences_come_with_translations_into_several_languages():
    sampler, teacher = translation()
    drafts = sampler.batch(0)
    assert Counter(draft.extra["target_language"] for draft in drafts) == {"de": 3, "fr": 3}
    german = next(draft for draft in drafts if draft.extra["target_language"] == "de")
    assert german == Draft(
        text=german.text, response="Der Zug hat heute schon wieder Verspätung.", task="translation",
        context="Translate the speech into German.", extra={"target_language": "de"},
    )  # fmt: skip
    assert german.text.startswith("The train number")
    assert Counter(teacher.heard[0]) == {f"Say it in English about {topic}": 2 for topic in ("rain", "art", "food")}
    assert f"German: {german.text}" in teacher.heard[1]
    assert (teacher.params[1].temperature, teacher.params[1].max_new_tokens) == (0, 50)
    again, other = translation()
    assert again.batch(0) == drafts
    assert other.heard == teacher.heard


def test_what_is_no_translation_is_dropped_for_its_reason():
    def write(message, place):
        if message.startswith("Say"):
            return "" if place == 0 else f"Sentence {place}."
        return ["", message.partition(": ")[2].upper(), "Here it is:\n\nSatz drei.", "Satz vier.", "Satz fünf."][place]

    sampler, teacher = translation(write)
    assert [draft.reason for draft in sampler.batch(0)] == [
        "empty or never ended", "the translation is empty or never ended", "the translation repeats the sentence",
        "the translation has more lines than the sentence", "", "",
    ]  # fmt: skip
    assert len(teacher.heard[1]) == 5, "what never ended is not translated"
    silent, unasked = translation(lambda message, place: "")
    assert all(draft.reason == "empty or never ended" for draft in silent.batch(0))
    assert unasked.calls == 1


def test_translations_in_other_languages_and_scripts_are_dropped(tmp_path):
    sentences = [
        "The train is late again today, as it was yesterday.",
        "今天的火车又晚点了，和昨天一样，真是太糟糕了。",
    ]

    def write(message, place):
        if message.startswith("Say"):
            return sentences[place % 2] if place < 2 else f"{sentences[0]} It is number {place} of them."
        if place % 2:
            return "Сегодня поезд опять опаздывает, как и вчера."
        if message.startswith("German"):
            return "Der Zug hat heute wieder Verspätung, genau wie gestern."
        return "Le train est encore en retard aujourd'hui, comme hier."

    sampler, teacher = translation(write)
    judge = {"min_probability": 0.8, "min_bytes": 20, "candidates": ["en", "de", "fr", "ru", "zh"]}
    settings = {"instruction_filters": [LanguageFilter(languages=["en"], field="text", **judge)],
                "response_filters": [ResponseFilter(max_words=20), TargetLanguageFilter(**judge)]}  # fmt: skip
    result = stage(tmp_path, sampler, teacher, **settings).run({("train", ""): 3}, max_batches=1)
    reasons = Counter(reason for _, reason in result.dropped)
    assert reasons["language: is in another language (zh)"] == 1
    assert reasons["target language: is in another language (ru)"] >= 1
    assert len(result.splits["train"]) + len(result.dropped) == 6
    for item in result.splits["train"]:
        assert item.task == "translation"
        assert item.context == f"Translate the speech into {'German' if 'Zug' in item.response else 'French'}."
        assert item.extra == {"target_language": "de" if "Zug" in item.response else "fr"}
    assert teacher.calls == 2, "the answer stage asks nothing"


def test_what_has_no_target_language_is_not_judged():
    judge = TargetLanguageFilter(min_probability=0.8, min_bytes=0, candidates=["en", "de"])
    assert judge.reason(Instruction(id="1", text="a", response="Guten Tag, wie geht es Ihnen?", task="")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {}}, "expected other languages than the source's"),
        ({"targets": {"en": "English"}}, "expected other languages than the source's"),
        ({"max_translation_tokens": 0}, "max_translation_tokens=0"),
        ({"context": "Translate."}, "sampler.context is 'Translate.'; expected a text with {target}"),
        ({"translation_template": ""}, "sampler.translation_template is ''"),
        ({"template": "{topic}"}, "expected a text with {topic}, {source}"),
    ],
)
def test_impossible_translation_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        translation(**changes)


def test_a_teacher_that_repeats_itself_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_rba.synthesis.text.BARREN_SAMPLES", 30)
    sampler, teacher = translation(lambda message, place: "Again." if message.startswith("Say") else "Wieder.")
    settings = {"instruction_filters": [DuplicateFilter()]}
    result = stage(tmp_path, sampler, teacher, **settings).run({("train", ""): 3}, max_batches=1000)
    assert result.num_batches == 6, "one of use, then five of six each"
    assert result.num_barren == 30
    assert result.missing == {("train", ""): 2}
    assert Counter(reason for _, reason in result.dropped) == {"duplicate: seen before": 35}
