# SPDX-License-Identifier: Apache-2.0
"""Constraints judged by hand and by lm_eval. Where it is not installed only what is asked for then can be tested.

NLTK's sentence model is a download, so a small one of its kind stands in: it knows that "dr" is an abbreviation.
"""

import random
from importlib.util import find_spec

import nltk
import pytest

from nemo_rba.evaluation import ifeval
from nemo_rba.evaluation.ifeval import PACKAGES, VOICEBENCH, IFEvalTask
from nemo_rba.evaluation.tasks import as_rollout
from nemo_rba.types import Instruction

needs_lm_eval = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="pip install 'lm_eval[ifeval]'"
)

JOKES = "* one\n* two\n"
ENGLISH = "the quick brown dog is running over the hills and it will be home again before the evening"
# constraint, its arguments, an answer that keeps it, one that does not
CASES = [
    ("keywords:existence", {"keywords": ["Mom", "mother"]}, "My mom is a mother.", "My mom."),
    ("keywords:frequency", {"relation": "at least", "keyword": "war", "frequency": 2}, "war and War", "war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "We rocked.", "We Rock."),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "t", "let_frequency": 2}, "To do", "to eat"),
    ("language:response_language", {"language": "de"}, "Der Hund läuft durch den Garten und bellt laut.", ENGLISH),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
     "Dr. Lee came. He left.", "He came. He saw. He left."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** two", "one\n\ntwo"),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two-three", "one two"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
     "Hello.\n\n\"well, yes.", "Well.\n\nNo."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name] address"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. hello", "Bye. PS hello"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, JOKES, JOKES + "- three"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1\na\nSECTION 2\nb", "Section 1\na\nSECTION 2\nb"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<a song>>\nla la", "<< >> la la"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say yes."}, "say yes. Yes!", "Yes! Say yes."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'So. ANY questions?"', "Any questions? No."),
    ("startend:quotation", {}, ' "so" ', '"so" he said'),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2},
     "GO and RUN", "GO on"),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.upper()),
    ("punctuation:no_comma", {}, "no; never", "no, never"),
]  # fmt: skip


