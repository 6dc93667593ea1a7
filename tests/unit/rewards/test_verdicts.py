# SPDX-License-Identifier: Apache-2.0
"""Replies of judges, read: what says one thing has it, what might mean another has none."""

import pytest

from nemo_rba.rewards.verdicts import read_choice, read_grade, read_yes_no


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("4", 4), ("4.", 4), (" 4\n", 4), ("**4**", 4), ("[[4]]", 4), ("Score: 4", 4), ('{"score": 4}', 4),
        ("3.5", 3.5), ("4/5", 4), ("4 / 5.", 4), ("**4**/5", 4), ("2/5", 2), ("3 out of 5", 3),
        ("Score: 3 (out of 5)", 3),
        ("I give it 2 of 5.", 2), ("5/5.0", 5), ("5 of 5", 5), ("2 (scale 1-5)", 2), ("Grade (1-5): 2", 2),
        ("from 1 to 5: 3", 3), ("a grade of 5", 5), ("It names 3 of 7 points. [[2]]", 2), ("4 stars", 4),
    ],
)  # fmt: skip
def test_a_grade_on_the_scale_is_read(reply, grade):
    assert read_grade(reply, low=1, high=5) == grade


@pytest.mark.parametrize(
    "reply",
    ["", "good", "10", "15", "25", "0", "6", "5.5", "-3", "-1/5", "4/10", "2/50", "4 out of 10", "4 or 5", "4-5",
     "4 to 5", "4,5", "1-5", "4th", "80%", "4½", "4+", "3-", "I say 2, no: 4", "It names 3 of 7 points: 2",
     "[[4]] or [[5]]", "gpt4: 5"],
)  # fmt: skip
def test_what_is_off_the_scale_or_ambiguous_is_no_grade(reply):
    assert read_grade(reply, low=1, high=5) is None


def test_the_scale_is_the_judges_own():
    assert read_grade("7/10", low=1, high=10) == 7
    assert read_grade("4/5", low=1, high=10) is None
    assert read_grade("-0.5", low=-1, high=1) == -0.5


@pytest.mark.parametrize(
    ("reply", "better"),
    [
        ("1", 1), ("2.", 2), ("**2**", 2), ("[[1]]", 1), ("Answer 2", 2), ("The better answer is Answer 2.", 2),
        ("Answer 2 is better than Answer 1", 2), ("Answer 1 is slightly better than 2", 1), ("I prefer answer 1", 1),
        ("1 (not 2)", None), ("Answer 2 is not better than Answer 1", None), ("Answer 1 is worse than 2", None),
        ("1 or 2", None), ("12", None), ("1.5", None), ("Both 1 and 2", None), ("", None),
        ("I don’t think 2 is better", None),
        ("Answer 1 is better. Answer 2 is better.", None), ("Answer 2 has errors", None),
    ],
)  # fmt: skip
def test_the_better_answer_is_read_only_where_it_is_named(reply, better):
    assert read_choice(reply) == better


@pytest.mark.parametrize(
    ("reply", "vote"),
    [
        ("Yes", 1), ("No.", 0), ("**Yes**", 1), ('"No"', 0), ("NO", 0), ("Yes, it is.", 1), ("Verdict: No", 0),
        ("The answer is yes.", 1), ("Yes\n\nBecause it says so", 1),
        ("there is no error", None), ("No doubt it is right", None), ("Yes and no", None), ("Yes, but no", None),
        ("no, yes", None), ("", None), ("Right", None), ("Yesterday", None), ("Nobody knows", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_only_as_verdicts(reply, vote):
    assert read_yes_no(reply) == vote
