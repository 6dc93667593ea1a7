# SPDX-License-Identifier: Apache-2.0
import copy
import sys

import pytest

from nemo_rba.synthesis.filters import apply_filters
from nemo_rba.synthesis.filters_content import (
    MARKUP,
    InstructionRefusalFilter,
    LanguageFilter,
    MarkupFilter,
    RefusalFilter,
)
from nemo_rba.types import Instruction

CANDIDATES = ["en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja", "ko", "hi", "ar", "tr", "vi"]


def instruction(text: str, response: str = "") -> Instruction:
    return Instruction(id="x", text=text, response=response, task="t")


def markup(**changes) -> MarkupFilter:
    return MarkupFilter(**({"allow": [], "field": "text"} | changes))


@pytest.mark.parametrize(
    "text",
    [
        "What is 3 + 4?",
        "Is 5 < 6?",
        "It costs $5 and $10.",
        "I'm 5'11\" tall",
        "-5 degrees outside",
        "C++ or Rust?",
        "first, buy milk; second, cook",
        "AC/DC and A/B tests",
        "call me at 10:30 p.m.",
        "50% off & more",
        "what does a*b mean",
        "e.g. cats vs. dogs",
        "Write a poem (a short one)",
        "Who's #1?",
        "version 2.0 ... really?!",
        "3 * 4 * 5",
        "well - maybe not",
        "apples, pears (2) and plums",
        "import duties and taxes",
        "你叫什么名字？",
    ],
)
def test_what_can_be_read_aloud_has_no_markup(text):
    assert markup().reason(instruction(text)) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("fix this:\n```py\nx\n```", "code block"),
        ("run:\n    x = f(y);", "code block"),
        ("use `ls` now", "inline code"),
        ("a <b>bold</b> word", "HTML"),
        ("ham &amp; eggs", "HTML"),
        ("mail me@x.org soon", "e-mail address"),
        ("see https://a.b/c", "URL"),
        ("go to example.com now", "URL"),
        ("what is $\\frac{1}{2}$", "LaTeX"),
        ("solve $x^2$", "LaTeX"),
        ("the value of \\(x\\)", "LaTeX"),
        ("is 2 ∈ A", "formula"),
        ("f(x) = 2x", "formula"),
        ("x^2 + 1", "formula"),
        ("let x = 5", "formula"),
        ("| a | b |\n|---|---|", "table"),
        ("name | age | city | zip", "table"),
        ("def f(x): return x", "code"),
        ("call main() now", "code"),
        ("import numpy as np", "code"),
        ("SELECT * FROM t", "code"),
        ("if x == 3", "code"),
        ("rename my_var", "code"),
        ("open /etc/hosts please", "file path"),
        ("in C:\\Users it is", "file path"),
        ("# Title", "heading"),
        ("Title\n=====", "heading"),
        ("buy:\n- one\n- two", "list"),
        ("1. one\n2. two", "list"),
        ("do 1) this and 2) that", "list"),
        ("pick a) x or b) y", "list"),
        ("make **this** bold", "Markdown"),
        ("an *important* word", "Markdown"),
        ("read [it](there)", "Markdown"),
        ("> quoted", "Markdown"),
    ],
)
def test_markup_is_named(text, kind):
    assert markup().reason(instruction(text)) == f"has {kind}"
    others = markup(allow=[name for name in MARKUP if name != kind])
    assert others.reason(instruction(text)) == f"has {kind}"
    assert markup(field="response").reason(instruction(text)) is None
    assert markup(field="response").reason(instruction("x", text)) == f"has {kind}"


def test_kinds_of_markup_can_be_allowed_and_are_counted():
    texts = ["mail me@x.org", "use `ls`", "use `cat`", "hello there"]
    _, counts, _ = apply_filters([instruction(text) for text in texts], [markup()])
    assert counts == {"markup: has e-mail address": 1, "markup: has inline code": 2}
    kept, _, _ = apply_filters([instruction(text) for text in texts], [markup(allow=["e-mail address"])])
    assert [item.text for item in kept] == ["mail me@x.org", "hello there"]
    with pytest.raises(ValueError, match=r"allow=\['tables'\]; expected kinds from code block"):
        markup(allow=["tables"])
    with pytest.raises(ValueError, match="field='answer'; expected one of text, response"):
        markup(field="answer")


