# SPDX-License-Identifier: Apache-2.0
"""A judge that says what a script says: votes, their mean, what is paid for, and whose they are."""

import json
import re
from dataclasses import replace

import pytest
import torch

from nemo_rba.rewards.judge import AnswerJudgeReward, JudgeReward, PairwiseJudgeReward
from nemo_rba.types import Instruction, Rollout

PROMPT = "Q: {instruction} A: {response} Grade {1 to 5}."


class Judge:
    """Says, about an answer, the next line of its script."""

    def __init__(self, **script):
        self.script, self.asked, self.seeds = {answer: list(lines) for answer, lines in script.items()}, [], []

    def render(self, messages, *, open_turn):
        return messages[0]["content"]

    def generate(self, prompts, params):
        self.asked += prompts
        self.seeds.append(params.seed)
        return [self.script[re.search(r"A: (\w*)", prompt)[1]].pop(0) for prompt in prompts]


def rollout(response: str, text: str = "say hi", reference: str = "hi") -> Rollout:
    return Rollout(
        prompt_index=0, instruction=Instruction(id="i", text=text, response=reference, task="t"), response=response,
        token_ids=torch.tensor([1]), logprobs=None, truncated=False,
    )  # fmt: skip


def make(judge, **changes) -> JudgeReward:
    settings = {"model": "scripted", "version": "v-1", "prompt": PROMPT, "low": 1, "high": 5, "votes": 2}
    settings |= {"max_new_tokens": 4, "temperature": 0.5, "seed": 7, "memory": ""}
    return JudgeReward(judge=judge, **(settings | changes))


def test_grades_are_the_mean_of_the_votes_on_a_scale_of_0_to_1():
    judge = Judge(good=["5/5", "Score: 4"], bad=["1", "1"])
    reward = make(judge)
    answers = [rollout("good"), rollout("bad"), rollout("good")]
    assert reward(answers).tolist() == [0.875, 0.0, 0.875], "(4.5 - 1) / 4"
    assert judge.asked == ["Q: say hi A: good Grade {1 to 5}."] * 2 + ["Q: say hi A: bad Grade {1 to 5}."] * 2
    assert reward(answers[:1]).tolist() == [0.875], "kept, or the script would have ended"
    assert reward.counts["votes"] == 4


def test_a_vote_without_a_grade_is_asked_for_once_more_and_then_left_out():
    judge = Judge(good=["2 or 3", "4", "3"], silent=["", "9", "", ""])
    reward = make(judge)
    assert reward([rollout("good"), rollout("silent")]).tolist() == [0.625, 0.0]
    assert reward.counts == {"votes": 7, "no grade": 2, "ungraded": 1}
    assert len(set(judge.seeds)) == 2, "with other random numbers"


def test_votes_outlive_the_process_and_are_those_of_one_judge(tmp_path):
    memory = str(tmp_path / "votes.jsonl")
    first = make(Judge(good=["5", "4"]), memory=memory)([rollout("good")])
    assert make(Judge(), memory=memory)([rollout("good")]).tolist() == first.tolist() == [0.875]
    for other in (
        {"model": "another"},
        {"version": "v-2"},
        {"prompt": PROMPT + "!"},
        {"temperature": 0.6},
        {"votes": 3},
    ):
        with pytest.raises(
            ValueError, match=r"belongs to .* name another file.* The key .*evaluation.task.reward.memory"
        ):
            make(Judge(good=["5"] * 3), memory=memory, **other)
    assert json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[0])["owner"]["model"] == "scripted"


def test_a_file_that_another_judge_began_in_the_same_process_is_refused(tmp_path):
    memory = str(tmp_path / "votes.jsonl")
    first, second = (make(Judge(good=["5"] * 2), memory=memory, model=model) for model in ("m1", "m2"))
    first([rollout("good")])
    with pytest.raises(ValueError, match=r"'m1'.*expected .*'m2'.* tasks.<name>.task.reward.memory"):
        second([rollout("good")])


def test_measures_and_signature_say_that_a_judge_graded_and_which(tmp_path):
    reward = make(Judge(), model=str(tmp_path / "llama"))
    assert reward.signature == "judge:llama|prompt:v-1|votes:2|temperature:0.5", "no path of this machine"
    assert reward.measures == {"judge, 1-5 as 0-100": (100.0, 0.0), "judge, mean grade 1-5": (4.0, 1.0)}


