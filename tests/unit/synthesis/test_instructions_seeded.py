# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

from nemo_rba.synthesis.filters import DuplicateFilter, LengthFilter
from nemo_rba.synthesis.instructions_seeded import SeededInstructions, SelfInstruct, read_pool
from nemo_rba.types import SamplingParams

from .conftest import text_stage
from .test_instructions_plan import SHARED, Scripted
from .test_openai_teacher import Server, connect

PERSONAS = ["a nurse", "a farmer", "a pilot", "a cook"]
TOPICS = ["rain", "bread", "music"]
POOL = [f"what is {word}" for word in ("love", "a cat", "the moon", "bread", "time", "rain")]


def seeded(reply=lambda message, place: "hello", **changes):
    teacher = Scripted(reply)
    settings = {"template": "{persona} speaks of {topic}", "personas": PERSONAS, "topics": TOPICS, "teacher": teacher}
    return SeededInstructions(**SHARED | settings | changes), teacher


def stage(folder, sampler, teacher, **changes):
    settings = {
        "teacher": teacher, "sampler": sampler, "instruction_filters": [DuplicateFilter()], "spoken_form": None,
        "speech_filters": [], "response_filters": [], "response_params": SamplingParams(max_new_tokens=8),
        "context": "", "split_of": lambda text: "test" if "cat" in text else "train", "task_of": lambda text: "any",
        "kind_of": lambda text: "",
    }  # fmt: skip
    return text_stage(folder, **settings | changes)


def test_every_person_and_topic_has_its_turn():
    sampler, teacher = seeded()
    for index in (0, 1):
        sampler.batch(index)
    prompts = [prompt for heard in teacher.heard for prompt in heard]
    assert len(prompts) == 12
    for persona in PERSONAS:
        assert sum(prompt.startswith(persona) for prompt in prompts) == 3
    for topic in TOPICS:
        assert sum(prompt.endswith(topic) for prompt in prompts) == 4
    assert all(len(set(prompts[i : i + 4])) == 4 for i in (0, 4, 8))


def test_a_batch_is_the_same_whatever_came_before():
    sampler, teacher = seeded()
    sampler.batch(5)
    other, later = seeded()
    for index in (0, 3, 5):
        other.batch(index)
    assert later.heard[-1] == teacher.heard[-1]
    assert later.params[-1] == teacher.params[-1]
    assert (teacher.params[-1].temperature, teacher.params[-1].top_p, teacher.params[-1].max_new_tokens) == (1, 0.9, 30)
    assert len({params.seed for params in later.params}) == 3
    changed, heard = seeded(seed=3)
    changed.batch(5)
    assert heard.heard != teacher.heard


def test_replies_lose_their_quotation_marks():
    sampler, _ = seeded(lambda message, place: ['"Is it late?"', "", "plain"][place % 3])
    assert sampler.batch(0) == ["Is it late?", "", "plain"] * 2


