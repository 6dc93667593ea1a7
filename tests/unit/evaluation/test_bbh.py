# SPDX-License-Identifier: Apache-2.0
"""Spoken BIG-Bench Hard: what is read as yes, no, (A) or (B), beside VoiceBench's src/evaluator/bbh.py."""

import pytest

from nemo_rba.evaluation.bbh import BBHTask, chosen_verdict
from nemo_rba.evaluation.tasks import as_rollout
from nemo_rba.types import Instruction

# (family, answer, what theirs said, run side by side; None where it drew)
ALIKE = [
    ("navigate", "Yes", "yes"),
    ("navigate", "No.", "no"),
    ("navigate", "The answer is no.", "no"),
    ("navigate", "Let's see. You take 3 steps. The answer is: **Yes**", "yes"),
    ("navigate", "Final answer: No", "no"),
    ("navigate", "You return to the starting point.", "yes"),
    ("navigate", "You do not return to the starting point.", "no"),
    ("navigate", "If you follow these instructions, you are not back at the starting point.", "no"),
    ("navigate", "You turn around. You take 5 steps. So, yes", "yes"),
    ("navigate", "I do not know.", None),
    ("navigate", r"The answer is \boxed{No}", "no"),
    ("navigate", "We are now back at the starting point.", "yes"),
    ("navigate", "Following these instructions does not return us to the starting point.", "no"),
    ("navigate", "No, you would not; saying yes would be wrong.", "no"),
    ("navigate", "Is it back? I would answer yes", "yes"),
    ("sports_understanding", "Yes, the sentence is plausible.", "yes"),
    ("sports_understanding", "The sentence is not plausible.", "no"),
    ("sports_understanding", "No, it is not.", "no"),
    ("sports_understanding", "It seems unlikely.", "no"),
    ("sports_understanding", "The answer is true.", "yes"),
    ("sports_understanding", "I would say the sentence is plausible.", "yes"),
    ("sports_understanding", "He is a basketball player, making it implausible.", "no"),
    ("sports_understanding", "Considering these points, the sentence is not plausible.", "no"),
    ("sports_understanding", "Not plausible", "no"),
    ("sports_understanding", "The sentence is not entirely plausible.", "no"),
    ("sports_understanding", "Considering these points, the sentence seems plausible.", "yes"),
    ("sports_understanding", "Therefore, not plausible.", "no"),
    ("sports_understanding", "Conclusion: Yes", "yes"),
    ("web_of_lies", "Vina tells the truth.", "yes"),
    ("web_of_lies", "So Vina lies.", "no"),
    ("web_of_lies", "Therefore Delfina does not tell the truth.", "no"),
    ("web_of_lies", "Thus the answer is no.", "no"),
    ("web_of_lies", "Yes, Fidel tells the truth.", "yes"),
    ("web_of_lies", "Osvaldo is lying.", "no"),
    ("web_of_lies", "Raymond must be telling the truth.", "yes"),
    ("web_of_lies", "Sherrie says Vina lies. So the answer is Yes", "yes"),
    ("web_of_lies", "We cannot say.", None),
    ("web_of_lies", "Jerry cannot be telling the truth.", "no"),
    ("web_of_lies", 'The answer to the question "Does Vina tell the truth?" is no.', "no"),
    ("web_of_lies", "A says that B lies. B is also telling the truth", "yes"),
    ("hyperbaton", "A", "A"),
    ("hyperbaton", "The answer is (B).", "B"),
    ("hyperbaton", "The answer is A.", "A"),
    ("hyperbaton", "The correct sentence is option B.", "B"),
    ("hyperbaton", "Option B has the correct adjective order.", "B"),
    ("hyperbaton", "Option A follows the correct adjective order.", "A"),
    ("hyperbaton", "The correct adjective order is (A)", "A"),
    ("hyperbaton", "The correct adjective order is B.", "B"),
    ("hyperbaton", "b) big red dog", "B"),
    ("hyperbaton", "A) big red dog", "A"),
    ("hyperbaton", "I like dogs.", None),
    ("hyperbaton", "The correct answer is (a)", "A"),
    ("hyperbaton", "Option A is the correct answer.", "A"),
    ("hyperbaton", "The final answer is (B)", "B"),
    ("hyperbaton", "The right adjective order is (a)", "A"),
    ("hyperbaton", "Sentence B has the correct adjective order.", "B"),
    ("hyperbaton", "Option A is incorrect and option B is correct.", "B"),
    ("hyperbaton", "The correct order would be option B", "B"),
    ("hyperbaton", "Both are fine, a or b.", None),
    ("hyperbaton", "The correct option is (B)", "B"),
    ("hyperbaton", "The answer is option (A)", "A"),
]
# (family, answer, ours, theirs)
UNLIKE = [
    ("navigate", "So you will end up right back at the starting point.", "yes", None),
    ("navigate", "After 4 steps left and 4 steps right, you'll end up back where you started.", "yes", None),
    ("sports_understanding", "The sentence is plausible.", "yes", None),
    ("sports_understanding", "It's not a plausible sentence, as he plays tennis.", "no", None),
    ("sports_understanding", 'The sentence "Joe kicked a goal" is not plausible.', "no", "yes"),
    ("sports_understanding", "There is no doubt that it is plausible.", "yes", None),
    ("sports_understanding", "Nobody knows.", None, "no"),
    ("web_of_lies", "Raymond must be lying.", "no", "yes"),
    ("hyperbaton", "b", "B", "A"),
    ("hyperbaton", "(B)", "B", None),
    ("hyperbaton", "I think the right choice is option B, since it sounds natural.", "B", None),
]


