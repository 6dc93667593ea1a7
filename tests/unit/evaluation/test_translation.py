# SPDX-License-Identifier: Apache-2.0
"""Corpus-level scores, their intervals and tests, beside sacrebleu's own on the same texts."""

import logging

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from nemo_rba.evaluation.measures import corpus_score, item_share, short_name
from nemo_rba.evaluation.statistics import Bootstrap, randomisation_test
from nemo_rba.evaluation.tasks import as_rollout
from nemo_rba.evaluation.translation import TranslationTask
from nemo_rba.types import Instruction

WORDS = [
    "der",
    "die",
    "Hund",
    "Katze",
    "läuft",
    "schläft",
    "im",
    "auf",
    "großen",
    "Haus",
    "Garten",
    ",",
    "gern",
    "nicht",
]
SETTINGS = {
    "name": "test",
    "batches": list,
    "target_language": "de",
    "tokenizer": None,
    "word_order": 2,
    "num_references": 1,
    "own": "bleu",
    "kinds": {},
}


def sentences(num: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(3, 15))).capitalize() + "." for _ in range(num)]


def garbled(texts: list[str], rate: float, seed: int) -> list[str]:
    """Words exchanged for others at ``rate``, and one sentence said as nothing."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < rate else word for word in text.split()) if i else ""
        for i, text in enumerate(texts)
    ]


def item(reference: str, *aliases: str) -> Instruction:
    return Instruction(id="i", text="the dog runs", response=reference, task="", aliases=aliases)


def statistics(task: TranslationTask, references: list[str], answers: list[str]) -> dict[str, np.ndarray]:
    found = [task.statistics(item(r), a) for r, a in zip(references, answers, strict=True)]
    return {short_name(name): np.array([numbers[name] for numbers in found]) for name in found[0]}


REFERENCES = sentences(40, 0)
GOOD, BAD = garbled(REFERENCES, 0.2, 1), garbled(REFERENCES, 0.3, 2)


@pytest.mark.parametrize(("language", "tokenizer"), [("de", "13a"), ("zh-CN", "zh"), ("ko", "char"), ("tha", "char")])
def test_scores_and_signatures_are_those_of_sacrebleu(language, tokenizer):
    task = TranslationTask(**SETTINGS | {"target_language": language})
    references = [text + "我们去。" for text in REFERENCES]
    answers = [text + "我去。" for text in GOOD]
    scores = task.score([as_rollout(item(r), a) for r, a in zip(references, answers, strict=True)])
    is_chinese = tokenizer == "zh"
    metrics = [BLEU(tokenize=tokenizer), CHRF(word_order=2), TER(normalized=is_chinese, asian_support=is_chinese)]
    expected = [metric.corpus_score(answers, [references]) for metric in metrics]
    assert scores == pytest.approx({"score": expected[0].score} | {score.name: score.score for score in expected})
    names = [f"{score.name}|{metric.get_signature()}" for score, metric in zip(expected, metrics, strict=True)]
    assert list(task.statistics(item("a"), "b")) == names


def test_references_are_the_response_and_its_aliases():
    task = TranslationTask(**SETTINGS | {"num_references": 2, "own": "chrf", "word_order": 0})
    others = garbled(REFERENCES[::-1], 0.0, 0)
    others[0] = "x"
    rollouts = [as_rollout(item(r, o), a) for r, o, a in zip(REFERENCES, others, GOOD, strict=True)]
    expected = CHRF().corpus_score(GOOD, [REFERENCES, others]).score
    assert task.score(rollouts)["score"] == task.score(rollouts)["chrF2"] == pytest.approx(expected)
    assert task.score(rollouts)["BLEU"] == pytest.approx(BLEU().corpus_score(GOOD, [REFERENCES, others]).score)
    assert "nrefs:2" in next(iter(task.statistics(item("a", "b"), "c")))
    with pytest.raises(ValueError, match=r"has references \['a'\].*expected 2, none empty"):
        task.statistics(item("a"), "c")
    with pytest.raises(ValueError, match="none empty"):
        task.statistics(item("a", " "), "c")


def test_an_interval_is_that_of_the_scores_of_resampled_texts():
    task = TranslationTask(**SETTINGS)
    found = statistics(task, REFERENCES[:12], GOOD[:12])
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=25)
    for name, metric in (("BLEU", BLEU()), ("chrF2++", CHRF(word_order=2)), ("TER", TER())):
        scores = []
        for row in counts:
            drawn = np.repeat(np.arange(12), row)
            answers, references = ([texts[i] for i in drawn] for texts in (GOOD, REFERENCES))
            scores.append(metric.corpus_score(answers, [references]).score)
        bootstrap = Bootstrap(clusters=range(12), num_draws=25, seed=3, corpus_score=corpus_score(name))
        interval = bootstrap.score(found[name])
        assert interval.value == pytest.approx(metric.corpus_score(GOOD[:12], [REFERENCES[:12]]).score)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_p_values_are_those_of_sacrebleus_randomisation_test():
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)
    metrics = {"BLEU": BLEU(), "CHRF": CHRF(word_order=2), "TER": TER()}
    test = PairedTest([("bad", BAD), ("good", GOOD)], metrics, [REFERENCES], test_type="ar", n_samples=300)
    expected = {name: results[1].p_value for name, results in test()[1].items() if name != "System"}
    task = TranslationTask(**SETTINGS)
    good, bad = (statistics(task, REFERENCES, texts) for texts in (GOOD, BAD))
    found = {
        name: randomisation_test(good[ours], bad[ours], num_draws=300, seed=12345, corpus_score=corpus_score(ours))
        for name, ours in (("BLEU", "BLEU"), ("chrF2++", "chrF2++"), ("TER", "TER"))
    }
    assert found["BLEU"] == pytest.approx(expected["BLEU"])
    assert found["chrF2++"] == pytest.approx(expected["chrF2++"])
    assert expected["TER"] <= found["TER"] <= expected["TER"] + 0.05, "whole edits repeat themselves: ties count here"
    assert 1 / 301 < found["BLEU"] < 0.5, "the texts are neither alike nor far apart"


def test_one_answer_by_itself_has_sacrebleus_sentence_score():
    numbers = TranslationTask(**SETTINGS).statistics(item("Der Hund läuft im Garten."), "Der Hund läuft.")
    metric = BLEU(effective_order=True)
    assert item_share(numbers) == (
        pytest.approx(metric.sentence_score("Der Hund läuft.", ["Der Hund läuft im Garten."]).score),
        1.0,
    )
    chrf = TranslationTask(**SETTINGS | {"own": "chrf"})
    assert chrf.item(item("Hund"), "Hund") == (100.0, 1.0)


def test_what_a_language_needs_is_named():
    try:
        import ipadic  # noqa: F401
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"'ja-mecab'.*pip install 'sacrebleu\[ja\]'.*task.tokenizer to char"):
            TranslationTask(**SETTINGS | {"target_language": "ja"})
    else:
        assert "tok:ja-mecab" in next(iter(TranslationTask(**SETTINGS | {"target_language": "ja"})._metrics))
    assert "tok:char" in next(
        iter(TranslationTask(**SETTINGS | {"target_language": "ja", "tokenizer": "char"})._metrics)
    )
    with pytest.raises(ValueError, match="target_language is 'German'"):
        TranslationTask(**SETTINGS | {"target_language": "German"})
    with pytest.raises(ValueError, match=r"tokenizer is '13b'.*expected one of"):
        TranslationTask(**SETTINGS | {"tokenizer": "13b"})
    with pytest.raises(ValueError, match="own is 'ter'"):
        TranslationTask(**SETTINGS | {"own": "ter"})
