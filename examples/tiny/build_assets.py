# SPDX-License-Identifier: Apache-2.0
"""Rebuild every asset of the laptop recipe from nothing: teacher, spoken sets, speech encoder, SALM,
reward model, and the figures.

    python examples/tiny/build_assets.py                    # into examples/tiny, one to two hours on two CPU cores
    python examples/tiny/build_assets.py --output anywhere --stages teacher
    python examples/tiny/build_assets.py --output anywhere --scale 0.1     # the same path in minutes, for a check

Without ``--stages`` all run, in this order; features that lie in ``--work`` already are reused. Every stage is seeded.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from nemo_rba.rewards.reward_model import RewardModel  # noqa: E402
from tiny import (  # noqa: E402
    chat,
    salm,
    train_encoder,
    train_reward_model,
    train_salm,
    train_teacher,
    voices,
)
from tiny.speech import (  # noqa: E402
    SpokenSet,
    build_preprocessor,
    draw_texts,
    make_spoken_set,
    mel_features,
    speak,
)
from tiny.train_encoder import error_rates  # noqa: E402

STAGES = ("teacher", "speech", "encoder", "salm", "reward_model", "figures")
SEEDS = {"teacher": 0, "encoder": 1, "salm": train_salm.Recipe.seed, "reward_model": 3, "figures": 11}
TEACHER_STEPS, TRAIN_CLIPS = 6000, 16000
REWARD_REQUESTS = 30000  # with judged answers, to train the reward model
HEARD_REQUESTS, HEARD_ANSWERS = 300, 4  # by which it is measured: what the SALM answers to held-out speech


class Builder:
    """Runs stages and keeps the figures in one JSON file, so that stages can run one at a time."""

    def __init__(self, output: Path, work: Path, scale: float):
        self.output, self.work, self.scale = output, work, scale
        self.train_clips = self._scaled(TRAIN_CLIPS)
        self.teacher, self.salm, self.encoder = output / "teacher", output / "salm", work / "encoder.pt"
        self.reward_model, self.figures_file = output / "reward_model", output / "FIGURES.json"
        work.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)

    def _scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def run(self, stage: str) -> None:
        """Run one stage and note how long it took."""
        began = time.time()
        figures = getattr(self, f"build_{stage}")()
        minutes = round((time.time() - began) / 60, 1)
        print(f"{stage}: {minutes} minutes {json.dumps(figures)}", flush=True)
        stored = json.loads(self.figures_file.read_text()) if self.figures_file.exists() else {"minutes": {}}
        stored.update(figures)
        stored["minutes"][stage] = minutes
        stored["seeds"] = SEEDS
        self.figures_file.write_text(json.dumps(stored, indent=2) + "\n")

    def build_teacher(self) -> dict:
        """The text LLM."""
        steps = self._scaled(TEACHER_STEPS)
        train_teacher.train_teacher(self.teacher, steps=steps, seed=SEEDS["teacher"])
        return {"teacher_steps": steps}

    def build_speech(self) -> dict:
        """Clips and mel features."""
        sets = train_encoder.spoken_sets(self.work, self.train_clips)
        seconds = {name: round(len(s.frames) / len(s) / 100, 2) for name, s in sets.items()}
        return {"spoken_clips": {name: len(s) for name, s in sets.items()}, "mean_seconds": seconds}

    def build_encoder(self) -> dict:
        """The Conformer."""
        sets = train_encoder.spoken_sets(self.work, self.train_clips)
        phases = [
            replace(phase, steps=self._scaled(phase.steps), warmup=self._scaled(phase.warmup))
            for phase in train_encoder.PHASES
        ]
        train_encoder.train_encoder(sets["train"], sets["dev"], self.encoder, seed=SEEDS["encoder"], phases=phases)
        return {"encoder_steps": sum(phase.steps for phase in phases)}

    def build_salm(self) -> dict:
        """The SALM."""
        recipe = replace(train_salm.Recipe(), steps=self._scaled(train_salm.Recipe.steps))
        sets = train_encoder.spoken_sets(self.work, self.train_clips)
        folder = self.work / "salm"
        train_salm.train_salm(folder, self.teacher, self.encoder, sets, recipe)
        shutil.rmtree(self.salm, ignore_errors=True)
        shutil.copytree(folder, self.salm)
        return {"salm_recipe": asdict(recipe)}

    def build_reward_model(self) -> dict:
        """The reward model, and how well it knows right answers from wrong ones that it was not trained on."""
        requests, seed = self._scaled(REWARD_REQUESTS), SEEDS["reward_model"]
        made = train_reward_model.train_reward_model(self.reward_model, self.teacher, requests=requests, seed=seed)
        reward = RewardModel(
            path=str(self.reward_model), batch_size=100, device="cpu", dtype="float32", scale=1.0, sigmoid=False
        )
        measured = {split: self._measure_reward(reward, split) for split in ("dev", "test")}
        return {"reward_model": made | measured | {"bytes": _size(self.reward_model)}}

    def _measure_reward(self, reward: RewardModel, split: str) -> dict:
        """Its agreement with the verifier on answers to held-out requests: the teacher's, and the SALM's, who hears."""
        torch.manual_seed(SEEDS["figures"])
        llm = LlamaForCausalLM.from_pretrained(self.teacher)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.teacher)
        model = salm.load_salm(self.salm)
        texts = [
            item.instruction for item in chat.held_out_items(split, self._scaled(HEARD_REQUESTS), SEEDS["figures"])
        ]
        clips = speak(texts, split, SEEDS["figures"])
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0}
        said, typed = [], []
        for _ in range(HEARD_ANSWERS):
            said += salm.respond(model, clips, salm.INSTRUCT_PROMPT, **sampling)
            typed += chat.answer(llm, tokenizer, texts, temperature=1.5)
        asked = texts * HEARD_ANSWERS
        return {
            name: train_reward_model.agreement(asked, answers, train_reward_model.score_answers(reward, asked, answers))
            for name, answers in (("salm_answers", said), ("teacher_samples", typed))
        }

    def build_figures(self) -> dict:
        """Read the saved assets back and measure them on the test split, in held-out voices."""
        torch.manual_seed(SEEDS["figures"])
        llm = LlamaForCausalLM.from_pretrained(self.teacher)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.teacher)
        model = salm.load_salm(self.salm)
        texts = [item.instruction for item in chat.held_out_items("test", 600, SEEDS["figures"])]
        clips = speak(texts, "test", SEEDS["figures"])
        heard = salm.respond(model, clips, salm.TRANSCRIBE_PROMPT, do_sample=False)
        answers = salm.respond(model, clips, salm.INSTRUCT_PROMPT, do_sample=False)
        inner = salm.text_llm(model)
        spoken = SpokenSet.from_features(texts, mel_features(build_preprocessor(), clips))
        ctc_heard = train_encoder.load_encoder(self.encoder).recognise(spoken)
        return {
            "test_voices": voices.TEST_VOICES,
            "teacher": train_teacher.evaluate(llm, tokenizer, "test", 1000, SEEDS["figures"]),
            "teacher_on_the_spoken_items": chat.score(texts, chat.answer(llm, tokenizer, texts)),
            "encoder_ctc": self._encoder_error_rates() | {"spoken_items": asdict(error_rates(texts, ctc_heard))},
            "salm_transcription": asdict(error_rates(texts, heard)),
            "salm_instructions": chat.score(texts, answers),
            "cascade_ctc": chat.score(texts, chat.answer(llm, tokenizer, ctc_heard)),
            "cascade": chat.score(texts, chat.answer(llm, tokenizer, heard)),
            "salm_llm_on_text": chat.score(texts, chat.answer(inner, tokenizer, texts)),
            "bytes": {f.name: _size(f) for f in (self.teacher, self.salm)},
        }

    def _encoder_error_rates(self) -> dict:
        """Greedy CTC on test requests, in voices of the training set and in held-out ones."""
        model = train_encoder.load_encoder(self.encoder)
        seen = make_spoken_set(self.work / "test_seen.pt", draw_texts("test", 400, 7), "train", 7)
        test = make_spoken_set(self.work / "test.pt", draw_texts("test", 600, 4), "test", 4)
        return {
            "seen_voices": asdict(error_rates(seen.texts, model.recognise(seen))),
            "held_out_voices": asdict(error_rates(test.texts, model.recognise(test))),
        }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=HERE, help="where teacher/, salm/, reward_model/ and FIGURES.json go"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_assets"), help="features and the CTC encoder")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps and clips")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    builder = Builder(arguments.output.resolve(), arguments.work.resolve(), arguments.scale)
    for stage in arguments.stages:
        builder.run(stage)


if __name__ == "__main__":
    main()