@pytest.mark.parametrize(("family", "answer", "verdict"), ALIKE)
def test_verdicts_are_those_of_voicebench(family, answer, verdict):
    assert chosen_verdict(answer, family) == verdict


@pytest.mark.parametrize(("family", "answer", "ours", "theirs"), UNLIKE)
def test_where_they_are_not_theirs_was_drawn_or_wrong(family, answer, ours, theirs):
    assert chosen_verdict(answer, family) == ours != theirs


@pytest.mark.parametrize(
    ("family", "answer", "verdict"),
    [
        ("navigate", "First I thought the answer is yes. The answer is no.", "no"),
        ("navigate", "Let us see whether you return to the starting point.", None),
        ("navigate", "Do you return to the starting point?", None),
        ("web_of_lies", "Vina says that Fidel lies. We cannot know.", None),
        ("sports_understanding", "Yes. There is no doubt that it is plausible.", "yes"),
        ("hyperbaton", "It is not option A.", None),
    ],
)  # fmt: skip
def test_the_last_word_counts_and_a_question_is_none(family, answer, verdict):
    assert chosen_verdict(answer, family) == verdict


def question(response: str, id: str) -> Instruction:
    return Instruction(id="i3", text="q", response=response, task="bbh", extra={"id": id})


def test_what_cannot_be_read_is_wrong_and_counted():
    task = BBHTask(name="bbh", batches=list, kinds={})
    told = [("No", "bbh_navigate_1", "No."), ("Yes", "bbh_web_of_lies_2", "no"),
            ("(B)", "bbh_hyperbaton_3", "Option B."),
            ("Yes", "bbh_sports_understanding_4", "I like sports.")]  # fmt: skip
    scores = task.score([as_rollout(question(right, id), answer) for right, id, answer in told])
    assert scores == {"score": 50.0, "accuracy": 50.0, "unparsable": 25.0}


@pytest.mark.parametrize(
    ("response", "id"),
    [
        ("Yes", "bbh_snarks_1"),
        ("Yes", "bbh_hyperbaton_1"),
        ("(A)", "bbh_navigate_1"),
        ("maybe", "bbh_navigate_1"),
        ("Yes", ""),
    ],
)
def test_an_item_needs_a_known_family_and_its_kind_of_reference(response, id):
    with pytest.raises(ValueError, match=r"'i3' has extra.id .*expected an id with one of sports_understanding"):
        BBHTask(name="bbh", batches=list, kinds={}).item(question(response, id), "yes")
