# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchmetrics.functional.text import char_error_rate, word_error_rate
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from nemo_rba.evaluation.tasks import InstructionFollowingTask, TranscriptionTask, word_errors
from nemo_rba.rewards.text import normalize
from nemo_rba.types import Instruction, Rollout


def rollout(response: str, *, text: str = "say yes", task: str = "yes") -> Rollout:
    return Rollout(
        prompt_index=0,
        instruction=Instruction(id="i", text=text, response="yes", task=task),
        response=response,
        token_ids=torch.tensor([1]),
        logprobs=None,
        truncated=False,
    )


def verify(text: str, response: str) -> float:
    return {"yes": 1.0, "half": 0.5, "no": 0.0, "bad": 1.5}[response]


def make_task(**changes) -> InstructionFollowingTask:
    settings = {"name": "test", "batches": list, "verify": verify, "kinds": {"yes": "closed", "open": "open"}}
    return InstructionFollowingTask(**settings | changes)


def test_scores_in_total_by_family_and_by_kind():
    rollouts = [rollout("yes"), rollout("half"), rollout("no", task="open"), rollout("half", task="open")]
    assert make_task().score(rollouts) == {
        "score": 50.0,
        "score/yes": 75.0,
        "score/open": 25.0,
        "score/closed": 75.0,
    }
    assert make_task(kinds={}).score(rollouts[:2]) == {"score": 75.0, "score/yes": 75.0}


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"'riddle', which has no kind.*task\.kinds"):
        make_task().kind(rollout("yes", task="riddle").instruction)
    with pytest.raises(ValueError, match=r"verify gave 1\.5 for 'bad'"):
        make_task().score([rollout("bad")])
    with pytest.raises(ValueError, match="no rollouts"):
        make_task().score([])


def test_word_errors_are_corpus_level_and_forgive_form():
    assert word_errors("The cat, sat down.", "the cat sat sat down") == (1, 4)
    assert word_errors("a b c d", "") == (4, 4)
    with pytest.raises(ValueError, match="reference with words"):
        word_errors("?!", "a")


SPOKEN = [
    ("Mr. Smith doesn't owe twenty-five dollars.", "mister smith does not owe $25"),
    ("The colour of the centre, um, is grey", "the color of a center is gray"),
    ("one two three four five six seven eight", "one too three"),
    ("Ça coûte cher [laughs]!", "ca coûte cher"),
    ("yes", ""),
]


@pytest.mark.parametrize("normalizer", [normalize, EnglishTextNormalizer(), BasicTextNormalizer()])
def test_error_rates_are_those_of_the_normalised_texts(normalizer):
    task = TranscriptionTask(name="wer", batches=list, normalizer=normalizer)
    scores = task.score([rollout(answer, text=text) for text, answer in SPOKEN])
    plain = [[" ".join(normalizer(text).split()) for text in pair] for pair in SPOKEN]
    answers, texts = [answer for _, answer in plain], [text for text, _ in plain]
    assert scores["wer"] == scores["WER"] == pytest.approx(100 * float(word_error_rate(answers, texts)), rel=1e-5)
    assert scores["CER"] == pytest.approx(100 * float(char_error_rate(answers, texts)), rel=1e-5)


def test_whispers_normaliser_forgives_what_the_plain_one_does_not():
    tasks = {
        kind.__name__: TranscriptionTask(name="wer", batches=list, normalizer=kind if kind is normalize else kind())
        for kind in (normalize, EnglishTextNormalizer, BasicTextNormalizer)
    }
    text, answer = SPOKEN[0]
    found = {kind: task.item(rollout("", text=text).instruction, answer) for kind, task in tasks.items()}
    assert found["EnglishTextNormalizer"] == (0.0, 6.0), "mister smith does not owe $25"
    assert found["normalize"] == (100.0 * 6, 8.0), "all but smith and owe"
    names = [list(task.statistics(rollout("a").instruction, "a"))[1] for task in tasks.values()]
    assert names == [f"CER|normalizer:{kind}" for kind in tasks]


def test_a_reference_without_words_counts_what_was_inserted():
    task = TranscriptionTask(name="wer", batches=list, normalizer=EnglishTextNormalizer())
    rollouts = [rollout("a b", text="[noise]"), rollout("c d e f", text="c d e f")]
    assert task.item(rollouts[0].instruction, "a b") == (200.0, 0.0)
    assert task.score(rollouts)["wer"] == 50.0


def test_characters_are_words_where_words_are_not_spaced():
    task = TranscriptionTask(name="wer", batches=list, normalizer=BasicTextNormalizer(split_letters=True))
    scores = task.score([rollout("今天天气好", text="今天天气很好。")])
    assert scores["WER"] == pytest.approx(100 / 6)
