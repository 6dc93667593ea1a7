# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest

from nemo_rba.synthesis.filters import CallableFilter, DuplicateFilter, ResponseFilter
from nemo_rba.synthesis.instructions import Draft, MagpieSampler, answer
from nemo_rba.synthesis.spoken_form import Spoken
from nemo_rba.synthesis.text import TextStage
from nemo_rba.types import Instruction, SamplingParams

from .conftest import FakeTeacher, text_stage

PARAMS = SamplingParams(max_new_tokens=8)


def sampler(teacher, **changes):
    settings = {"batch_size": 6, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 30, "seed": 2}
    return MagpieSampler(**({"teacher": teacher} | settings | changes))


def stage(folder, teacher=None, **changes) -> TextStage:
    teacher = teacher or FakeTeacher()
    settings = {
        "teacher": teacher,
        "sampler": sampler(teacher, batch_size=20),
        "instruction_filters": [DuplicateFilter()],
        "spoken_form": None,
        "speech_filters": [],
        "response_filters": [ResponseFilter(max_words=10)],
        "response_params": PARAMS,
        "context": "",
        "split_of": lambda text: "test" if "cat" in text else "train",
        "task_of": lambda text: "cats" if "cat" in text else "others",
        "kind_of": lambda text: "closed" if text.startswith("what") else "open",
    }
    return text_stage(folder, **(settings | changes))


def test_batches_are_seeded_and_independent(teacher):
    first = sampler(teacher)
    assert first.batch(3) == sampler(teacher).batch(3)
    assert first.batch(3) != first.batch(4)
    assert sampler(teacher, seed=9).batch(3) != first.batch(3)
    assert len(first.batch(0)) == 6


def test_the_pre_query_prompt_is_the_open_user_turn():
    class Listener(FakeTeacher):
        def generate(self, prompts, params):
            self.heard = prompts, params
            return [""] * len(prompts)

    listener = Listener()
    sampler(listener, temperature=0.7, top_p=0.9).batch(0)
    prompts, params = listener.heard
    assert prompts == ["<user>"] * 6
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.7, 0.9, 30)


def test_impossible_sampling_is_refused(teacher):
    with pytest.raises(ValueError, match=r"sampler.temperature is 0"):
        sampler(teacher, temperature=0)
    with pytest.raises(ValueError, match=r"sampler.batch_size is 0"):
        sampler(teacher, batch_size=0)


def test_answers_follow_context_and_text():
    said = Instruction(id="1", text="one two", response="", task="", context="Say:")
    assert answer(FakeTeacher(), [said], PARAMS) == ["two one Say: 0"]
    assert answer(FakeTeacher(), [replace(said, typed="1 2")], PARAMS) == ["2 1 Say: 0"], "as one types it"
    assert answer(FakeTeacher(), [], PARAMS) == []


class Talker:
    """A spoken form: red is blue, and dogs cannot be spoken of."""

    calls = 0

    def __call__(self, texts):
        self.calls += 1
        return [Spoken(t.replace("red", "blue"), "has dogs" if "dog" in t else None) for t in texts]


def test_what_is_typed_is_spoken_in_words_and_kept(tmp_path):
    quotas, talker = {("train", ""): 40}, Talker()
    no_hello = CallableFilter(name="no hello", keep=lambda text: "hello" not in text)
    settings = {"spoken_form": talker, "speech_filters": [no_hello, DuplicateFilter()]}
    first = stage(tmp_path, **settings).run(quotas, max_batches=60)
    items = first.splits["train"]
    assert len(items) == 40
    assert not any(word in item.text for item in items for word in ("red", "dog", "hello"))
    changed = [item for item in items if item.typed]
    assert changed
    assert all(item.text == item.typed.replace("red", "blue") != item.typed for item in changed)
    typed_words = " ".join(reversed(changed[0].typed.split()))
    assert changed[0].response.startswith(typed_words), "the teacher reads what was typed"
    reasons = {reason for _, reason in first.dropped}
    assert {"spoken form: has dogs", "no hello: refused"} <= reasons
    assert len(items) + len(first.dropped) == first.num_sampled, "nothing is lost on the way"
    calls = talker.calls
    again = stage(tmp_path, **settings | {"speech_filters": [no_hello, DuplicateFilter()]}).run(quotas, max_batches=60)
    assert again == first
    assert talker.calls == calls, "what was put into words is kept"


def test_a_batch_without_spoken_forms_does_not_fit(tmp_path):
    stage(tmp_path).run({("train", ""): 20}, max_batches=9)
    with pytest.raises(ValueError, match=r"batch-00000.jsonl does not fit this configuration"):
        stage(tmp_path, spoken_form=Talker()).run({("train", ""): 20}, max_batches=9)


