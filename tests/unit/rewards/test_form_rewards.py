# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_rba.language import language_identifier
from nemo_rba.rewards.form import FormatReward, LanguageReward
from nemo_rba.types import Instruction, Rollout

CONF = Path(__file__).resolve().parents[3] / "conf" / "reward"
CANDIDATES = ["en", "de", "fr", "zh"]


def rollout(response: str, **extra) -> Rollout:
    return Rollout(
        prompt_index=0,
        instruction=Instruction(id="i1", text="say it", response="The cat sat.", task="open", extra=extra),
        response=response,
        token_ids=torch.ones(1, dtype=torch.int64),
        logprobs=None,
        truncated=False,
    )


def language(**changes) -> LanguageReward:
    return LanguageReward(**({"language": "en", "candidates": CANDIDATES, "min_bytes": 9} | changes))


def test_an_answer_is_in_the_language_asked_for_or_not():
    pytest.importorskip("py3langid")
    english, german, chinese = "Could you tell me a joke?", "Wie wird das Wetter morgen?", "今天天气很好"
    scores = language()([rollout(text) for text in (english, german, chinese)])
    assert scores.tolist() == [1.0, 0.0, 0.0]
    assert scores.dtype == torch.float32
    asked = [rollout(german, target_language="de"), rollout(english, target_language="de"),
             rollout(german, target_language="de_de"), rollout(chinese, target_language="zh-CN")]  # fmt: skip
    assert language()(asked).tolist() == [1.0, 0.0, 1.0, 1.0], "the instruction's own comes first"
    assert language(language="de", candidates=[])([rollout(german), rollout(english)]).tolist() == [1.0, 0.0]


def test_answers_that_are_too_short_to_tell_are_let_pass():
    pytest.importorskip("py3langid")
    short, long = rollout("wie gut"), rollout("wie gut es ist")  # 6 and 11 letters
    assert language()([short, long, rollout(""), rollout("12 + 13 = 25")]).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert language(min_bytes=12)([long]).tolist() == [1.0]
    assert language()([rollout("今天很")]).tolist() == [0.0], "three letters, nine bytes"


def test_languages_that_cannot_be_told_are_named(monkeypatch):
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=r"'i1' asks for language 'it', expected one of \['de', 'en', 'fr', 'zh'\]"):
        language()([rollout("ciao", target_language="it")])
    with pytest.raises(ValueError, match=r"does not know \['english'\]"):
        language(language="english", candidates=["english", "de"])([rollout("hello")])
    with pytest.raises(ValueError, match=r"hold language 'it' and others, or nothing, got \['en', 'de'"):
        language(language="it")
    with pytest.raises(ValueError, match="min_bytes must be 0 or more, got -1"):
        language(min_bytes=-1)
    language_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ImportError, match="pip install py3langid"):
        language()([rollout("what is your name")])


def scores(answers: list[str], **settings) -> list[float]:
    return FormatReward(**settings)([rollout(answer) for answer in answers]).tolist()


def test_a_pattern_matches_the_whole_answer_or_a_part_of_it():
    answers = ["Yes.", " no ", "yes, I think", "I say yes", ""]
    assert scores(answers, form="whole", pattern=r"(?i)(yes|no)\.?") == [1, 1, 0, 0, 0]
    assert scores(answers, form="part", pattern=r"(?i)\b(yes|no)\b") == [1, 1, 1, 1, 0]
    assert scores(["a\nb", "a b"], form="whole", pattern="a.b") == [0, 1]
    assert scores(["a\nb"], form="whole", pattern="(?s)a.b") == [1]


def test_json_is_one_value_and_nothing_else():
    answers = ['{"city": "Paris"}', " [1, 2]\n", "3", '"word"', "{'city': 1}", 'Here: {"a": 1}', "{} {}", "NaN", "",
               "[" * 100_000]  # fmt: skip
    assert scores(answers, form="json", pattern="") == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "yaml", "pattern": "a"}, r"form must be one of \('whole', 'part', 'json'\), got 'yaml'"),
        ({"form": "whole", "pattern": ""}, "pattern is '' with form 'whole'; expected a regular expression"),
        ({"form": "json", "pattern": "a"}, "pattern is 'a' with form 'json'"),
        ({"form": "part", "pattern": "(a"}, r"pattern '\(a' is no regular expression: missing \)"),
        ({"form": "part", "pattern": "a*"}, "is found in every answer"),
    ],
)
def test_forms_that_cannot_be_checked_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FormatReward(**settings)


def test_the_recipes_weigh_form_beside_what_is_said():
    pytest.importorskip("py3langid")
    reward = instantiate(OmegaConf.load(CONF / "language.yaml"))
    total, parts = reward.score([rollout("The cat sat."), rollout("Die Katze sitzt auf dem Tisch.")])
    assert parts["language"].tolist() == [1.0, 0.0]
    assert total[0] == 1.5
    cfg = OmegaConf.load(CONF / "format.yaml")
    assert OmegaConf.missing_keys(cfg) == {"parts.format.form", "parts.format.pattern"}
    cfg.parts.format.update({"form": "part", "pattern": "(?i)cat"})
    assert instantiate(cfg)([rollout("The cat sat.")]).tolist() == [1.5]
