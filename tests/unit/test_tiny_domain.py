# SPDX-License-Identifier: Apache-2.0
"""The tiny domain: hand-written right and wrong answers for every family, and the tokenizer."""

from random import Random

import pytest
from tiny import domain
from tiny.tokenizer import UNKNOWN, build_tokenizer, chat_text

CLOSED = [  # request, family, right answer, wrong answer
    ("what is six plus nine", "arithmetic", "fifteen", "fourteen"),
    ("tell me twelve minus five politely", "arithmetic", "of course, seven.", "seven"),
    ("add zero and four twice", "arithmetic", "four four", "four"),
    ("which is bigger nineteen or nine", "compare", "nineteen", "nine"),
    ("which is smaller two or twenty", "compare", "two", "twenty"),
    ("count from two until five", "count", "two three four five", "two three four"),
    ("count from four until one", "count", "four three two one", "one two three four"),
    ("name the capital of norway in a full sentence", "capital", "the answer is oslo.", "oslo"),
    ("what is the opposite of gloomy", "opposite", "happy", "sad"),
    ("what comes after sunday", "calendar", "monday", "saturday"),
    ("what comes before january and then say goodbye", "calendar", "december. goodbye.", "december goodbye"),
    ("what comes after twenty", "calendar", "twenty-one", "twenty"),
    ("translate good night into spanish", "translate", "buenas noches", "bonne nuit"),
    ("how do you say goodbye in french beginning with certainly", "translate", "certainly, au revoir.", "au revoir"),
    ("spell the word mango", "spell", "m a n g o", "mango"),
    ("spell camel backwards", "spell", "l e m a c", "c a m e l"),
    ("tell me the second word in tiger lemon hammer", "order", "lemon", "tiger"),
    ("reverse tiger lemon hammer", "reverse", "hammer lemon tiger", "tiger lemon hammer"),
    ("which word is a fruit tiger lemon hammer", "choose", "lemon", "tiger"),
    ("repeat music three times", "repeat", "music music music", "music music"),
]
ABOUT = "say something about the ocean in six words at most starting with every"
STORY = "tell me a short story about tiger and camel near the river that ends with the word dream"
GREET = "greet my teacher warmly in the morning and ask about the garden"
INVITE = "invite me somewhere on monday with a question and mention the castle"
OPEN = [  # request, family, right answers, wrong answers
    (
        "name three animals without camel or tiger starting with monkey",
        "list",
        ["monkey, rabbit and pigeon", "Monkey, lizard and dolphin."],
        ["monkey, camel and pigeon", "rabbit, monkey and pigeon", "monkey and rabbit", "monkey, rabbit and apple",
         "monkey, rabbit and rabbit", ""],
    ),
    (
        ABOUT,
        "about",
        ["every ocean is deep.", "every deep ocean shines.", "every ocean shines near the village."],
        ["my ocean is deep.", "every ocean is green.", "every deep ocean shines near the village.", "every ocean"],
    ),
    (
        "tell me something about the camel in exactly six words without the word near",
        "about",
        ["the camel is big and old."],
        ["the camel sleeps near the river.", "the camel is old."],
    ),
    (
        "describe the garden in one sentence that starts with my and mentions the mountain",
        "describe",
        ["my quiet garden waits near the mountain.", "my garden is warm and grows near the mountain."],
        ["my garden is warm.", "this garden grows near the mountain.", "my garden grows near the river."],
    ),
    (
        "make a sentence with monkey and river in seven words at most",
        "sentence",
        ["the monkey jumps near the river.", "another long river moves near the monkey."],
        ["the monkey is happy and sings near the river.", "the monkey jumps near the monkey."],
    ),
    (
        STORY,
        "story",
        ["one day the old camel met the tiger. they slept near the river. it was a good dream."],
        ["one day the old camel met the tiger. they slept together. it was a good dream.",
         "one day the camel met the tiger. they slept near the river. it was a good party.",
         "one day the soft camel met the tiger. they slept near the river. it was a good dream."],
    ),
    (
        GREET,
        "greet",
        ["good morning, my dear teacher. how is the garden?",
         "good morning, my dear teacher. i am happy to see you. please tell me about the garden."],
        ["good evening, my dear teacher. how is the garden?", "good morning, teacher. how is the garden?",
         "good morning, my dear teacher."],
    ),
    ("greet me politely", "greet", ["hello, sir.", "welcome, friend. it is lovely to see you."], ["hello, teacher."]),
    (
        INVITE,
        "invite",
        ["friend, shall we visit the castle on monday?"],
        ["friend, please visit the castle on monday.", "friend, shall we visit the castle on sunday?",
         "shall we visit the castle on monday?"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("request_text", "family", "right", "wrong"), CLOSED)
def test_one_right_answer(request_text, family, right, wrong):
    assert (domain.task_of(request_text), domain.kind_of(request_text)) == (family, "closed")
    assert domain.verify(request_text, right) == 1.0
    assert domain.verify(request_text, wrong) == 0.0
    assert domain.reference_answer(Random(0), request_text) == right


@pytest.mark.parametrize(("request_text", "family", "right", "wrong"), OPEN)
def test_many_right_answers(request_text, family, right, wrong):
    assert (domain.task_of(request_text), domain.kind_of(request_text)) == (family, "open")
    assert [domain.verify(request_text, answer) for answer in right] == [1.0] * len(right)
    assert [domain.verify(request_text, answer) for answer in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "transcribe what comes after sunday", "what is six plus", "reverse tiger tiger lemon",
     "name two fruits without monkey", "describe the river in one sentence that starts with my and mentions the river",
     "which word is an animal tiger camel lemon", "count from one until twelve"],
)  # fmt: skip
def test_what_is_no_request(text):
    assert domain.parse(text) is None
    assert domain.verify(text, text) == 0.0
    assert domain.reference_answer(Random(0), text) is None


def test_every_family_is_tested_and_drawn():
    tested = {family for _, family, *_ in CLOSED + OPEN}
    assert {domain.sample_item(Random(seed)).task for seed in range(400)} == tested


def test_drawn_items_are_valid_and_balanced():
    rng = Random(1)
    items = [domain.sample_item(rng) for _ in range(2000)]
    assert all(domain.verify(item.instruction, item.reference) == 1.0 for item in items)
    assert 0.45 < sum(item.kind == "open" for item in items) / len(items) < 0.55
    assert max(len(domain.split_words(item.reference)) for item in items) <= 26


def test_splits_are_disjoint_and_sized_as_promised():
    rng = Random(2)
    texts = {domain.sample_item(rng).instruction for _ in range(6000)}
    shares = {name: sum(domain.split_of(t) == name for t in texts) / len(texts) for name in ("train", "dev", "test")}
    assert shares == {
        "train": pytest.approx(0.78, abs=0.03),
        "dev": pytest.approx(0.08, abs=0.02),
        "test": pytest.approx(0.14, abs=0.02),
    }
    assert domain.split_of(domain.sample_split(rng, "dev").instruction) == "dev"


def test_tokenizer_round_trip():
    tokenizer, rng = build_tokenizer(), Random(3)
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    for _ in range(500):
        item = domain.sample_item(rng)
        for text in (item.instruction, item.reference):
            ids = tokenizer.backend_tokenizer.encode(text).ids
            assert unknown not in ids
            assert tokenizer.decode(ids) == text


def test_chat_text_is_the_chat_template():
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "spell camel"}, {"role": "assistant", "content": "of course, c a m e l."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == chat_text("spell camel", "of course, c a m e l.")
    assert opened == chat_text("spell camel")
    ids = tokenizer.backend_tokenizer.encode(whole).ids
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["<|im_start|>", "user", "spell", "camel"]
