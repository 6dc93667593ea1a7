# SPDX-License-Identifier: Apache-2.0
"""The study at its smallest: two arms, two seeds, two steps; every table filled, nothing trained twice."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import recipe_parts
from hydra import compose, initialize_config_dir
from study.runs import Run, choose, config, dev_score, grid, is_bracketed

from nemo_rba.interruption import raise_on

ROOT = Path(__file__).parents[2]
SMALL = """
output: ???
recipe: rba_tiny
workers: 1
name: small
seeds: [1, 2]
prompts: [8]
budgets: {8: {clips: 8, dev_interval: 4}}
common: [data.num_train=12, data.num_dev=6, data.num_test=10, data.num_test_seen=6, data.num_test_voices=10,
  data.batch_size=4,
  num_minibatches=1, warmup_steps=1, evaluation.num_draws=50,
  exp_manager.checkpoint_callback_params.monitor=val/obeys]
conditions:
  held-out voices: test_voices
  noisy:
    split: test
    augmentation: {_target_: nemo_rba.synthesis.augment.NoiseAugmentation, snr_db_min: 0.0, snr_db_max: 10.0,
      color: pink, peak_min: 0.3, peak_max: 0.9, seed: "${seed}"}
  typed: {split: test, typed: true}
arms:
  rba: {label: RBA, learning_rates: [2.0e-4], overrides: [rollouts.group_size=2, rollouts.num_taught=1]}
  fresh:
    label: SFT, fresh
    learning_rates: [1.0e-4]
    overrides: [rollouts=fresh_teacher, objective=distillation]
"""


def study(folder: Path) -> str:
    (folder / "small.yaml").write_text(SMALL)
    command = [
        sys.executable, "examples/rba_study.py", f"--config-dir={folder}", "--config-name=small", f"output={folder}"
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_small_study_is_complete(tmp_path):
    study(tmp_path)
    made = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(made) == 2 * 2, "two arms, two seeds"
    (found,) = json.loads((tmp_path / "study.json").read_text()).values()
    whole = found["conditions"][0]["whole"]
    assert (whole["num_items"], whole["num_clips"]) == (10, 60), "every item in six voices"
    assert set(whole["gap_closed"]) == {"RBA", "SFT, fresh"}
    assert [len(seeds) for label, seeds in whole["seeds"].items() if label in whole["gap_closed"]] == [2, 2]
    assert found["budget"]["RBA"]["clips"] == "8"
    page = (tmp_path / "study.md").read_text()
    assert page.count("◄") == 2
    mean, rba, sft = whole["differences"]["SFT, fresh"], *(whole["seeds"][arm] for arm in ("RBA", "SFT, fresh"))
    assert f"{mean['high']:.1f}]; {rba[0] - sft[0]:.1f}, {rba[1] - sft[1]:.1f} |" in page, "seed by seed"
    assert (tmp_path / "plots" / "arms.png").stat().st_size > 5_000
    assert (tmp_path / "n8" / "report.html").is_file()


class Plan(dict):
    """A study's config, without hydra."""

    __getattr__ = dict.__getitem__


def plan(**rates) -> Plan:
    arms = {arm: Plan(learning_rates=found) for arm, found in rates.items()}
    return Plan(arms=Plan(arms), seeds=[3, 4], prompts=[300, 1000], budgets={300: {}, 1000: {}, 5000: {}})


def test_grids_are_of_equal_size_or_refused():
    runs = grid(plan(rba=[2.0, 1.0], sft=[3.0, 4.0]))
    assert [(run.prompts, run.arm, run.learning_rate, run.seed) for run in runs[:3]] == [
        (300, "rba", 1.0, 3), (300, "rba", 2.0, 3), (300, "sft", 3.0, 3)
    ]  # fmt: skip
    assert len(runs) == 8
    for unfair in ({"rba": [1.0, 2.0], "sft": [1.0]}, {"rba": [1.0, 2.0], "sft": [1.0, 1.0]}, {"rba": [1.0]}):
        with pytest.raises(ValueError, match="expected two arms or more with the same number"):
            grid(plan(**unfair))


def test_a_number_of_prompts_without_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"prompts has \[16\] without a budget; expected some of \[300, 1000, 5000\]"):
        grid(Plan(plan(rba=[1.0], sft=[1.0]) | {"prompts": [300, 16]}))


def test_a_budget_is_of_clips_however_many_steps_an_arm_takes_on_them():
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        study = compose("rba_study")
        study.arms = {
            "two": {"overrides": [], "label": "two", "learning_rates": [1.0]},
            "eight": {"overrides": ["num_minibatches=4", "ppo_epochs=2"], "label": "eight", "learning_rates": [1.0]},
            "long": {"overrides": [], "label": "long", "learning_rates": [1.0], "longer": 2.5},
        }
        recipes = {run.arm: config(study, run) for run in grid(study) if run.prompts == 300}
    steps = {arm: (cfg.trainer.max_steps, cfg.trainer.val_check_interval) for arm, cfg in recipes.items()}
    assert steps == {"two": (180, 30), "eight": (720, 30), "long": (450, 75)}
    clips = {arm: recipe_parts.clips_heard(cfg, cfg.trainer.max_steps) for arm, cfg in recipes.items()}
    assert clips == {"two": 1440, "eight": 1440, "long": 3600}
    assert all(cfg.schedule.total_steps == cfg.trainer.max_steps for cfg in recipes.values())


