# SPDX-License-Identifier: Apache-2.0
"""COMET beside BLEU: the whole way to another Python and back, with a package that has comet's interface and scores by
shared words; and with comet itself, on random checkpoints made here, where ``COMET_PYTHON`` names a Python that has it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

from nemo_rba.evaluation.measures import corpus_score, short_name
from nemo_rba.evaluation.results import compare
from nemo_rba.evaluation.runner import run
from nemo_rba.evaluation.statistics import randomisation_test
from nemo_rba.evaluation.tasks import Batched, SeveralMeasures, as_rollout
from nemo_rba.evaluation.translation_comet import Comet, CometTranslationTask
from nemo_rba.types import Instruction, SpeechBatch

# As comet 2.2.7: what we call and what it gives. The score is the share of the other text's words that the answer has.
PACKAGE = """
import json, os
__version__ = "2.2.7"

class Model:
    def __init__(self, folder):
        self.folder = folder
        self.hparams = json.load(open(os.path.join(folder, "hparams.yaml")))

    def requires_references(self):
        return self.hparams["class_identifier"] == "regression_metric"

    def predict(self, samples, batch_size=16, gpus=1, devices=None, mc_dropout=0, progress_bar=True,
                accelerator="auto", num_workers=None, length_batching=True):
        print("a library that prints")
        if any(sample["mt"] == "die" for sample in samples):
            os._exit(7)
        with open(os.path.join(self.folder, "calls.jsonl"), "a") as file:
            print(json.dumps([samples, batch_size, gpus]), file=file)
        return {"scores": [self.score(sample) for sample in samples], "system_score": 0.5}

    def score(self, sample):
        if sample["mt"] == "nan":
            return float("nan")
        if sample["mt"] == "raise":
            raise IndexError("index out of range in self")
        other = sample["ref" if self.requires_references() or "input_segments" in self.hparams else "src"].split()
        return sum(word in sample["mt"].split() for word in other) / len(other)

def load_from_checkpoint(checkpoint_path, reload_hparams=False, strict=False, local_files_only=False):
    assert local_files_only
    folder = os.path.dirname(os.path.dirname(checkpoint_path))
    if open(checkpoint_path).read() == "broken":
        raise OSError("xlm-roberta-large is not there")
    return Model(folder)