@pytest.fixture
def sentence_model(tmp_path, monkeypatch):
    english = tmp_path / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (english / name).write_text("")
    (english / "abbrev_types.txt").write_text("dr\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    if find_spec("lm_eval"):
        from lm_eval.tasks.ifeval import instructions_util

        instructions_util._get_sentence_tokenizer.cache_clear()
        yield
        instructions_util._get_sentence_tokenizer.cache_clear()


def make_task(**changes) -> IFEvalTask:
    settings = {"name": "ifeval", "batches": list, "level": "prompt", "criterion": "strict", "kinds": {}}
    return IFEvalTask(**settings | changes)


def item(*constraints: tuple[str, dict | None], id: str = "i1") -> Instruction:
    ids, kwargs = [name for name, _ in constraints], [given for _, given in constraints]
    extra = {"instruction_id_list": ids, "kwargs": kwargs}
    return Instruction(id=id, text="write to doctor lee", response="", task="", extra=extra)


@needs_lm_eval
def test_every_constraint_is_judged_as_by_hand(sentence_model):
    task = make_task(level="instruction")
    assert sorted(name for name, *_ in CASES) == sorted(task._registry)
    for name, given, kept, broken in CASES:
        nulls = dict.fromkeys(("keywords", "num_words", "letter"), None) | given  # published kwargs hold every key
        found = [task.item(item((name, nulls)), answer) for answer in (kept, broken, "  ")]
        assert found == [(100.0, 1.0), (0.0, 1.0), (0.0, 1.0)], name


@needs_lm_eval
def test_levels_and_criteria(sentence_model):
    no_comma, two_words = ("punctuation:no_comma", {}), ("length_constraints:number_words",
                                                         {"relation": "less than", "num_words": 3})  # fmt: skip
    items = [item(no_comma, two_words), item(no_comma), item(two_words)]
    answers = ["Sure, here:\nwell then", "a, b", "yes"]
    rollouts = [as_rollout(one, answer) for one, answer in zip(items, answers, strict=True)]
    expected = {
        "prompt, strict": 100 / 3,
        "instruction, strict": 100 / 4,
        "prompt, loose": 200 / 3,  # without its first line the first answer keeps both
        "instruction, loose": 300 / 4,
    }
    for own in expected:
        level, criterion = own.split(", ")
        scores = make_task(level=level, criterion=criterion).score(rollouts)
        mean = sum(expected.values()) / 4  # VoiceBench's "final"
        assert scores == pytest.approx(expected | {"score": expected[own], "mean of all four": mean})
        assert list(scores)[1] == own, "the task's own measure is the first"


@needs_lm_eval
def test_scores_are_those_of_lm_eval(sentence_model):
    from lm_eval.tasks.ifeval import utils

    task = make_task()
    rng = random.Random(0)
    for trial in range(60):
        chosen = rng.sample(CASES, k=3)
        example = item(*((name, given) for name, given, *_ in chosen))
        answer = rng.choice(["", "Sure!\n", "* "]) + rng.choice([text for case in chosen for text in case[2:]])
        doc = {"key": trial, "prompt": example.text, **example.extra}
        theirs = utils.process_results(doc, [answer])
        ours = task.statistics(example, answer)
        assert ours == {
            "prompt, strict": [100.0 * theirs["prompt_level_strict_acc"], 1.0],
            "instruction, strict": [100.0 * sum(theirs["inst_level_strict_acc"]), 3.0],
            "prompt, loose": [100.0 * theirs["prompt_level_loose_acc"], 1.0],
            "instruction, loose": [100.0 * sum(theirs["inst_level_loose_acc"]), 3.0],
            VOICEBENCH: ours[VOICEBENCH],
        }
        four = [ours[VOICEBENCH][at : at + 2] for at in range(0, 8, 2)]
        assert sorted(four) == sorted(ours[name] for name in list(ours)[:4])


@needs_lm_eval
def test_verifiers_that_draw_give_an_answer_the_same_score_every_time(sentence_model):
    task = make_task()
    hashes = {"letter": "#", "let_relation": "at least", "let_frequency": 2}
    examples = [item(("keywords:letter_frequency", hashes), id=f"i{n}") for n in range(20)]
    state = random.getstate()
    first, again = ([task.item(example, "see the tree") for example in examples] for _ in range(2))
    assert first == again
    assert len(set(first)) == 2, "items draw letters of their own"
    assert random.getstate() == state


@needs_lm_eval
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Instruction(id="i1", text="say yes", response="", task=""), "extra.instruction_id_list None"),
        (item(("punctuation:no_comma", {}), ("punctuation:no_dash", {})), r"asks for \['punctuation:no_dash'\]"),
        (item(("punctuation:no_comma", {"num_commas": 3})), "'num_commas': 3.* that their verifiers refuse"),
        (item(("combination:repeat_prompt", None)), "prompt_to_repeat must be set"),
    ],
)
def test_constraints_that_are_not_the_published_ones_are_refused(sentence_model, example, message):
    with pytest.raises(ValueError, match=message):
        make_task().item(example, "yes")


def test_what_is_missing_is_named_before_the_first_answer(monkeypatch):
    with pytest.raises(ValueError, match="level is 'word'"):
        make_task(level="word")
    monkeypatch.setattr(ifeval, "find_spec", lambda name: None if name != "nltk" else object())
    with pytest.raises(ImportError, match=r"lm_eval, langdetect, immutabledict: pip install 'lm_eval\[ifeval\]'"):
        make_task()


@needs_lm_eval
def test_a_missing_sentence_model_is_named_and_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: pytest.fail("asked for a download"))
    with pytest.raises(ValueError, match=r"punkt_tab.*python -m nltk.downloader punkt_tab.*NLTK_DATA"):
        make_task()
