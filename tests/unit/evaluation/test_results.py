# SPDX-License-Identifier: Apache-2.0
"""Tasks with several measures, from answers on disk to conditions and comparisons."""

import json
from dataclasses import replace

import numpy as np
import pytest
import synthetic_study as synthetic
import torch
from sacrebleu.metrics import BLEU, CHRF, TER

from nemo_rba.evaluation.answers import MultipleChoiceTask
from nemo_rba.evaluation.results import Roles, compare, summarise
from nemo_rba.evaluation.runner import Prediction, run
from nemo_rba.evaluation.statistics import randomisation_test
from nemo_rba.evaluation.translation import TranslationTask
from nemo_rba.types import Instruction, Rollout, SpeechBatch

REFERENCES = [f"Wir fahren am {n}. Mai mit {n} Kindern nach Hause, aber nicht heute." for n in range(12)]
RATES = {"teacher": 0.02, "start": 0.5, "rba-0": 0.1, "rba-1": 0.15, "sft": 0.3}
ROLES = Roles(
    systems={"teacher": "T", "start": "S0", "rba-0": "RBA", "rba-1": "RBA", "sft": "SFT"},
    teacher="T",
    start="S0",
    arms=["RBA", "SFT"],
)


class Translator:
    """Leaves words out at a rate of its own; may be asked only ``patience`` times."""

    decoding: dict = {}  # noqa: RUF012

    def __init__(self, name: str, patience: int = 99):
        self.name = name
        self.patience = patience

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        self.patience -= 1
        assert self.patience >= 0, "asked again"
        return [
            Rollout(
                prompt_index=row,
                instruction=item,
                response=said(self.name, item),
                token_ids=torch.tensor([1]),
                logprobs=None,
                truncated=False,
            )
            for row, item in enumerate(batch.instructions)
        ]


def said(name: str, item: Instruction) -> str:
    rng = np.random.default_rng([list(RATES).index(name), int(item.id)])
    return " ".join(word for word in item.response.split() if rng.random() > RATES[name])


def batch() -> SpeechBatch:
    size = len(REFERENCES)
    return SpeechBatch(
        instructions=tuple(
            Instruction(id=str(n), text=f"say {n}", response=text, task="even" if n % 2 == 0 else "odd")
            for n, text in enumerate(REFERENCES)
        ),
        audio=torch.zeros(size, 8),
        audio_lens=torch.full((size,), 8),
        prompt_ids=torch.zeros(size, 2, dtype=torch.int64),
        prompt_lens=torch.full((size,), 2),
        response_ids=torch.zeros(size, 1, dtype=torch.int64),
        response_lens=torch.ones(size, dtype=torch.int64),
    )


