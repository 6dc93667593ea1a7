# SPDX-License-Identifier: Apache-2.0
import copy
import os
import sys
import types

import pytest

from nemo_rba.synthesis import spoken_form
from nemo_rba.synthesis.spoken_form import PROMPT, NeMoTextNormalizer, Spoken, TeacherRewrite, unspeakable

PUNCTUATION = "'-.,?!:;"
GRAMMARS = os.environ.get("NEMO_RBA_GRAMMARS", "")  # a folder for compiled grammars; English takes minutes to compile


class Writer:
    """A teacher who says what a table says; what it was asked is kept."""

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def __deepcopy__(self, memo):
        raise AssertionError("a teacher was copied")

    def render(self, messages, *, open_turn):
        return messages[0]["content"] + f"<{open_turn}>"

    def generate(self, prompts, params):
        assert params.temperature == 0
        self.prompts += prompts
        return [self.answers[prompt.partition("Message: ")[2].removesuffix("<assistant>")] for prompt in prompts]


def rewrite(text, answer, **changes):
    settings = {"punctuation": PUNCTUATION, "min_kept": 1.0, "max_new_tokens": 64} | changes
    return TeacherRewrite(teacher=Writer({text: answer}), **settings)([text])[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("What's up, doc?", None),
        ("你叫什么名字", None),
        ("route 66", "has digits left"),
        ("x²", "has digits left"),
        ("Ⅳ", "has digits left"),
        ("five < six", "has symbols left"),
        ("smile 😀", "has symbols left"),
    ],
)
def test_what_cannot_be_said(text, reason):
    assert unspeakable(text, PUNCTUATION) == reason


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("What is 3 + 4?", "What is three plus four?", None),
        ("What is 3 + 4?", '"What is three plus four?"', None),  # quoted
        ("Dr. Smith runs 5 km at 10 p.m.", "Doctor Smith runs five kilometers at ten p m", None),
        ("NASA spent $3.50", "N A S A spent three dollars and fifty cents", None),
        ("What is 3 + 4?", "What is 3 plus four?", "has digits left"),
        ("What is 3 + 4?", "What is three + four?", "has symbols left"),
        ("What is 3 + 4?", "Seven.", "the rewrite lost words"),
        ("do not add 3 to it", "do add three to it", "the rewrite lost words"),
        ("add 3 cups, then stir", "stir, then add three cups", "the rewrite lost words"),
        ("What is 3 + 4?", "", "the rewrite is empty or never ended"),
        ("Is 1 odd?", "Is one odd? " + "Yes it is odd as it leaves a rest. " * 3, "the rewrite added words"),
    ],
)  # fmt: skip
def test_rewrites_are_checked(text, answer, reason):
    spoken = rewrite(text, answer)
    assert spoken.reason == reason
    assert spoken.text == answer.strip().strip('"')


def test_a_rewrite_may_lose_a_share_of_its_words():
    text, answer = "walk ten feet and carry 5 bags", "walk ten foot and carry five bags"  # five of six plain words
    assert rewrite(text, answer).reason == "the rewrite lost words"
    assert rewrite(text, answer, min_kept=0.8).reason is None


def test_a_teacher_sees_only_what_needs_a_rewrite():
    writer = Writer({"add 3": "add three", "e.g. cats": "for example cats", "Mr. X": "mister X"})
    form = TeacherRewrite(teacher=writer, punctuation=PUNCTUATION, min_kept=1.0, max_new_tokens=64)
    texts = ["Hello there. Say hi!", "add 3", "  two\n lines ", "e.g. cats", "Mr. X"]
    expected = ["Hello there. Say hi!", "add three", "two lines", "for example cats", "mister X"]
    assert copy.deepcopy(form)(texts) == [Spoken(text, None) for text in expected]
    assert writer.prompts == [PROMPT.format(text=texts[n]) + "<assistant>" for n in (1, 3, 4)]
    assert form.prompt_version == "spoken-form-1"


def test_the_prompt_is_the_one_its_version_names():
    import hashlib

    digest = hashlib.sha256(PROMPT.encode()).hexdigest()[:12]
    assert (spoken_form.PROMPT_VERSION, digest) == ("spoken-form-1", "e9afbcf3b32d"), "a new PROMPT needs a new version"