def test_where_prompts_are_heard_once_more_clips_are_more_prompts():
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        study = compose("rba_study", ["prompts=[1000,1440,4800]"])
        recipes = {
            (run.prompts, run.arm): config(study, run)
            for run in grid(study)
            if run.arm in ("forward_kl_fresh", "forward_kl_long") and run.learning_rate == study.learning_rates[0]
        }
    heard = {key: recipe_parts.clips_heard(cfg, cfg.trainer.max_steps) for key, cfg in recipes.items()}
    drawn = {key: cfg.data.train_prompts for key, cfg in recipes.items()}
    assert drawn == {
        (1000, "forward_kl_fresh"): 1000, (1000, "forward_kl_long"): 1000,
        (1440, "forward_kl_fresh"): 1440, (1440, "forward_kl_long"): 2880,
        (4800, "forward_kl_fresh"): 4800, (4800, "forward_kl_long"): 5000,
    }, "5000 are all there are"  # fmt: skip
    assert [heard[size, "forward_kl_long"] for size in (1000, 1440, 4800)] == [9600, 2880, 9600]


def test_the_best_dev_score_is_chosen_and_an_edge_is_told():
    study = plan(rba=[1.0, 2.0, 3.0], sft=[1.0, 2.0, 3.0])
    runs = grid(study)
    scores = {run: 0.5 + 0.1 * (run.learning_rate == 2.0 and run.arm == "rba") for run in runs}
    best = choose(runs, scores)
    assert best[300, "rba"] == Run(arm="rba", prompts=300, learning_rate=2.0, seed=3)
    assert best[300, "sft"].learning_rate == 1.0, "the smaller one where all are alike"
    assert [is_bracketed(study, best[300, arm]) for arm in ("rba", "sft")] == [True, False]


def test_the_start_models_dev_score_is_no_runs(tmp_path):
    """Else rates that only do harm would all have the start's score, and the smallest of them would win."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val/obeys": 0.9}\n{"step": 30, "reward/mean": 0.1}\n{"step": 30, "val/obeys": 0.2}\n'
        '{"step": 60, "val/obeys": 0.4}\n'
    )
    assert dev_score(tmp_path, "val/obeys") == 0.4


def test_a_run_that_fails_keeps_none_of_the_others_from_being_made():
    import rba_study  # NeMo's: slow

    made = []

    def train_one(run):
        if run.learning_rate == 1.0:
            raise RuntimeError("the gradient norm is nan")
        made.append(run)

    runs = grid(plan(rba=[1.0, 2.0], sft=[3.0, 4.0]))
    with pytest.raises(
        SystemExit, match=r"not finished:\n  - n300_rba_lr1_seed3: the gradient norm is nan\n  - n1000_"
    ):
        rba_study.finish(Plan(workers=1), runs, train_one)
    assert [run.learning_rate for run in made] == [2.0, 3.0, 4.0, 2.0, 3.0, 4.0]


def sleep_long(folder: Path, run: Run) -> None:
    """What a worker is busy with."""
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(300)


def test_who_stops_the_study_stops_its_workers(tmp_path):
    import rba_study  # NeMo's: slow

    def stop(pids: list[int]) -> None:
        while len(pids) < 2:
            time.sleep(0.1)
            pids += [int(path.stem) for path in tmp_path.glob("*.pid") if int(path.stem) not in pids]
        os.kill(os.getpid(), signal.SIGTERM)

    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,), daemon=True)
    bystander.start()
    others = set(multiprocessing.active_children())
    pids, before = [], signal.getsignal(signal.SIGTERM)
    raise_on(signal.SIGTERM, rba_study.stopped)
    threading.Thread(target=stop, args=(pids,), daemon=True).start()
    try:
        with pytest.raises(SystemExit, match="stopped by SIGTERM; run again to go on"):
            rba_study.finish(Plan(workers=2), grid(plan(rba=[1.0], sft=[3.0])), partial(sleep_long, tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(pids) == 2
    assert set(multiprocessing.active_children()) == others, "such as megatron's writer of checkpoints"
    bystander.kill()
    bystander.join()


def test_a_run_that_a_signal_stops_stops_the_study():
    import rba_study  # NeMo's: slow
    import recipe

    def preempted(run):
        raise recipe.Interrupted("n300: stopped at step 3 of 12; run again to go on")

    with pytest.raises(recipe.Interrupted, match="stopped at step 3"):
        rba_study.finish(Plan(workers=1), grid(plan(rba=[1.0], sft=[3.0])), preempted)