def translation_task(**changes) -> TranslationTask:
    settings = {
        "name": "en-de",
        "batches": lambda: [batch()],
        "target_language": "de",
        "tokenizer": None,
        "word_order": 0,
        "num_references": 1,
        "own": "bleu",
        "kinds": {},
    }
    return TranslationTask(**settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation")
    for name in RATES:
        run(Translator(name), translation_task(), path)
    return path


@pytest.fixture(scope="module")
def predictions(folder):
    """Read from the files alone."""
    lines = [line for name in RATES for line in (folder / "en-de" / f"{name}.jsonl").read_text().splitlines()[1:]]
    return [Prediction(**json.loads(line)) for line in lines]


def corpus(metric, name: str, *, step: int = 1) -> float:
    answers = [said(name, item) for item in batch().instructions[::step]]
    return metric.corpus_score(answers, [REFERENCES[::step]]).score


def test_a_condition_has_the_corpus_scores_of_all_measures(predictions):
    (condition,) = summarise(predictions, ROLES, num_draws=60, seed=0)
    assert (condition.measure, condition.quantity, list(condition.others)) == ("score", "BLEU", ["chrF2", "TER"])
    assert condition.signatures["BLEU"] == str(_scored(BLEU()).get_signature())
    slices = {"BLEU": condition.whole, **condition.others}
    for quantity, metric in (("BLEU", BLEU()), ("chrF2", CHRF()), ("TER", TER())):
        scores = slices[quantity].scores
        assert scores["S0"].value == pytest.approx(corpus(metric, "start"))
        seeds = [corpus(metric, "rba-0"), corpus(metric, "rba-1")]
        assert slices[quantity].seeds["RBA"] == pytest.approx(seeds)
        assert scores["RBA"].value == pytest.approx(np.mean(seeds)), "the mean of the seeds' scores"
        difference = slices[quantity].differences["SFT"]
        assert difference.value == pytest.approx(np.mean(seeds) - corpus(metric, "sft"))
        assert 0 < difference.p_value <= 1
        assert scores["RBA"].low <= scores["RBA"].value <= scores["RBA"].high
    start, teacher, sft = (corpus(BLEU(), name) for name in ("start", "teacher", "sft"))
    assert condition.whole.gap_closed["SFT"].value == pytest.approx(100 * (sft - start) / (teacher - start))
    assert condition.others["TER"].gap_closed == {}
    even = condition.families["even"].scores["SFT"].value
    assert even == pytest.approx(corpus(BLEU(), "sft", step=2))


def _scored(metric):
    metric.corpus_score(["a"], [["a"]])
    return metric


def test_any_two_systems_are_compared(predictions):
    found = compare(predictions, ["rba-0", "rba-1"], ["start"], num_draws=200, seed=1)
    assert {task: list(measures) for task, measures in found.items()} == {"en-de": ["BLEU", "chrF2", "TER"]}
    ter = found["en-de"]["TER"]
    expected = np.mean([corpus(TER(), "rba-0"), corpus(TER(), "rba-1")]) - corpus(TER(), "start")
    assert ter.value == pytest.approx(expected)
    assert ter.value < 0, "fewer edits"
    assert ter.p_value == 1 / 201
    some = sorted(synthetic.make_predictions(50), key=lambda p: p.id)
    plain = compare(some, ["rba-0"], ["cascade"], num_draws=200, seed=1)
    both = [
        np.array([[p.value, p.weight] for p in some if (p.system, p.task) == (name, "seen voices")])
        for name in ("rba-0", "cascade")
    ]
    assert plain["seen voices"][""].p_value == randomisation_test(*both, num_draws=200, seed=1)
    assert compare(some[::-1], ["rba-0"], ["cascade"], num_draws=200, seed=1) == plain, "whatever the order of asking"
    with pytest.raises(ValueError, match="'ghost' answered other items"):
        compare(predictions, ["start"], ["ghost"], num_draws=9, seed=0)


def test_answers_are_measured_anew_without_being_asked_for_anew(folder, predictions):
    task = translation_task(own="chrf", word_order=2)
    again = [p for name in RATES for p in run(Translator(name, patience=0), task, folder)]
    assert [p.response for p in again] == [p.response for p in predictions]
    (condition,) = summarise(again, ROLES, num_draws=20, seed=0)
    assert (condition.quantity, list(condition.others)) == ("chrF2++", ["BLEU", "TER"])
    assert condition.whole.scores["S0"].value == pytest.approx(corpus(CHRF(word_order=2), "start"))
    with pytest.raises(ValueError, match="scored by different measures"):
        summarise(again[:12] + predictions[12:], ROLES, num_draws=20, seed=0)


def test_a_file_of_before_is_read_and_has_one_measure(folder, tmp_path):
    old = [json.loads(line) for line in (folder / "en-de" / "start.jsonl").read_text().splitlines()]
    for record in old[1:]:
        del record["statistics"]
    (tmp_path / "en-de").mkdir()
    (tmp_path / "en-de" / "start.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    again = run(Translator("start", patience=0), translation_task(), tmp_path)
    assert {name.split("|")[0] for name in again[0].statistics} == {"BLEU", "chrF2", "TER"}
    whole = summarise(synthetic.make_predictions(30), synthetic.ROLES, num_draws=20, seed=0)[0]
    assert (whole.quantity, whole.signatures, whole.others) == ("", {}, {})


def test_what_was_not_readable_stands_beside_the_score(tmp_path):
    def asked() -> list[SpeechBatch]:
        options = {"options": ["red", "blue"]}
        items = [replace(item, response="A", extra=options) for item in batch().instructions]
        return [replace(batch(), instructions=tuple(items))]

    task = MultipleChoiceTask(name="colours", batches=asked, kinds={})
    predictions = []
    for name, answer in (("teacher", "A"), ("start", "no idea"), ("sft", "blue")):
        system = Translator("start")
        system.name = name
        system.answer = lambda batch, answer=answer: [
            replace(rollout, response=answer) for rollout in Translator("start").answer(batch)
        ]
        predictions += run(system, task, tmp_path)
    roles = Roles(systems={"teacher": "T", "start": "S0", "sft": "SFT"}, teacher="T", start="S0", arms=["SFT"])
    (condition,) = summarise(predictions, roles, num_draws=20, seed=0)
    assert {label: score.value for label, score in condition.whole.scores.items()} == {
        "T": 100.0,
        "S0": 0.0,
        "SFT": 0.0,
    }
    unparsable = condition.others["unparsable"].scores
    assert {label: score.value for label, score in unparsable.items()} == {"T": 0.0, "S0": 100.0, "SFT": 0.0}