def test_rewrite_settings_are_checked():
    with pytest.raises(ValueError, match="min_kept=0"):
        rewrite("x", "x", min_kept=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        rewrite("x", "x", max_new_tokens=0)


@pytest.fixture
def grammars(monkeypatch):
    """A stand-in for nemo_text_processing that knows one number; ``made`` says how it was built."""
    made = []

    class Normalizer:
        def __init__(self, input_case, lang, cache_dir=None):
            if lang == "xx":
                raise NotImplementedError("Language xx has not been supported yet.")
            made.append(cache_dir)
            if cache_dir:
                with open(f"{cache_dir}/a.far", "a") as file:
                    file.write("grammar")
            if lang == "slow":
                raise KeyboardInterrupt

        def normalize(self, text, verbose, punct_post_process):
            return text.replace("3", "three ").replace("~", "approximately")

    for name in ("nemo_text_processing", "nemo_text_processing.text_normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("normalize")
    module.Normalizer = Normalizer
    monkeypatch.setitem(sys.modules, "nemo_text_processing.text_normalization.normalize", module)
    monkeypatch.setattr(spoken_form, "version", lambda name: "1.2.0")
    return made


def test_grammars_are_read_when_needed_and_what_they_leave_is_refused(grammars):
    form = NeMoTextNormalizer(language="en", cache_folder="", punctuation=PUNCTUATION)
    assert copy.deepcopy(form) is form
    assert form(["  hello\nthere "]) == [Spoken("hello there", None)]
    assert grammars == []
    assert form(["add 3", "~3 cats", "4 cats", "3 < five"]) == [
        Spoken("add three", None),
        Spoken("approximately three cats", None),
        Spoken("4 cats", "has digits left"),
        Spoken("three < five", "has symbols left"),
    ]
    assert grammars == [None]
    with pytest.raises(ValueError, match="language='xx' is unknown"):
        NeMoTextNormalizer(language="xx", cache_folder="", punctuation="")(["3"])


def test_grammars_are_compiled_once_and_whole(grammars, tmp_path):
    def form(language):
        return NeMoTextNormalizer(language=language, cache_folder=str(tmp_path), punctuation="")

    with pytest.raises(KeyboardInterrupt):
        form("slow")(["3"])
    assert list(tmp_path.iterdir()) == []
    form("en")(["3"])
    assert [path.name for path in tmp_path.iterdir()] == ["en-1.2.0"]
    assert len(grammars) == 3
    form("en")(["3"])
    assert grammars[3:] == [str(tmp_path / "en-1.2.0")]


def test_missing_grammars_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_text_processing.text_normalization.normalize", None)
    with pytest.raises(ImportError, match=r"pip install nemo_text_processing; elsewhere choose spoken_form\.Teacher"):
        NeMoTextNormalizer(language="en", cache_folder="", punctuation="")(["3"])


@pytest.mark.skipif(not GRAMMARS, reason="NEMO_RBA_GRAMMARS names no folder for compiled grammars")
def test_english_as_nemo_says_it():
    pytest.importorskip("nemo_text_processing")
    form = NeMoTextNormalizer(language="en", cache_folder=GRAMMARS, punctuation=PUNCTUATION)
    pairs = {
        "What is 3 + 4?": "What is three plus four?",
        "Dr. Smith paid $3.50": "doctor Smith paid three dollars fifty cents",
        "It is 5/6/2023.": "It is may sixth twenty twenty three.",
        "It's 20 km away, i.e. 12.4 miles": "It's twenty kilometers away, that is twelve point four miles",
        "Set a timer for 10:30 p.m.": "Set a timer for ten thirty PM",
        "50% of 1,234": "fifty percent of one thousand two hundred and thirty four",
        "about ~5 cats": "about approximately five cats",
        "temp is 20°C": "temp is twenty degrees Celsius",
        "Tell me, please: who won?": "Tell me, please: who won?",
    }  # fmt: skip
    assert form(list(pairs)) == [Spoken(spoken, None) for spoken in pairs.values()]
    assert form(["5 < 6"])[0].reason == "has symbols left"