def language(**changes) -> LanguageFilter:
    settings = {"languages": ["en"], "min_probability": 0.5, "min_bytes": 9, "candidates": CANDIDATES, "field": "text"}
    return LanguageFilter(**(settings | changes))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("what is your name", None),
        ("Could you suggest three ideas for a birthday party?", None),
        ("play some jazz", None),
        ("tell me a joke", None),
        ("wie heißt du eigentlich", "is in another language (de)"),
        ("你叫什么名字", "is in another language (zh)"),
        ("नमस्ते आप कैसे हैं", "is in another language (hi)"),
        ("dis moi une blague", "is in another language (fr)"),
        ("quiero saber la hora", "is in another language (es)"),
        ("wie gut", None),  # seven letters: not judged
        ("12 + 13 = 25?", None),
    ],
)
def test_language(text, reason):
    pytest.importorskip("py3langid")
    assert language().reason(instruction(text)) == reason


def test_languages_are_chosen_and_filters_do_not_disturb_each_other():
    pytest.importorskip("py3langid")
    german, both = language(languages=["de"]), language(languages=["de", "en"], candidates=[])
    text = instruction("wie wird das Wetter morgen in Berlin", "the weather is fine today")
    assert german.reason(text) is None
    assert both.reason(text) is None
    assert language().reason(text) == "is in another language (de)"
    assert language(languages=["de"], field="response").reason(text) == "is in another language (en)"
    assert language(min_probability=0.999).reason(instruction("tell me a joke")) == "no language stands out"
    assert copy.deepcopy(german).reason(text) is None


def test_languages_are_compared_with_the_detectors_at_once():
    pytest.importorskip("py3langid")
    for changes in (
        {"languages": ["english"], "candidates": []},
        {"languages": ["en"], "candidates": ["en", "english"]},
    ):
        with pytest.raises(ValueError, match=r"does not know \['english'\]"):
            language(**changes)


def test_language_settings_are_checked():
    with pytest.raises(ValueError, match=r"languages=\[\]"):
        language(languages=[])
    with pytest.raises(ValueError, match=r"languages=\['e', 'n'\]"):
        language(languages="en")
    with pytest.raises(ValueError, match=r"languages=\['sv'\]"):
        language(languages=["sv"])
    with pytest.raises(ValueError, match="min_probability=1"):
        language(min_probability=1)


def test_a_missing_detector_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ImportError, match="pip install py3langid"):
        language(candidates=["en", "sw"])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I'm sorry to hear that your cat died.", None),
        ("Sure! Here is how to assist a beginner.", None),
        ("As an airline pilot I would say no.", None),
        ("I'm sorry, but I can't assist with that.", "refuses"),
        ("I’m sorry, but I can’t help with that.", "refuses"),
        ("I am unable to do so.", "refuses"),
        ("As an AI, I have no body.", "speaks of itself as a machine"),
        ("Well, I'm just a large language model.", None),  # "just" stands between
        ("You haven't provided an article.", "asks for what was not given"),
        ("Of course! Please paste your essay.", "asks for what was not given"),
        ("One two three four five six seven eight nine ten, and so I cannot help you.", None),
    ],
)
def test_refusals(answer, reason):
    refusal = RefusalFilter(first_words=10, phrases=None)
    assert refusal.reason(instruction("x", answer)) == reason
    assert refusal.reason(instruction(answer, "yes")) is None
    assert InstructionRefusalFilter(first_words=10, phrases=None).reason(instruction(answer, "yes")) == reason


def test_refusals_in_other_words():
    german = RefusalFilter(first_words=8, phrases={"refuses": ["das kann ich nicht"]})
    assert german.reason(instruction("x", "Das kann ich nicht.")) == "refuses"
    assert german.reason(instruction("x", "I cannot help you.")) is None
    with pytest.raises(ValueError, match="phrases="):
        RefusalFilter(first_words=8, phrases={"refuses": ["!"]})
    with pytest.raises(ValueError, match="first_words=0"):
        RefusalFilter(first_words=0, phrases=None)