def test_the_reference_is_shown_only_where_it_is_asked_for():
    judge = Judge(good=["5"] * 8)
    reward = make(judge, prompt="{instruction} | A: {response} | {reference}", votes=1)
    reward([rollout("good", text="say {response} loud")])
    assert judge.asked == ["say {response} loud | A: good | hi"], "an instruction's own braces are no slots"
    reward([rollout("good", text="say {response} loud", reference="hello")])
    assert len(judge.asked) == 2, "another reference is another question"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"low": 5}, "expected low < high"),
        ({"temperature": 0.0}, "a temperature above 0 for several"),
        ({"prompt": "Q: {instruction}"}, r"lacks the slots \['response'\]"),
        ({"version": ""}, "version=''; expected a name for each"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        make(Judge(), **changes)


def test_the_account_tells_what_was_paid_and_what_was_remembered(tmp_path):
    memory = str(tmp_path / "votes.jsonl")
    reward = make(Judge(good=["5", "no", "4"], silent=[""] * 4), memory=memory)
    reward([rollout("good"), rollout("silent")])
    reward([rollout("good")])
    paid = {"answers judged": 2, "answers without grade": 1, "votes paid": 7}
    assert reward.account() == paid | {"votes remembered": 2, "votes without grade": 2}
    judge = Judge()
    judge.account = lambda: {"prompt tokens": 12}
    again = make(judge, memory=memory)
    again([rollout("good"), rollout("silent")])
    assert again.account() == {
        "answers judged": 2, "answers without grade": 1, "votes paid": 0, "votes remembered": 2,
        "votes without grade": 0, "prompt tokens": 12,
    }  # fmt: skip


class Comparing:
    """Prefers the longer answer; has no opinion on "odd"."""

    def __init__(self):
        self.asked = []

    def render(self, messages, *, open_turn):
        return messages[0]["content"]

    def generate(self, prompts, params):
        self.asked += prompts
        found = [prompt.split("|")[1:] for prompt in prompts]
        return ["none" if "odd" in pair else str(1 + (len(pair[1]) > len(pair[0]))) for pair in found]


def compare(judge, **changes) -> PairwiseJudgeReward:
    settings = {"model": "n", "version": "v-1", "prompt": "{instruction}|{first}|{second}", "votes": 1}
    settings |= {"max_new_tokens": 4, "temperature": 0.0, "seed": 3, "memory": ""}
    return PairwiseJudgeReward(judge=judge, **(settings | changes))


def compared(id: str, answer: str, **changes) -> Rollout:
    instruction = Instruction(id=id, text=f"say {id}", task="t", **{"response": "baseline"} | changes)
    return replace(rollout(answer), instruction=instruction)


def test_the_preference_is_for_the_answer_wherever_it_stands():
    judge = Comparing()
    reward = compare(judge)
    answers = [compared(f"i{n}", text) for n in range(30) for text in ("short", "longer than it")]
    assert reward(answers).tolist() == [0.0, 1.0] * 30
    first = [prompt.split("|")[1] == "baseline" for prompt in judge.asked]
    assert 10 < sum(first) / 2 < 20, "places are drawn"
    assert first[::2] == first[1::2], "and are the same for all answers to an item"
    another = Comparing()
    compare(another, seed=4)(answers)
    assert another.asked != judge.asked


def test_what_is_no_better_and_no_worse_is_a_draw():
    judge = Comparing()
    reward = compare(judge)
    assert reward([compared("a", "baseline"), compared("b", "odd")]).tolist() == [0.5, 0.5]
    assert len(judge.asked) == 2, "once, and once more, for the second"
    assert reward.account()["answers without grade"] == 1
    both = [compared("a", "x", extra={"baseline": text}) for text in ("", "y" * 9)]
    assert reward(both).tolist() == [0.0, 0.0]
    assert judge.asked[-1].count("y" * 9) == 1, "AlpacaEval's own field comes first"
    with pytest.raises(ValueError, match=r"item 'a' has no answer to compare with"):
        reward([compared("a", "x", response=" ")])
    with pytest.raises(ValueError, match=r"lacks the slots \['first'\]"):
        compare(judge, prompt="{instruction} {second}")


def ask(judge, **changes) -> AnswerJudgeReward:
    settings = {
        "model": "scripted",
        "version": "v-1",
        "prompt": "Q: {instruction} A: {response} R: {reference}",
        "votes": 3,
    }
    settings |= {"max_new_tokens": 4, "temperature": 0.5, "seed": 7, "memory": ""}
    return AnswerJudgeReward(judge=judge, **(settings | changes))


def test_the_majority_of_votes_says_whether_an_answer_is_right():
    judge = Judge(good=["Yes", "no", "Yes."], bad=["No", "No, it is not.", "yes"], odd=["yes and no"] * 6)
    reward = ask(judge)
    answers = [rollout(text, text="q", reference="r") for text in ("good", "bad", "odd", " ", "good")]
    assert reward(answers).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert len(judge.asked) == 12, "three each, three once more, none for silence, and none twice"
    account = reward.account()
    assert (account["answers without grade"], account["answers tied"], account["votes without grade"]) == (1, 0, 3)
    assert judge.asked[0] == "Q: q A: good R: r"


def test_a_tie_is_wrong_and_told():
    judge = Judge(even=["yes", "no"], half=["yes", "hm", "no", "hm"], good=["yes", "yes"])
    reward = ask(judge, votes=2)
    assert reward([rollout("even"), rollout("good")] * 2).tolist() == [0.0, 1.0] * 2
    assert reward.account()["answers tied"] == 1
    three = ask(Judge(half=["yes", "no", "hm", "hm"]))
    assert three([rollout("half")]).tolist() == [0.0]
    assert three.account()["answers tied"] == 1, "two votes were left"


def test_aliases_are_right_answers_too_and_one_is_needed():
    judge = Judge(good=["yes"] * 3)
    item = replace(rollout("good").instruction, response="Rome", aliases=("Roma", "the eternal city"))
    ask(judge)([replace(rollout("good"), instruction=item)])
    assert judge.asked[0].endswith("R: Rome; Roma; the eternal city")
    with pytest.raises(ValueError, match="item 'i' has response ' ', expected the right answer"):
        ask(judge)([rollout("good", reference=" ")])