def test_quotas_are_met_exactly(tmp_path):
    quotas = {("train", "open"): 30, ("train", "closed"): 3, ("test", ""): 5}
    result = stage(tmp_path).run(quotas, max_batches=100)
    assert result.missing == {}
    assert {name: len(items) for name, items in result.splits.items()} == {"train": 33, "test": 5}
    assert sum(item.text.startswith("what") for item in result.splits["train"]) == 3
    assert all("cat" in item.text and item.task == "cats" for item in result.splits["test"])
    first = result.splits["train"][0]
    assert first.response.startswith(" ".join(reversed(first.text.split())))
    assert 38 + len(result.dropped) == result.num_sampled == 20 * result.num_batches
    reasons = {reason for _, reason in result.dropped}
    assert "duplicate: seen before" in reasons
    assert "quota: train/open is full" in reasons


def test_what_is_not_asked_for_is_counted(tmp_path):
    result = stage(tmp_path).run({("train", "open"): 10}, max_batches=2)
    assert "quota: no split 'test' with kind 'open' is asked for" in {reason for _, reason in result.dropped}


def test_missing_quotas_are_told(tmp_path):
    result = stage(tmp_path).run({("train", ""): 1000}, max_batches=2)
    assert result.num_batches == 2
    assert result.missing == {("train", ""): 1000 - len(result.splits["train"])}


def test_a_second_run_asks_the_teacher_nothing(tmp_path):
    quotas = {("train", ""): 50, ("test", ""): 4}
    first = stage(tmp_path).run(quotas, max_batches=50)
    again = FakeTeacher()
    second = stage(tmp_path, again).run(quotas, max_batches=50)
    assert again.calls == 0
    assert second == first


def test_several_answers_become_several_items(tmp_path):
    class Various(FakeTeacher):
        def generate(self, prompts, params):
            said = super().generate(prompts, params)
            return said if prompts[0].endswith("<user>") else [f"{s} {n % 3}" for n, s in enumerate(said)]

    quotas = {("train", ""): 20, ("test", ""): 3}
    changes = {"num_responses": {"train": 4}, "response_filters": []}
    first = stage(tmp_path, Various(), **changes).run(quotas, max_batches=60)
    assert {name: len(items) for name, items in first.splits.items()} == {"train": 20, "test": 3}
    answers = {}
    for item in first.splits["train"]:
        answers.setdefault(item.text, []).append(item.response)
    assert [len(said) for said in answers.values()] == [3] * 6 + [2], "of four answers one came twice"
    assert all(len(set(said)) == len(said) for said in answers.values())
    assert len({item.text for item in first.splits["test"]}) == 3
    reasons = [reason for _, reason in first.dropped]
    assert reasons.count("response: the same as another answer to this instruction") == len(answers)
    assert "quota: train is full" in reasons, "also for the last of several answers"
    ids = [item.id for items in first.splits.values() for item in items] + [item.id for item, _ in first.dropped]
    assert len(set(ids)) == len(ids)
    again = Various()
    assert stage(tmp_path, again, **changes).run(quotas, max_batches=60) == first
    assert again.calls == 0


def test_batches_at_once_lose_and_repeat_nothing(tmp_path):
    quotas = {("train", "open"): 30, ("test", ""): 5}
    result = stage(tmp_path, batches_at_once=3).run(quotas, max_batches=100)
    assert {name: len(items) for name, items in result.splits.items()} == {"train": 30, "test": 5}
    assert 35 + len(result.dropped) == result.num_sampled == 20 * result.num_batches
    assert result.num_batches % 3 == 0
    again = FakeTeacher()
    assert stage(tmp_path, again, batches_at_once=3).run(quotas, max_batches=100) == result
    assert again.calls == 0
    assert not list((tmp_path / "parts").iterdir()), "parts of a complete batch are gone"


def test_what_was_sampled_or_answered_before_an_interruption_is_kept(tmp_path):
    quotas = {("train", ""): 40}
    undisturbed = FakeTeacher()
    whole = stage(tmp_path / "whole", undisturbed, batches_at_once=2).run(quotas, max_batches=60)

    class Failing(FakeTeacher):
        def generate(self, prompts, params):
            if self.calls == 3:  # two batches sampled, one answered
                raise KeyboardInterrupt
            return super().generate(prompts, params)

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "parts", Failing(), batches_at_once=2).run(quotas, max_batches=60)
    kept = sorted(path.name for path in (tmp_path / "parts" / "parts").iterdir())
    assert kept == ["batch-00000.answer.jsonl", "batch-00000.sample.jsonl", "batch-00001.sample.jsonl"]
    teacher = FakeTeacher()
    assert stage(tmp_path / "parts", teacher, batches_at_once=2).run(quotas, max_batches=60) == whole
    assert teacher.calls == undisturbed.calls - 3


