# SPDX-License-Identifier: Apache-2.0
"""How far texts came, and samplers that give nothing. The stage as a whole: test_instructions.py."""

from nemo_rba.synthesis.filters import CallableFilter, DuplicateFilter, ResponseFilter, in_order
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.spoken_form import Spoken
from nemo_rba.synthesis.text import STEPS
from nemo_rba.synthesis.unanswered import Unanswered
from nemo_rba.types import SamplingParams

from .conftest import text_stage


class Sampler:
    def __init__(self, *batches):
        self.batches = batches

    def batch(self, index):
        return self.batches[min(index, len(self.batches) - 1)]


class Words:
    """Reads 3 as three, and cannot read 4."""

    def __call__(self, texts):
        return [Spoken(text.replace("3", "three"), "no words for it" if "4" in text else None) for text in texts]


class Echo:
    def render(self, messages, *, open_turn):
        return messages[0]["content"]

    def generate(self, prompts, params):
        return ["" if "silent" in prompt else f"{prompt}!" for prompt in prompts]


def stage(folder, sampler, **changes):
    settings = {
        "teacher": Echo(), "sampler": sampler, "response_params": SamplingParams(max_new_tokens=8), "context": "",
        "instruction_filters": in_order(same=DuplicateFilter()),
        "speech_filters": [CallableFilter(name="spoken", keep=lambda text: "mute" not in text)],
        "response_filters": [ResponseFilter(max_words=9)],
        "split_of": lambda text: "test" if "test" in text else "train", "task_of": lambda text: "t",
        "kind_of": lambda text: "", "spoken_form": Words(),
    }  # fmt: skip
    return text_stage(folder, **(settings | changes))


def test_texts_are_counted_at_every_step_also_when_resumed(tmp_path):
    first = ["say 3", "say 3", "say 4", "mute", Draft(text="?", reason="garbage"), "a test", "silent", "one"]
    sampler = Sampler(first, ["two", "3 more", "five"])
    result = stage(tmp_path, sampler).run({("train", ""): 4}, max_batches=9)
    assert [i.text for i in result.splits["train"]] == ["say three", "one", "two", "three more"]
    # two fall to a repetition and an unreadable draft, one has no words, one is mute, a test has no split, five no room
    assert result.steps == dict(zip(STEPS, (11, 9, 8, 7, 5, 5, 4, 4), strict=True))
    assert result.steps["sampled"] - len(result.dropped) == result.steps["kept"]
    again = stage(tmp_path, None).run({("train", ""): 4}, max_batches=9)
    assert again.steps == result.steps


def test_a_prompt_that_the_teacher_refuses_is_dropped_by_its_reason_also_when_resumed(tmp_path):
    class Careful(Echo):
        def generate(self, prompts, params):
            return [Unanswered("refused by the server") if "bomb" in prompt else f"{prompt}!" for prompt in prompts]

    sampler = Sampler(["say one", "a bomb", "two"])
    for _ in range(2):
        result = stage(tmp_path, sampler, teacher=Careful()).run({("train", ""): 3}, max_batches=1)
        assert [i.response for i in result.splits["train"]] == ["say one!", "two!"]
        assert [(i.text, i.response, reason) for i, reason in result.dropped] == [
            ("a bomb", "", "teacher: refused by the server")
        ]


def test_several_answers_are_counted_as_answers(tmp_path):
    kinds = {"num_responses": {"train": 3}, "spoken_form": None}
    result = stage(tmp_path, Sampler(["one", "two"]), **kinds).run({("train", ""): 6}, max_batches=1)
    assert [result.steps[step] for step in STEPS] == [2, 2, 2, 2, 2, 6, 2, 2]  # three times the same answer


def test_a_sampler_that_gives_nothing_is_told_from_filters_that_drop_all(tmp_path):
    def losses(name, *batches):
        result = stage(tmp_path / name, Sampler(*batches)).run({("train", ""): 4}, max_batches=3)
        assert result.missing[("train", "")] > 0
        return result.losses()

    assert losses("none", []).startswith("Nothing was sampled, so no filter is to blame: look at synthesis.sampler")
    assert losses("one", ["one"], []) == "Nothing was dropped"
    dropped = "Most dropped for: duplicate: seen before (2), spoken: refused (1)"
    assert losses("same", ["mute", "one"], ["one"]) == dropped
