# SPDX-License-Identifier: Apache-2.0
"""The evaluation command on answers that are there already: same numbers, no model, no sound."""

import json
from pathlib import Path

import pytest
import rba_evaluate
import recipe_evaluation
import torch
from hydra import compose, initialize_config_dir
from lhotse import MonoCut
from omegaconf import DictConfig, OmegaConf

from nemo_rba.evaluation.judged import RewardTask
from nemo_rba.evaluation.results import summarise
from nemo_rba.evaluation.runner import Prediction, run
from nemo_rba.manifest import cut_to_instruction, read_manifest, write_shar
from nemo_rba.types import Instruction, Rollout, SpeechBatch, Utterance

CONF = Path(__file__).parents[3] / "conf"
WORDS = ["red", "green", "blue", "black", "white"]


@pytest.fixture
def manifest(tmp_path) -> Path:
    spoken = [
        Utterance(
            instruction=Instruction(id=f"id-{word}", text=f"say {word}", response=f"{word} it is", task="say"),
            audio=torch.zeros(1600), sampling_rate=16000, speaker=f"voice of {word}",
        )
        for word in WORDS
    ]  # fmt: skip
    write_shar(spoken, tmp_path / "words", shard_size=10, audio_format="flac", teacher="t")
    return tmp_path / "words"


def config(manifest: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(
            "rba_eval",
            overrides=["aligned=nowhere/rba.nemo", "evaluation=agreement", "saved=true", "evaluation.num_draws=50",
                       f"output={manifest.parent}", f"manifest={manifest}",
                       f"tasks={{read: {{manifest: {manifest}, typed: true}}}}", *overrides],
        )  # fmt: skip


class System:
    decoding: dict = {"max_new_tokens": 4, "transcribe_params": {"temperature": 0.0}}  # noqa: RUF012

    def __init__(self, name: str):
        self.name = name

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=row, instruction=item, response=item.response[: len(self.name) - row],
                token_ids=torch.tensor([1]), logprobs=None, truncated=False,
            )
            for row, item in enumerate(batch.instructions)
        ]  # fmt: skip


def evaluated(cfg: DictConfig, manifest: Path, *, without: str = "") -> list[Prediction]:
    """What the ordinary command leaves, answered by nobody real."""
    items = [cut_to_instruction(cut) for cut in read_manifest(manifest) if cut.id != without]
    empty = torch.zeros(len(items), 0)
    lengths = torch.zeros(len(items), dtype=torch.int64)
    batch = SpeechBatch(
        instructions=tuple(items), audio=empty, audio_lens=lengths, prompt_ids=empty.long(), prompt_lens=lengths,
        response_ids=empty.long(), response_lens=lengths,
    )  # fmt: skip
    sets = rba_evaluate.held_out_sets(cfg)
    tasks = [recipe_evaluation.make_task(cfg, name, one, lambda: [batch]) for name, one in sets.items()]
    return [
        prediction
        for name in (*rba_evaluate.OTHERS, "rba")
        for task in tasks
        if recipe_evaluation.is_asked(name, sets[task.name])
        for prediction in run(System(name), task, cfg.output, sets[task.name].way, sets[task.name].speakers())
    ]


def test_scores_are_those_of_the_ordinary_run_without_a_sound(manifest, monkeypatch):
    cfg = config(manifest)
    expected = evaluated(cfg, manifest)
    monkeypatch.setattr(MonoCut, "load_audio", lambda *_, **__: pytest.fail("a sound was decoded"))
    monkeypatch.setattr(recipe_evaluation.RBASpeechLM, "restore_from", lambda *_, **__: pytest.fail("a model"))
    monkeypatch.setattr(rba_evaluate.recipe, "start", lambda *_: pytest.fail("processes were started"))
    sets = rba_evaluate.held_out_sets(cfg)
    predictions, told = rba_evaluate.saved_predictions(cfg, sets, ["rba"], manifest.parent)
    assert predictions == expected
    assert len(predictions) == len(WORDS) * 7, "the cascade does not read"
    assert {p.speaker for p in predictions if p.task == "words"} == {f"voice of {word}" for word in WORDS}
    assert {p.speaker for p in predictions if p.task == "read"} == {""}, "nobody is heard"
    roles = recipe_evaluation.roles(cfg, ["rba"])
    assert summarise(predictions, roles, num_draws=50, seed=1) == summarise(expected, roles, num_draws=50, seed=1)
    assert told["decoding"] == "max_new_tokens 4"
    assert told["decoding of the cascade's transcript"] == "temperature 0.0"
    recipe_evaluation.report(cfg, predictions, sets, ["rba"], manifest.parent, {"curves": None, "budget": {}}, told)
    results = json.loads((manifest.parent / "results.json").read_text())
    assert "scored anew" in results["identity"]["answers"]
    assert results["identity"]["decoding"] == "max_new_tokens 4", "the saved one, not the config's"
    assert "accounts" not in results
    assert (manifest.parent / "samples.html").exists()


