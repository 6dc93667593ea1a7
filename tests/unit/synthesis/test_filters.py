# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.synthesis.filters import (
    CallableFilter,
    CharacterFilter,
    DuplicateFilter,
    LengthFilter,
    RepetitionFilter,
    ResponseFilter,
    apply_filters,
    in_order,
    normalize_text,
)
from nemo_rba.types import Instruction


def instruction(text: str, response: str = "") -> Instruction:
    return Instruction(id="x", text=text, response=response, task="t")


def test_length():
    length = LengthFilter(min_words=2, max_words=4, max_characters=20)
    assert length.reason(instruction("say hello")) is None
    assert length.reason(instruction("")) == "empty or never ended"
    assert length.reason(instruction("hello")) == "fewer than 2 words"
    assert length.reason(instruction("a b c d e")) == "more than 4 words"
    assert length.reason(instruction("aaaaaaaaaaa bbbbbbbbbbbb")) == "more than 20 characters"
    with pytest.raises(ValueError, match="min_words=5, max_words=4"):
        LengthFilter(min_words=5, max_words=4, max_characters=20)


def characters(**changes) -> CharacterFilter:
    return CharacterFilter(**({"punctuation": ".,?!'", "digits": False, "scripts": []} | changes))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What is your name, please?", None),
        ("wie heißt du", None),
        ("你叫什么名字", None),
        ("नमस्ते आप कैसे हैं", None),
        ("see https://nvidia.com/x", "has a URL"),
        ("go to example.org", "has a URL"),
        ("run `ls`", "has code"),
        ("call main() now", "has code"),
        ("use <b> here", "has code"),
        ("make **this** bold", "has markdown"),
        ("- one", "has markdown"),
        ("1. one", "has markdown"),
        ("# title", "has markdown"),
        ("what is 3 plus 4", "has digits"),
        ("½ a cup", "has digits"),
        ("a = b", "has unspeakable characters"),
        ("line\nbreak", "has unspeakable characters"),
        ("smile 😀", "has unspeakable characters"),
    ],
)
def test_characters(text, reason):
    assert characters().reason(instruction(text)) == reason


def test_digits_can_be_allowed():
    assert characters(punctuation="", digits=True).reason(instruction("what is 3 plus 4")) is None
    assert characters(punctuation="", digits=True).reason(instruction("½ a cup")) is None


@pytest.mark.parametrize(
    ("scripts", "text", "reason"),
    [
        (["Latin"], "What is a café, naïve Straße?", None),
        (["Latin"], "cafe\u0301", None),  # an accent that is a character of its own
        (["Latin"], "Привет", "has letters of another script"),
        (["Latin"], "你好世界", "has letters of another script"),
        (["Latin"], "hello мир", "has letters of another script"),
        (["Latin"], "pаy", "has letters of another script"),  # a Cyrillic a
        (["Latin", "Cyrillic"], "hello мир", None),
        (["Han"], "你好世界", None),
        (["Han"], "你好 world", "has letters of another script"),
        (["Hiragana", "Katakana", "Han"], "東京タワーです", None),  # the long vowel mark belongs to two scripts
        (["Devanagari"], "नमस्ते", None),  # vowel signs
        ([], "Привет, 你好 world", None),
        (["Latin"], "hi 😀", "has unspeakable characters"),
    ],
)
def test_only_letters_of_the_scripts_that_a_voice_can_read_are_kept(scripts, text, reason):
    assert characters(scripts=scripts).reason(instruction(text)) == reason


@pytest.mark.parametrize("scripts", ["Latin", ["English"], ["Latin}"]])
def test_unknown_scripts_are_refused(scripts):
    with pytest.raises(ValueError, match=r"CharacterFilter: scripts=.*expected a list of Unicode's names"):
        characters(scripts=scripts)


def test_filters_by_name_become_a_list():
    first, last = DuplicateFilter(), DuplicateFilter()
    assert in_order(b=first, off=None, a=last) == [first, last]
    assert in_order() == []


def test_repetition():
    repetition = RepetitionFilter(ngram=2, max_repeats=2)
    assert repetition.reason(instruction("the cat saw the cat")) is None
    assert repetition.reason(instruction("The cat, the cat: the cat")) == "repeats 2 words more than 2 times"
    assert repetition.reason(instruction("word")) is None


def test_duplicates_are_found_by_sound():
    duplicate = DuplicateFilter()
    assert duplicate.reason(instruction("What's up?")) is None
    assert duplicate.reason(instruction("whats UP")) == "seen before"
    assert DuplicateFilter().reason(instruction("whats UP")) is None
    assert normalize_text("  Hé,  World!  ") == "hé world"
    assert normalize_text("\ufb01ne") == "fine"


def test_response():
    response = ResponseFilter(max_words=3)
    assert response.reason(instruction("x", "one two three")) is None
    assert response.reason(instruction("x", " ")) == "empty or never ended"
    assert response.reason(instruction("x", "one two three four")) == "more than 3 words"


def test_apply_filters_counts_the_first_reason():
    filters = [
        LengthFilter(min_words=1, max_words=2, max_characters=99),
        CallableFilter(name="domain", keep=lambda text: "cat" in text),
        DuplicateFilter(),
    ]
    texts = ["a cat", "a dog", "a big cat", "A cat!", "a dog"]
    kept, counts, dropped = apply_filters([instruction(text) for text in texts], filters)
    assert [item.text for item in kept] == ["a cat"]
    assert counts == {"domain: refused": 2, "length: more than 2 words": 1, "duplicate: seen before": 1}
    assert [(item.text, reason) for item, reason in dropped][1] == ("a big cat", "length: more than 2 words")
    assert len(kept) + len(dropped) == len(texts)


def test_a_filter_may_see_its_batch_at_once():
    class Longest:
        name = "longest"

        def __init__(self):
            self.seen = []

        def reasons(self, instructions):
            self.seen.append([item.text for item in instructions])
            longest = max(len(item.text) for item in instructions)
            return ["is the longest" if len(item.text) == longest else None for item in instructions]

    batch, duplicates = Longest(), DuplicateFilter()
    items = [instruction(text) for text in ["aaa", "aaa", "bb", "cccc", "BB", "d"]]
    kept, counts, dropped = apply_filters(items, [DuplicateFilter(), batch, duplicates])
    assert batch.seen == [["aaa", "bb", "cccc", "d"]]
    assert [item.text for item in kept] == ["aaa", "bb", "d"]
    assert counts == {"duplicate: seen before": 2, "longest: is the longest": 1}
    assert [item.text for item, _ in dropped] == ["aaa", "cccc", "BB"]  # in the order of the items
    assert duplicates.reason(instruction("cccc")) is None  # was never shown it
    assert apply_filters([], [batch]) == ([], {}, [])
    assert len(batch.seen) == 1
