# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.evaluation.options import chosen_option

OPTIONS = ["London", "Paris", "New York", "a dog"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is B", "B"),
        ("The correct answer is (B).", "B"),
        ("the answer is b", "B"),
        ("answer: d", "D"),
        ("The answer to the question is: **C) New York**", "C"),
        ("Sure! The answer is:\n\n**B. Paris**", "B"),
        ("My answer is option (c)", "C"),
        ("The right option is d, I guess", "D"),
        ("I would choose option b because it is nice", "B"),
        ("I would not choose A, I would choose C", "C"),
        ("I'd go with D", "D"),
        ("C is the best answer", "C"),
        ("Option B is right. Option A is wrong.", "B"),
        ("A is tempting. But B is correct.", "B"),
        ("First I thought the answer is A. No, the answer is D.", "D"),
        (r"The answer is \boxed{B}", "B"),
        (r"The answer is \(\text{C}\)", "C"),
        ("答案是B。", "B"),
        ("选C", "C"),
    ],
)
def test_a_letter_that_is_said_to_be_the_answer(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("b) Paris", "B"), ("**C.** Because", "C"), ('"C"', "C"),
     ("Option D.", "D"), ("A", "A"), ("a", "A"), ("A: London, not (B)", "A")],
)  # fmt: skip
def test_a_letter_that_opens_the_answer(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("paris", "B"),
        ("It is Paris, of course.", "B"),
        ("It is New York", "C"),
        ("the answer is a dog", "D"),
        ("A dog is a man's best friend", "D"),
        ("London or Paris", None),
        ("Parisians", None),
    ],
)
def test_the_text_of_an_option(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


def test_a_text_inside_another_does_not_count():
    assert chosen_option("New York, I believe", ["York", "New York"]) == "B"
    assert chosen_option("York, I believe", ["York", "New York"]) == "A"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("so it must be (D)", "D"),
        ("It's b.", "B"),
        ("I think it is B because of things", "B"),
        ("I'm not sure, maybe a.", "A"),
        ("it could be (a) or (b)", None),
    ],
)
def test_a_letter_by_itself(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    "answer", ["", "I do not know", "a cat", "A cat sat.", "The answer is a cat", "The answer is not A.",
               "Options A and B are wrong.", "I am a model", "The answer is E", "The U.S.A. has it"],
)  # fmt: skip
def test_what_names_no_option_is_none(answer):
    assert chosen_option(answer, OPTIONS) is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Not B", None), ("It can't be C", None), ("I don't think it is A", None), ("B is not right", None),
        ("neither A nor B", None), ("It isn't (b)", None), ("not A or B", None), ("not A but B", "B"),
        ("The answer is not A, it is B.", "B"), ("The answer is B, not A", "B"), ("C is incorrect; B is correct", "B"),
        ("Options A and B are both wrong, so D.", "D"), ("A, B and C are incorrect. D.", "D"), ("B. A) is wrong.", "B"),
        ("It is not Paris", None), ("It is not Paris, it is London", "A"),
    ],
)  # fmt: skip
def test_what_is_rejected_is_not_chosen(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer could be A or B", None), ("The answer is (A) or (B)", None), ("The answer is A/B", None),
        ("A or B", None), ("a or b.", None), ("Either A or B.", None), ("The answer is: A or maybe C", None),
        ("A. London or B. Paris? It is Paris.", None), ("a) london b) paris", None),
        ("A. London\nB. Paris\nC. New York\nD. a dog", None),
        ("The answer is A. No wait, B.", "B"), ("The answer is A. Actually, C.", "C"), ("B? No, C.", "C"),
        ("The answer is B because A is a city", "B"), ("Answer: A. B is a city in France.", "A"),
    ],
)  # fmt: skip
def test_one_of_several_is_none_unless_the_last_word_says_which(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


# What VoiceBench's src/evaluator/mcq.py said to each, run side by side.
@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("C) New York", "C"), ("The answer is B", "B"),
        ("The correct answer is D.", "D"), ("the answer is: **C**", "C"), ("I would select A", "A"),
        ("C is the best answer", "C"), ("The answer is 'B'", "B"), ("答案是B", "B"), ("it would be option C", "C"),
        ("is **A)**", "A"), ("is (D).", "D"), ("Option B.", "B"), ("I'd say C.", "C"), ("I do not know", None),
        ("D) a dog", "D"), ("The correct answer is option (c).", "C"), ('"A"', "A"), ("Perhaps D.", "D"),
        (r"The answer is \( \boxed{B} \)", "B"),
    ],
)  # fmt: skip
def test_clear_answers_are_read_as_voicebench_reads_them(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


def test_unclear_ones_are_not():
    theirs = {"not B.": "B", "The answer could be A or B.": "B", "The answer is a dog": "A",
              "The answer is A. No wait, B.": "A"}  # fmt: skip
    assert [chosen_option(answer, OPTIONS) for answer in theirs] == [None, None, "D", "B"]


def test_options_that_begin_with_a_no_can_be_chosen():
    assert chosen_option("It is not plausible", ["plausible", "not plausible"]) == "B"
    assert chosen_option("It is plausible", ["plausible", "not plausible"]) == "A"


def test_letters_go_as_far_as_the_options():
    ten = [f"the {n}th of them" for n in range(10)]
    assert chosen_option("The answer is J", ten) == "J"
    assert chosen_option("The answer is J", OPTIONS) is None
    assert chosen_option("The answer is I.", ten) == "I"
    assert chosen_option("Answer: I think B", ten) == "B", "the word I is no letter"
    assert chosen_option("I am sure", ten) is None
    assert chosen_option("yes it is", ["Yes", "No"]) == "A"