def test_refused_answers_make_room(tmp_path):
    refuse = CallableFilter(name="no dogs", keep=lambda text: "dog" not in text)
    result = stage(tmp_path, response_filters=[refuse]).run({("train", ""): 60}, max_batches=50)
    assert len(result.splits["train"]) == 60
    assert any(reason == "no dogs: refused" and item.response for item, reason in result.dropped)


def test_damaged_batch_files_are_named(tmp_path):
    stage(tmp_path).run({("train", ""): 20}, max_batches=9)
    path = tmp_path / "batch-00000.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:-1]) + "\n" + rows[-1][:10])
    with pytest.raises(ValueError, match=r"batch-00000.jsonl line 20 is damaged; delete the file"):
        stage(tmp_path).run({("train", ""): 20}, max_batches=9)
    path.write_text("".join(json.dumps({"text": json.loads(row)["text"], "response": None}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="does not fit this configuration"):
        stage(tmp_path).run({("train", ""): 20}, max_batches=9)


class Drafts:
    """Drafts as given, one batch of them, and the texts that were learned."""

    def __init__(self, *drafts):
        self.drafts, self.learned = drafts, []

    def batch(self, index):
        return self.drafts

    def learn(self, index, kept):
        self.learned.append((index, dict(kept)))


def test_drafts_keep_what_they_came_with(tmp_path):
    target = {"target_language": "de"}
    drafts = Drafts(
        "one two",
        Draft(text=" hello ", response="hallo", task="translation", context="In German:", extra=target),
        Draft(text="what is red", task="qa", aliases=("a color",), context=""),
        Draft(text="{", reason="not JSON"),
        Draft(text="say cat", response="cat", task="qa"),
        Draft(text="hello", response="seen before"),
    )
    teacher = FakeTeacher()
    settings = {"sampler": drafts, "context": "Say:"}
    first = stage(tmp_path, teacher, **settings).run({("train", ""): 3}, max_batches=1)
    plain, translated, question = first.splits["train"]
    assert (plain.task, plain.context, plain.response.split()[:-1]) == ("others", "Say:", ["two", "one", "Say:"])
    assert (translated.text, translated.response, translated.context) == ("hello", "hallo", "In German:")
    assert (translated.task, translated.extra) == ("translation", target)
    assert (question.task, question.aliases, question.context) == ("qa", ("a color",), "")
    assert question.response.startswith("red is what"), "without a response it is answered"
    assert teacher.calls == 1
    assert [reason for _, reason in first.dropped] == [
        "sampler: not JSON", "duplicate: seen before", "quota: no split 'test' with kind 'open' is asked for",
    ]  # fmt: skip
    assert drafts.learned == [(0, {"train": ["one two", "hello", "what is red"]})]
    again = FakeTeacher()
    settings["sampler"] = Drafts()  # which has nothing more to say
    assert stage(tmp_path, again, **settings).run({("train", ""): 3}, max_batches=1) == first
    assert again.calls == 0
    assert settings["sampler"].learned == drafts.learned, "what is read again is learned too"


def test_plain_texts_are_kept_as_ever(tmp_path):
    stage(tmp_path, sampler=Drafts("one two", "one two")).run({("train", ""): 1}, max_batches=1)
    rows = (tmp_path / "batch-00000.jsonl").read_text().splitlines()
    assert [list(json.loads(row)) for row in rows] == [["text", "response"]] * 2


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b"])
def test_a_text_with_a_line_separator_is_read_again(tmp_path, mark):
    drafts = Drafts(f"one{mark}two")
    first = stage(tmp_path, sampler=drafts).run({("train", ""): 1}, max_batches=1)
    assert stage(tmp_path, sampler=drafts).run({("train", ""): 1}, max_batches=1) == first
    assert mark in first.splits["train"][0].text


def test_a_batch_without_texts_is_read_again(tmp_path):
    first = stage(tmp_path, sampler=Drafts()).run({("train", ""): 1}, max_batches=2)
    assert stage(tmp_path, sampler=Drafts("new")).run({("train", ""): 1}, max_batches=2) == first
    assert (first.num_batches, first.num_sampled, first.missing) == (2, 0, {("train", ""): 1})


def test_full_quotas_are_no_reason_to_give_up(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_rba.synthesis.text.BARREN_SAMPLES", 6)
    drafts = Drafts("one two")
    settings = {"sampler": drafts, "instruction_filters": []}
    result = stage(tmp_path, **settings).run({("train", ""): 1, ("test", ""): 1}, max_batches=9)
    assert (result.num_batches, result.num_barren) == (9, 0)
    refuse = CallableFilter(name="no", keep=lambda text: False)
    settings["instruction_filters"] = [refuse]
    result = stage(tmp_path / "none", **settings).run({("train", ""): 1}, max_batches=9)
    assert (result.num_batches, result.num_barren) == (6, 6)