def test_one_list_is_enough(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("the sea\n")
    sampler, teacher = seeded(template="On {topic}", personas=[], topics=str(path))
    sampler.batch(0)
    assert teacher.heard == [["On the sea"] * 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": ""}, "sampler.template is ''"),
        ({"template": "Say something."}, "expected {persona} or {topic} in it"),
        ({"template": "{topic}"}, "sampler.personas is given, but sampler.template has no {persona}"),
        ({"topics": []}, "sampler.topics is empty"),
        ({"batch_size": 0}, "sampler.batch_size is 0"),
        ({"temperature": 0}, "sampler.temperature is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        seeded(**changes)


def test_a_real_teacher_writes_for_persons_and_topics(teacher, tmp_path):
    sampler, _ = seeded(teacher=teacher, template="tell {persona} what is {topic}", personas=["cat", "dog"],
                        topics=["one", "two", "red"])  # fmt: skip
    assert sampler.batch(1) == sampler.batch(1) != sampler.batch(2)
    filters = {"instruction_filters": [LengthFilter(min_words=1, max_words=30, max_characters=200), DuplicateFilter()]}
    result = stage(tmp_path, sampler, teacher, **filters).run({("train", ""): 5}, max_batches=40)
    assert len(result.splits["train"]) == 5
    assert result.missing == {}


def test_a_hosted_teacher_serves_as_well():
    server = Server()
    try:
        sampler, _ = seeded(teacher=connect(server), batch_size=3, topics=["rain"])
        texts = sampler.batch(0)
        assert all(text.endswith(" SPEAKS OF RAIN") for text in texts), "the server answers in capitals"
        assert len(set(texts)) == 3
        assert {body["path"] for body in server.seen} == {"/v1/chat/completions"}
    finally:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "pool.jsonl"
    rows = [{"text": text} for text in POOL[:3]] + [{"instruction": text} for text in POOL[3:]] + [{"text": POOL[0]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def self_instruct(pool, reply=lambda message, place: f"new one {place}", **changes):
    teacher = Scripted(reply)
    settings = {"teacher": teacher, "template": "Like these:\n{examples}", "pool": str(pool), "num_examples": 4,
                "num_made": 2, "learn_from": ["train"]}  # fmt: skip
    return SelfInstruct(**SHARED | settings | changes), teacher


def examples_in(prompt: str) -> list[str]:
    return [line.partition(". ")[2] for line in prompt.splitlines()[1:]]


def test_each_prompt_shows_other_examples_of_the_pool(pool):
    sampler, teacher = self_instruct(pool)
    sampler.batch(0)
    shown = [examples_in(prompt) for prompt in teacher.heard[0]]
    assert all(len(set(texts)) == 4 and set(texts) <= set(POOL) for texts in shown)
    assert len({tuple(texts) for texts in shown}) > 3
    assert teacher.heard[0][0].startswith("Like these:\n1. what is ")


def test_what_was_made_becomes_an_example_from_the_next_batch_on(pool):
    sampler, teacher = self_instruct(pool)
    sampler.learn(0, {"train": ["say a", "say b", "say c"], "test": ["secret"]})
    sampler.learn(1, {"train": ["say d"]})
    sampler.batch(1)
    made = [[text for text in examples_in(prompt) if text not in POOL] for prompt in teacher.heard[-1]]
    assert all(len(texts) == 2 and set(texts) <= {"say a", "say b", "say c"} for texts in made)
    sampler.learn(0, {"train": ["say a", "say b", "say c"]})
    sampler.batch(1)
    assert teacher.heard[-1] == teacher.heard[-2], "being told again changes nothing"
    sampler.batch(0)
    assert all(set(examples_in(prompt)) <= set(POOL) for prompt in teacher.heard[-1])


def test_numbers_and_copies_of_the_pool_are_taken_out(pool):
    replies = ["5. Say hello", "Task 9: sing", "What is LOVE?", '"10:30 is late"', "", "new"]
    drafts = self_instruct(pool, lambda message, place: replies[place])[0].batch(0)
    assert [draft.text for draft in drafts] == ["Say hello", "sing", "What is LOVE?", "10:30 is late", "", "new"]
    reasons = [draft.reason for draft in drafts]
    assert reasons == ["", "", "repeats an instruction of the pool", "", "", ""]


def test_a_resumed_self_instruct_shows_the_same_examples(pool, tmp_path):
    def write(message, place):
        if not message.startswith("Like these"):
            return "an answer"
        return f"new {'cat' if place == 2 else 'one'} {sum(map(ord, message)) % 1000} {place}"

    def run(folder, max_batches):
        sampler, teacher = self_instruct(pool, write)
        quotas = {("train", ""): 40, ("test", ""): 4}
        result = stage(folder, sampler, teacher).run(quotas, max_batches=max_batches)
        return result, [heard for heard in teacher.heard if heard[0].startswith("Like these")]

    whole, prompts = run(tmp_path / "whole", 99)
    assert whole.missing == {}
    later = [text for heard in prompts[1:] for prompt in heard for text in examples_in(prompt)]
    assert any(text.startswith("new one") for text in later)
    assert not any("new cat" in text for text in later), "no test instruction is an example"
    run(tmp_path / "parts", 3)
    resumed, remaining = run(tmp_path / "parts", 99)
    assert resumed == whole
    assert remaining == prompts[3:]


def test_a_pool_may_be_what_an_earlier_synthesis_answered(tmp_path):
    rows = [{"text": "say a", "response": "a"}, {"text": "", "response": None}, {"text": "say b", "response": None}]
    (tmp_path / "batch-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pool(str(tmp_path)) == ["say a"]


@pytest.mark.parametrize("line", ["no json", '["a"]', '{"text": 3}', '{"words": "a"}', '{"text": " "}'])
def test_a_damaged_pool_is_named(tmp_path, line):
    path = tmp_path / "pool.jsonl"
    path.write_text(f'{{"text": "say a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"pool.jsonl line 3 is not an object with the text of an instruction"):
        read_pool(str(path))


def test_a_pool_that_is_missing_or_small_is_refused(pool, tmp_path):
    with pytest.raises(ValueError, match="nothing there; expected a JSONL file"):
        self_instruct(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"holds 6 different instructions, fewer than sampler.num_examples = 7"):
        self_instruct(pool, num_examples=7)
    with pytest.raises(ValueError, match="num_examples=2, num_made=2; expected at least one example"):
        self_instruct(pool, num_examples=2)
    with pytest.raises(ValueError, match=r"sampler.template is 'Write.'; expected a text with \{examples\}"):
        self_instruct(pool, template="Write.")