"""
ITEMS = [
    Instruction(id="0", text="the dog runs", response="der Hund läuft", task="", context="Into German:"),
    Instruction(id="1", text="five kilograms", typed="5 kg", response="5 kg", aliases=("fünf Kilo",), task=""),
    Instruction(id="2", text="the cat sleeps now", response="die Katze schläft jetzt", task=""),
]
GOOD, BAD = ["der Hund rennt", "5 kg", "die Katze schläft"], ["ein Hund", "", "die Katze"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "packages" / "comet").mkdir(parents=True)
    (tmp_path / "packages" / "comet" / "__init__.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SLURM_NTASKS", "8")
    return tmp_path / "packages" / "comet" / "__init__.py"


def checkpoint(folder, content="weights", **hparams):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "model.ckpt").write_text(content)
    (folder / "hparams.yaml").write_text(json.dumps({"class_identifier": "regression_metric"} | hparams))
    return folder


def make_comet(folder, **changes) -> Comet:
    settings = {"python": sys.executable, "checkpoint": str(folder), "device": "cpu", "batch_size": 4, "memory": ""}
    return Comet(**settings | changes)


def make_task(comet, **changes) -> CometTranslationTask:
    settings = {"name": "test", "batches": list, "target_language": "de", "tokenizer": None, "word_order": 2,
                "num_references": 1, "own": "bleu", "kinds": {}}  # fmt: skip
    return CometTranslationTask(comet=comet, **settings | changes)


def calls(folder) -> list:
    """What the model was asked after the probe: samples, batch size, GPUs."""
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()][1:]


def single(items):
    """Items with one reference each."""
    return [Instruction(id=i.id, text=i.text, typed=i.typed, response=i.response, task="") for i in items]


def test_comet_is_a_mean_of_items_beside_the_others_and_names_its_checkpoint(package, tmp_path):
    folder = checkpoint(tmp_path / "models--Unbabel--tiny" / "snapshots" / "0a1b")
    task = make_task(make_comet(folder))
    assert isinstance(task, Batched)
    assert isinstance(task, SeveralMeasures)
    scores = task.score([as_rollout(item, answer) for item, answer in zip(single(ITEMS), GOOD, strict=True)])
    assert list(scores) == ["score", "BLEU", "chrF2++", "TER", "COMET"]
    assert scores["COMET"] == pytest.approx(100 * (2 / 3 + 1 + 3 / 4) / 3)
    assert scores["score"] == scores["BLEU"]
    name = list(task.statistics(single(ITEMS)[0], GOOD[0]))[-1]
    digest = "9a129038d9a0"  # printf weights | sha256sum
    assert name == f"COMET|model:Unbabel/tiny|sha256:{digest}|nrefs:1|version:2.2.7"


def test_the_model_sees_the_words_the_answer_and_the_first_reference(package, tmp_path):
    folder = checkpoint(tmp_path / "tiny")
    make_comet(folder)(list(zip(ITEMS, GOOD, strict=True)))
    samples = [
        {"src": "the dog runs", "mt": "der Hund rennt", "ref": "der Hund läuft"},
        {"src": "5 kg", "mt": "5 kg", "ref": "5 kg"},
        {"src": "the cat sleeps now", "mt": "die Katze schläft", "ref": "die Katze schläft jetzt"},
    ]
    assert calls(folder) == [[samples, 4, 0]]


@pytest.mark.parametrize(
    ("hparams", "name", "score"),
    [
        ({"class_identifier": "referenceless_regression_metric"}, "COMET-QE", 0.5),
        ({"class_identifier": "unified_metric", "input_segments": ["mt", "src", "ref"]}, "COMET", 1.0),
    ],
)
def test_the_class_of_a_checkpoint_says_whether_it_reads_the_reference(package, tmp_path, hparams, name, score):
    comet = make_comet(checkpoint(tmp_path / "tiny", **hparams))
    item = Instruction(id="0", text="hi there", response="hallo hi", task="")
    assert comet([(item, "hallo hi")]) == [score]
    assert short_name(comet.measure) == name
    assert [set(sample) for sample in calls(tmp_path / "tiny")[0][0]] == [
        {"src", "mt", "ref"} if name == "COMET" else {"src", "mt"}
    ]
    assert f"nrefs:{int(name == 'COMET')}" in comet.measure


def test_a_score_is_paid_for_once_and_belongs_to_its_checkpoint(package, tmp_path):
    folder, memory = checkpoint(tmp_path / "tiny"), str(tmp_path / "comet.jsonl")
    answers = list(zip(ITEMS, GOOD, strict=True))
    scores = make_comet(folder, memory=memory)([*answers, answers[0]])
    assert scores == pytest.approx([2 / 3, 1, 3 / 4, 2 / 3])
    assert [len(samples) for samples, _, _ in calls(folder)] == [3], "the same answer twice"
    again = make_comet(folder, memory=memory)
    assert again([*answers, (ITEMS[0], "Hund")]) == pytest.approx([2 / 3, 1, 3 / 4, 1 / 3])
    assert [len(samples) for samples, _, _ in calls(folder)] == [3, 1]
    other = make_comet(checkpoint(tmp_path / "other", "other weights"), memory=memory)
    with pytest.raises(ValueError, match=r"belongs to .*expected .*name another file"):
        other(answers)


class Translator:
    def __init__(self, name: str, answers: list[str]):
        self.name, self.decoding = name, {}
        self._answers = {item.id: answer for item, answer in zip(ITEMS, answers, strict=True)}

    def answer(self, batch: SpeechBatch):
        rollouts = [as_rollout(item, self._answers[item.id]) for item in batch.instructions]
        return [replace(rollout, prompt_index=row) for row, rollout in enumerate(rollouts)]


def one_batch() -> list[SpeechBatch]:
    nothing = torch.zeros(len(ITEMS), 0)
    lens = torch.zeros(len(ITEMS), dtype=torch.int64)
    return [SpeechBatch(instructions=tuple(single(ITEMS)), audio=nothing, audio_lens=lens, prompt_ids=nothing,
                        prompt_lens=lens, response_ids=nothing, response_lens=lens)]  # fmt: skip


def test_systems_are_compared_by_comet_and_a_batch_is_scored_at_once(package, tmp_path):
    folder = checkpoint(tmp_path / "tiny")
    task = make_task(make_comet(folder), own="comet", batches=one_batch)
    found = [p for name, said in (("good", GOOD), ("bad", BAD)) for p in run(Translator(name, said), task, tmp_path)]
    assert [len(samples) for samples, _, _ in calls(folder)] == [3, 3]
    assert [p.value for p in found] == pytest.approx([200 / 3, 100, 75, 100 / 3, 0, 50])
    difference = compare(found, ["good"], ["bad"], num_draws=200, seed=1)["test"]["COMET"]
    assert difference.value == pytest.approx((200 / 3 + 100 + 75 - 100 / 3 - 0 - 50) / 3)
    good, bad = (np.array([[p.value, 1] for p in found if p.system == name]) for name in ("good", "bad"))
    expected = randomisation_test(good, bad, num_draws=200, seed=1, corpus_score=corpus_score("COMET"))
    assert difference.p_value == pytest.approx(expected)
    assert difference.low < difference.value < difference.high


def test_what_is_missing_is_named(package, tmp_path):
    folder = checkpoint(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"task.comet.python is 'nowhere/python', which does not start"):
        make_comet(folder, python="nowhere/python")
    with pytest.raises(ValueError, match=r"nowhere', where there are 0 checkpoints.*hparams.yaml"):
        make_comet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_comet(folder, batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device is 'cuda'.*no GPU"):
            make_comet(folder, device="cuda")
    with pytest.raises(ValueError, match=r"xlm-roberta-large is not there.*transformers below 5"):
        make_comet(checkpoint(tmp_path / "broken", "broken"))
    with pytest.raises(ValueError, match=r"own is 'ter'.*bleu, chrf, comet"):
        make_task(make_comet(folder), own="ter")
    package.write_text("import a_package_that_is_not_there")
    with pytest.raises(ImportError, match=r"has no working comet \(No module named.*pip install unbabel-comet==2.2.7"):
        make_comet(folder, batch_size=5)


def test_what_goes_wrong_while_scoring_is_said(package, tmp_path):
    comet = make_comet(checkpoint(tmp_path / "tiny"))
    with pytest.raises(ValueError, match=r"COMET gave nan for .*'mt': 'nan'"):
        comet([(ITEMS[0], "nan")])
    with pytest.raises(RuntimeError, match="could not score 1 answers: IndexError: index out of range"):
        comet([(ITEMS[0], "raise")])
    assert comet([(ITEMS[0], "der Hund läuft")]) == [1.0], "it goes on"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"process has ended with 7; it last said: .*a library that prints"):
            comet([(ITEMS[0], "die")])


# Makes a random checkpoint of each class, as training with comet leaves it, and prints comet's own scores of samples.
BUILD = """
import json, string, sys
from pathlib import Path
import torch
import pytorch_lightning
from comet.models import load_from_checkpoint, str2model
from pytorch_lightning.core.saving import save_hparams_to_yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

