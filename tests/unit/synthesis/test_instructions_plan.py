# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.synthesis.instructions import MagpieSampler
from nemo_rba.synthesis.instructions_plan import Deck, LinearTemperature, Template, read_items, unquoted

from .conftest import FakeTeacher


class Scripted(FakeTeacher):
    """Replies to each message by a rule, ``reply(message, place)``, and remembers what it was asked, and how."""

    def __init__(self, reply):
        super().__init__()
        self.reply, self.heard, self.params = reply, [], []

    def generate(self, prompts, params):
        self.calls += 1
        messages = [prompt.rpartition("<")[0] for prompt in prompts]
        self.heard.append(messages)
        self.params.append(params)
        return [self.reply(message, place) for place, message in enumerate(messages)]


SHARED = {"batch_size": 6, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 30, "seed": 2}


def test_a_linear_temperature_goes_from_start_to_end_and_stays_there():
    rising = LinearTemperature(start=0.5, end=1.5, num_batches=5)
    assert [rising(index) for index in range(7)] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.5, 1.5]


def test_a_sampler_is_as_hot_as_its_schedule_says():
    teacher = Scripted(lambda message, place: "hello")
    falling = LinearTemperature(start=1.2, end=0.8, num_batches=3)
    sampler = MagpieSampler(**SHARED | {"teacher": teacher, "temperature": falling})
    for index in (2, 0, 1):
        sampler.batch(index)
    assert [params.temperature for params in teacher.params] == pytest.approx([0.8, 1.2, 1.0])


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"end": -1.0}, {"num_batches": 1}])
def test_an_impossible_schedule_is_refused(wrong):
    with pytest.raises(ValueError, match="expected temperatures above 0 and at least 2 batches"):
        LinearTemperature(**{"start": 1.0, "end": 2.0, "num_batches": 3} | wrong)


def test_a_deck_deals_every_item_once_a_round_in_orders_of_its_own():
    deck = Deck("abcdefgh", seed=1, name="letters")
    first, second = ("".join(deck[i] for i in range(start, start + 8)) for start in (0, 8))
    assert sorted(first) == sorted(second) == list("abcdefgh")
    assert first != second
    assert [deck[i] for i in (9, 3, 9)] == [second[1], first[3], second[1]], "in any order of asking"
    assert "".join(Deck("abcdefgh", seed=1, name="others")[i] for i in range(8)) != first


def test_a_template_fills_names_and_leaves_other_braces():
    template = Template('{number} of {"a": 1} on {topic}', key="template", needs=("number", "topic"))
    assert template(number="2", topic="{number} sets") == '2 of {"a": 1} on {number} sets'


@pytest.mark.parametrize("text", ["", "  ", "no name", "{topic} {toppic}"])
def test_a_template_that_cannot_work_is_refused(text):
    with pytest.raises(ValueError, match=r"sampler.template is '.*'; expected a text with \{topic\}, which may also"):
        Template(text, key="template", needs=("topic",), allows=("number",))


def test_items_come_from_a_list_or_a_file(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("food\n\n the sea \nfood\n", encoding="utf-8")
    assert read_items(str(path), key="topics") == read_items(["food", "the sea", " "], key="topics")
    assert read_items(str(path), key="topics") == ["food", "the sea"]
    path.write_text("\n")
    for source, message in ((str(path), "is empty"), ([], "is empty"), ("nowhere", "is no file"), ([3], "holds 3")):
        with pytest.raises(ValueError, match=f"sampler.topics.*{message}"):
            read_items(source, key="topics")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' "Say hello." ', "Say hello."),
        ("“Say hello.”", "Say hello."),
        ('"Yes" and "no"', '"Yes" and "no"'),
        ('"', '"'),
        ("", ""),
    ],
)
def test_quotation_marks_around_the_whole_are_taken_off(text, expected):
    assert unquoted(text) == expected