def test_answers_that_were_heard_are_not_called_read(manifest):
    evaluated(config(manifest), manifest)
    cfg = config(manifest, "tasks.read.typed=false")
    with pytest.raises(
        ValueError, match=r"'typed': True.*'read' is .*'typed': False.* now: name the condition as it was"
    ):
        rba_evaluate.saved_predictions(cfg, rba_evaluate.held_out_sets(cfg), ["rba"], manifest.parent)


def test_items_without_an_answer_are_counted_and_refused(manifest):
    cfg = config(manifest)
    evaluated(cfg, manifest)
    for name, kept in (("rba", 3), ("teacher", 0)):
        path = manifest.parent / "words" / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: 1 + kept]))
    (manifest.parent / "read" / "start.jsonl").unlink()
    with pytest.raises(ValueError, match="Run without saved=true") as refused:
        rba_evaluate.saved_predictions(cfg, rba_evaluate.held_out_sets(cfg), ["rba"], manifest.parent)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  - ")]
    assert lines == [
        "  - read: 5 of 5 answers of start",
        "  - words: 5 of 5 answers of teacher",
        "  - words: 2 of 5 answers of rba",
    ]


def test_what_the_run_had_set_aside_is_left_out_unless_somebody_answered_it(manifest):
    cfg = config(manifest)
    expected = evaluated(cfg, manifest, without="id-blue")
    sets = rba_evaluate.held_out_sets(cfg)
    with pytest.raises(ValueError, match="words: 1 of 5 answers of cascade"):
        rba_evaluate.saved_predictions(cfg, sets, ["rba"], manifest.parent)
    entries = [{"id": id, "reason": "unreadable audio", "detail": ""} for id in ("id-blue", "id-red")]
    (manifest.parent / "quarantine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    predictions, _ = rba_evaluate.saved_predictions(cfg, sets, ["rba"], manifest.parent)
    assert predictions == expected, "id-red was answered in the end"


def test_models_have_names_of_their_own(manifest):
    assert rba_evaluate.aligned_models(config(manifest)) == {"rba": Path("nowhere/rba.nemo")}
    several = config(manifest, "aligned={new: a/x.nemo, old: b/x.nemo}")
    assert list(rba_evaluate.aligned_models(several).items()) == [("new", Path("a/x.nemo")), ("old", Path("b/x.nemo"))]
    for wrong in ("start.nemo", "{sft: a.nemo, distillation: b.nemo}", "{teacher: a.nemo}"):
        with pytest.raises(ValueError, match="something else is called so"):
            rba_evaluate.aligned_models(config(manifest, f"aligned={wrong}"))
    cfg = config(manifest)
    cfg.aligned = "???"
    with pytest.raises(ValueError, match="aligned is not set"):
        rba_evaluate.aligned_models(cfg)
    with pytest.raises(ValueError, match="manifest is called 'read' as one of tasks is"):
        rba_evaluate.held_out_sets(config(manifest, "manifest=elsewhere/read"))
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        rba_evaluate.held_out_sets(config(manifest, "manifest=null", "tasks=null"))


def test_everything_that_is_not_there_is_named_before_any_work(manifest):
    cfg = config(
        manifest, "saved=false", "model=nemo", "model.restore_path=nowhere/start.nemo", "teacher.path=nowhere/teacher",
        f"aligned={{a: nowhere/a.nemo, b: {manifest}}}", "manifest=nowhere/set",
    )  # fmt: skip
    files, sets = rba_evaluate.aligned_models(cfg), rba_evaluate.held_out_sets(cfg)
    with pytest.raises(ValueError, match="nothing was started") as refused:
        rba_evaluate.check_files(cfg, files, sets)
    message = str(refused.value)
    for expected in ("manifest of set: there is no nowhere/set", "aligned model a: there is no nowhere/a.nemo",
                     "start model: there is no nowhere/start.nemo", "teacher.path = nowhere/teacher",
                     "aligned: b are SALM folders, but model=nemo"):  # fmt: skip
        assert expected in message
    cfg.saved = True
    with pytest.raises(ValueError, match="manifest of set") as refused:
        rba_evaluate.check_files(cfg, files, sets)
    assert str(refused.value).splitlines()[1:] == ["  - manifest of set: there is no nowhere/set; name another"]
    cfg = config(manifest, "evaluation=win_rate")
    with pytest.raises(ValueError, match=r"Missing mandatory value: evaluation.task.reward.judge.model"):
        rba_evaluate.check_files(cfg, {}, {})


def test_one_model_alone_is_scored_without_a_start(manifest):
    cfg = config(manifest)
    expected = [prediction for prediction in evaluated(cfg, manifest) if prediction.system != "start"]
    (manifest.parent / "read" / "start.jsonl").unlink()
    cfg = config(manifest, "start=false")
    sets = rba_evaluate.held_out_sets(cfg)
    predictions, told = rba_evaluate.saved_predictions(cfg, sets, ["rba"], manifest.parent)
    assert predictions == expected
    recipe_evaluation.report(cfg, predictions, sets, ["rba"], manifest.parent, {"curves": None, "budget": {}}, told)
    results = json.loads((manifest.parent / "results.json").read_text())
    assert results["identity"]["start model"] == "none"
    assert list(results["roles"]["systems"]) == ["teacher", "cascade", "rba"]


def test_the_model_alone_is_laid_out_as_the_config_says(manifest, tmp_path):
    cfg = config(manifest, "model.tensor_model_parallel_size=2")
    folder, file = (recipe_evaluation.model_config(cfg, path) for path in (tmp_path, tmp_path / "x.nemo"))
    assert (folder.folder, folder.params_dtype) == (str(tmp_path), "float32")
    assert file._target_.endswith("RBASpeechLM.restore_from")
    assert {one.tensor_model_parallel_size for one in (folder, file)} == {2}


def test_what_scoring_has_cost_reaches_the_report(manifest):
    def reward(rollouts):
        return torch.ones(len(rollouts))

    cfg = config(manifest)
    predictions = evaluated(cfg, manifest)
    reward.account = lambda: {"votes paid": 7}
    task = RewardTask(name="words", batches=list, reward=reward, prices={"votes paid": 1e6}, kinds={})
    recipe_evaluation.keep_accounts([task], manifest.parent)
    sets = rba_evaluate.held_out_sets(cfg)
    recipe_evaluation.report(cfg, predictions, sets, ["rba"], manifest.parent, {"curves": None, "budget": {}})
    results = json.loads((manifest.parent / "results.json").read_text())
    assert results["accounts"] == {"words": {"votes paid": 7, "cost": 7.0}}


def test_a_model_that_reads_other_tokens_is_refused():
    class Prompt:
        def __init__(self, shift: int):
            self.encode_response = lambda text: [ord(letter) + shift for letter in text]
            self.encode_prompt = self.encode_typed = lambda item: self.encode_response(item.text)

    recipe_evaluation.check_same_prompts("a", Prompt(0), Prompt(0))
    with pytest.raises(ValueError, match="'a' has another tokenizer"):
        recipe_evaluation.check_same_prompts("a", Prompt(1), Prompt(0))


def test_what_a_measure_lacks_is_told_before_a_model_is_loaded(manifest, monkeypatch):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    cfg = config(manifest, "manifest=null")
    fine = {"manifest": str(manifest), "evaluation": "spoken_qa"}
    fleurs = {"manifest": str(manifest), "evaluation": "translation", "task": {"target_language": "ja"}}
    cfg.tasks = OmegaConf.create({"fine": fine, "fleurs": fleurs})
    with initialize_config_dir(str(CONF), version_base=None):
        sets = rba_evaluate.held_out_sets(cfg)
    (line,) = recipe_evaluation.unmeasurable(cfg, sets)
    assert line.startswith("fleurs: BLEU's tokenizer 'ja-mecab' needs what is not there: pip install 'sacrebleu[ja]'")
    nobody = "{model: m, base_url: 'http://127.0.0.1:9/v1', max_retries: 0}"
    cfg = config(manifest, "evaluation=judge", f"evaluation.task.reward.judge={nobody}")
    cfg.tasks = None
    (line,) = recipe_evaluation.unmeasurable(cfg, rba_evaluate.held_out_sets(cfg))
    assert line.startswith("words: evaluation.task.reward.judge: the server http://127.0.0.1:9/v1/models did not")