root, samples = Path(sys.argv[1]), json.loads(sys.argv[2])
pieces = ["<s>", "<pad>", "</s>", "<unk>", "\\u2581", *string.ascii_letters, *"äöüß.,?!", "<mask>"]
tokenizer = Tokenizer(models.Unigram([(piece, -3.0) for piece in pieces], unk_id=3))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
)
encoder = str(root / "encoder")
XLMRobertaTokenizerFast(tokenizer_object=tokenizer).save_pretrained(encoder)
XLMRobertaConfig(
    vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2,
).save_pretrained(encoder)
scores = {}
for kind, more in json.loads(sys.argv[3]).items():
    torch.manual_seed(0)
    model = str2model[kind](pretrained_model=encoder, load_pretrained_weights=False, hidden_sizes=[8], **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    file = root / kind / "checkpoints" / "model.ckpt"
    file.parent.mkdir(parents=True)
    trainer.save_checkpoint(file)
    save_hparams_to_yaml(root / kind / "hparams.yaml", model.hparams)
    loaded = load_from_checkpoint(str(file), local_files_only=True)
    scores[kind] = loaded.predict(samples, batch_size=2, gpus=0, progress_bar=False)["scores"]
(root / "scores.json").write_text(json.dumps(scores))
"""
KINDS = {
    "regression_metric": {},
    "referenceless_regression_metric": {},
    "unified_metric": {"input_segments": ["mt", "src", "ref"]},
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folder of real checkpoints, the Python that made them, and comet's own scores of GOOD."""
    python = os.environ.get("COMET_PYTHON", sys.executable)
    if python == sys.executable:
        try:
            too_new = int(version("transformers").split(".")[0]) >= 5
            reason = "comet needs transformers 4" if too_new else "" if version("unbabel-comet") else "-"
        except PackageNotFoundError as error:
            reason = str(error)
        if reason:
            pytest.skip(f"{reason}: name a Python that has unbabel-comet in COMET_PYTHON")
    folder = tmp_path_factory.mktemp("comet")
    samples = [
        {"src": item.typed or item.text, "mt": answer, "ref": item.response}
        for item, answer in zip(ITEMS, BAD, strict=True)
    ]
    subprocess.run([python, "-c", BUILD, str(folder), json.dumps(samples), json.dumps(KINDS)], check=True)
    return folder, python, json.loads((folder / "scores.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_comets_own_predict(real, kind):
    folder, python, expected = real
    comet = make_comet(folder / kind, python=python, batch_size=2)
    scores = comet(list(zip(ITEMS, BAD, strict=True)))
    assert len(set(scores)) == 3, "the checkpoint tells answers apart"
    assert scores == pytest.approx(expected[kind], abs=1e-6)
    assert comet.takes_reference == (kind != "referenceless_regression_metric")
    task = make_task(comet, own="comet")
    rollouts = [as_rollout(item, answer) for item, answer in zip(single(ITEMS), BAD, strict=True)]
    assert task.score(rollouts)["score"] == pytest.approx(100 * np.mean(expected[kind]), abs=1e-4)
