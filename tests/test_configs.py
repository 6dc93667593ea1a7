# SPDX-License-Identifier: Apache-2.0
"""Every config composes, resolves, and names things that exist and accept its keys."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import rba_evaluate
import recipe
import recipe_checks
import recipe_conditions
import recipe_evaluation
import recipe_parts
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import DictConfig, ListConfig, OmegaConf
from study.runs import Run, config

from nemo_rba.benchmarks import instructions, questions, translation, voicebench

CONF = Path(__file__).parent.parent / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
GROUPS = sorted(path for path in CONF.glob("*/*.yaml"))


def load(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(name, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def nodes(cfg, path=""):
    """Every node with a ``_target_``."""
    if isinstance(cfg, DictConfig):
        if "_target_" in cfg:
            yield path, cfg
        items = [(key, cfg._get_node(key)) for key in cfg]
    elif isinstance(cfg, ListConfig):
        items = [(i, cfg._get_node(i)) for i in range(len(cfg))]
    else:
        return
    for key, value in items:
        yield from nodes(value, f"{path}.{key}")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_and_its_targets_accept_their_keys(name):
    cfg = load(name)
    assert list(nodes(cfg)) or name in ("rba_study", "rba_export"), "a study names a recipe"
    assert recipe_checks.unfit(cfg) == []
    if "arm" in cfg:
        recipe_parts.keys(cfg, recipe_parts.SYNTHESIS + recipe_parts.ALIGNMENT + recipe_parts.EVALUATION)
        for arm in recipe_parts.arms(cfg).values():
            assert recipe_checks.unfit(arm) == []


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_group_targets_accept_their_keys(path):
    assert recipe_checks.unfit(OmegaConf.load(path)) == []


@pytest.mark.parametrize(
    ("objective", "expected"), [("distillation", ["distillation", "forward_kl"]), ("forward_kl", ["forward_kl", "sft"])]
)
def test_two_overrides_make_a_baseline(objective, expected):
    cfg = load("rba_tiny", "rollouts=teacher", f"objective={objective}")
    arms = recipe_parts.arms(cfg)
    assert list(arms) == expected, "the baseline that the main arm has become is not run twice"
    assert all(arm.rollouts._target_.endswith("TeacherRollouts") for arm in arms.values())
    assert not any("clip_low" in arm.objective for arm in arms.values())
    recipe_checks.preflight(cfg)


def test_report_shows_only_curves_that_some_arm_has(tmp_path):
    cfg = load("rba_tiny")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.6}\n')
    (tmp_path / "done.json").write_text('{"seconds": 12.3}')
    trained = recipe_evaluation.training(cfg, {"sft": tmp_path})
    assert list(trained["curves"].panels) == ["Reward"]
    assert trained["budget"]["SFT"] == {"clips": "1,440", "time": "12 s"}


def test_clips_are_those_of_all_ranks():
    cfg = load("rba_8b", "model.tensor_model_parallel_size=2", "trainer.devices=8", "trainer.num_nodes=2")
    batches = cfg.trainer.max_steps // (cfg.num_minibatches * cfg.ppo_epochs)
    assert recipe_parts.clips_heard(cfg, cfg.trainer.max_steps) == batches * cfg.data.batch_size * 8


def test_unknown_key_is_refused():
    with pytest.raises(Exception, match="kl_coeficient"):
        load("rba_tiny", "objective.kl_coeficient=0.1")


def test_preflight_names_everything_that_is_missing():
    cfg = load("rba_8b", "trainer.devices=9")
    with pytest.raises(SystemExit) as stop:
        recipe_checks.preflight(cfg)
    message = str(stop.value)
    for expected in ("model.folder", "salm_train.py", "teacher.path", "huggingface-cli", "fastpitch", "vocoder",
                     "trainer.devices = 9", "GPUs"):  # fmt: skip
        assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+reward.parts.chrf.wieght=1", "reward.parts.chrf: nemo_rba.rewards.text.ChrF"),
        ("rollouts=policy ~rollouts.top_p", "missing a required argument: 'top_p'"),
        ("~rollouts.top_p", "FreshMixedRollouts.__init__() missing 1 required keyword-only argument: 'top_p'"),
        ("reward.parts.exact._target_=nemo_rba.rewards.text.Exakt", "Exakt"),
        ("rollouts=policy rollouts.group_size=1", "rollouts.group_size is 1"),
        ("trainer.max_steps=5", "total_steps must be above warmup_steps"),
        ("kl_controller=adaptive", "coefficient must be above 0"),
        ("num_minibatches=1 schedule=kl_adaptive", "follows the KL between the first and the later updates"),
        ("objective=minimum_risk importance=masked", "MaskedImportance weighs the tokens of a policy gradient"),
        ("model.folder=nowhere", "model.folder = nowhere"),
        ("reward=reward_model", "reward.parts.model.path is not set"),
        ("rollouts=mixed rollouts.group_size=1", "the teacher's answer included, got 1"),
        (
            "rollouts=fresh_teacher rollouts.group_size=4 objective=dpo advantage=among_own",
            "AmongOwn compares 2 or more answers to the same prompt, but rollouts.group_size is 4, 4 of them taught",
        ),
        (
            "rollouts=mixed_fresh rollouts.num_taught=7 advantage=among_own",
            "AmongOwn compares 2 or more answers to the same prompt, but rollouts.group_size is 8, 7 of them taught",
        ),
        ("trainer.devices=auto", "trainer.devices is 'auto'; expected a whole number"),
        (
            "trainer.val_check_interval=91",
            "trainer.val_check_interval is 91 batches, but trainer.max_steps = 180 are 90 batches",
        ),
        ("validation_typed=false", "monitor is val/both/reward, of dev prompts that are read, but"),
        (
            "validation_typed=false +exp_manager.early_stopping_callback_params.monitor=val/both/reward",
            "exp_manager.early_stopping_callback_params.monitor is val/both/reward, of dev prompts that are read, but",
        ),
        ("trainer.devices=3 data.num_dev=2", "data.num_dev is 2, but 3 data-parallel ranks share the dev set"),
        (
            "objective=dr_grpo rollouts=teacher",
            "objective.aggregation: Interpolation key 'rollouts.max_new_tokens' not found",
        ),
    ],
)
def test_preflight_refuses_what_cannot_work(override, expected):
    with pytest.raises(SystemExit) as stop:
        recipe_checks.preflight(load("rba_tiny", *override.split()))
    assert expected in str(stop.value)


def test_a_teacher_of_another_vocabulary_is_refused_before_its_instructions_are_spoken(tmp_path):
    for path in (CONF.parent / "examples" / "tiny" / "teacher").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(SystemExit, match="rba_judged: teacher and student differ in 2 of"):
        recipe_checks.preflight(load("rba_tiny", f"teacher.path={tmp_path}"))
    judged_by_no_token = ["objective=rba", "objective.dense_weight=0", "~baselines.forward_kl"]
    recipe_checks.preflight(load("rba_tiny", f"teacher.path={tmp_path}", *judged_by_no_token))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollouts=policy", "objective=rba"],
        ["rollouts=policy", "objective=rba", "kl_controller=adaptive", "schedule=kl_adaptive", "importance=truncated"],
        ["rollouts=policy", "importance=masked", "objective=gspo", "watcher.min_entropy=null"],
        ["objective=distillation", "rollouts=teacher"],
        ["rollouts=mixed", "advantage=group_normalized"],
        ["advantage=among_own"],
        ["advantage=none"],
        ["rollouts=mixed", "rollouts.group_size=2", "objective=dpo", "reward=spin", "advantage=group_centred"],
        ["rollouts=resampled", "objective=dr_grpo"],
    ],
)
def test_preflight_lets_choices_pass_that_go_together(overrides):
    cfg = load("rba_tiny", *overrides)
    recipe_checks.preflight(cfg)
    main, *rivals = recipe_parts.arms(cfg).values()
    assert ("importance" in main) == any("importance" in override for override in overrides)
    assert not any("importance" in rival or "kl_controller" in rival for rival in rivals)
    assert all(rival.schedule.peak == 4e-4 for rival in rivals), "the rivals keep their schedule"


@pytest.mark.parametrize("arm", load("rba_study").arms)
def test_preflight_lets_every_arm_of_the_study_pass(arm):
    study = load("rba_study")
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = config(study, Run(arm=arm, prompts=300, learning_rate=1e-4, seed=1))
    recipe_checks.preflight(cfg)
    assert cfg.exp_manager.checkpoint_callback_params.monitor == "val/both/obeys"
    assert cfg.validation_typed
    assert "obeys" in cfg.reward.parts, "what every arm is chosen by"


def test_synthesis_needs_neither_the_student_nor_its_gpus():
    cfg = load("rba_8b", "teacher.path=examples/tiny/teacher")
    with pytest.raises(SystemExit) as stop:
        recipe_checks.preflight_synthesis(cfg)
    assert "fastpitch" in str(stop.value), "who speaks is not there"
    assert "model.folder" not in str(stop.value)
    assert "GPUs" not in str(stop.value)
    recipe_checks.preflight_synthesis(load("rba_tiny", "model.folder=nowhere"))
    with pytest.raises(SystemExit, match=r"model\.folder"):
        recipe_checks.preflight_synthesis(load("rba_tiny", "model.folder=nowhere", "teacher=self"))


def test_a_part_put_into_nothing_is_refused():
    cfg = load("rba_tiny", "+quality@synthesis.quality.checks.round_trip=asr_round_trip")
    with pytest.raises(SystemExit, match=r"synthesis\.quality has checks, but no _target_"):
        recipe_checks.preflight(cfg)


def test_training_can_hear_its_clips_through_something():
    cfg = load("rba_tiny", "+augmentation@data.augmentation=noisy")
    recipe_checks.preflight(cfg)
    changed, plain = (recipe_parts.keys(found, recipe_parts.ALIGNMENT) for found in (cfg, load("rba_tiny")))
    assert changed["data"].pop("augmentation")["_target_"].endswith("NoiseAugmentation")
    assert changed == plain


@pytest.mark.parametrize(
    "override", ["synthesis.max_batches=7", "synthesis.allow_fewer=true", "teacher.batch_size=3", "teacher.device=meta"]
)
def test_what_was_made_is_kept_where_only_its_making_changes(override):
    stages = (recipe_parts.SYNTHESIS, recipe_parts.ALIGNMENT, recipe_parts.EVALUATION)
    found, plain = (
        [recipe_parts.keys(cfg, names) for names in stages] for cfg in (load("rba_tiny", override), load("rba_tiny"))
    )
    assert found == plain


def test_defaults_live_in_conf_only():
    """Objects that a config builds take every setting from it: no second default hidden in a constructor."""
    for name in RECIPES:
        for path, node in nodes(load(name)):
            if not node["_target_"].startswith("nemo_rba.") or "SamplingParams" in node["_target_"]:
                continue
            hidden = [
                p.name
                for p in inspect.signature(get_object(node["_target_"])).parameters.values()
                if p.default is not inspect.Parameter.empty and p.kind is inspect.Parameter.KEYWORD_ONLY
            ]
            assert not hidden, f"{path}: {node['_target_']} has defaults for {hidden}"


def test_8b_recipes_differ_only_where_they_should():
    full, lora = load("rba_8b"), load("rba_8b_lora")
    assert (full.policy.lora, lora.policy.lora.rank) == (None, 16)
    assert lora.output == "runs/rba_8b_lora"
    for cfg in (full, lora):
        arms = recipe_parts.arms(cfg)
        assert [arm.schedule.peak for arm in arms.values()] == [
            cfg.learning_rate, cfg.distillation_learning_rate, cfg.distillation_learning_rate
        ]  # fmt: skip
        model, trainer = cfg.model, cfg.trainer
        copies = trainer.devices // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
        assert cfg.data.batch_size * copies == 64
        assert cfg.trainer.max_steps * 64 < 2 * cfg.data.num_train


def test_one_key_changes_what_hangs_on_it():
    cfg = load("rba_8b", "answer_tokens=256", "checkpoints=/data", "learning_rate=1", "trainer.max_steps=9")
    assert cfg.rollouts.max_new_tokens == cfg.data.max_response_tokens == 256
    assert cfg.synthesis.response_params.max_new_tokens == cfg.evaluation.params.max_new_tokens == 256
    assert {str(OmegaConf.select(cfg, need.key)).startswith("/data/") for need in cfg.requires} == {True}
    assert (cfg.schedule.peak, cfg.schedule.total_steps) == (1, 9)


@pytest.mark.parametrize(
    ("rollouts", "group_size"),
    [("policy", 8), ("mixed", 8), ("mixed_fresh", 8), ("resampled", 8), ("gkd", 1), ("gkd_fresh", 1),
     ("fresh_teacher", 1), ("teacher", None)],
)  # fmt: skip
def test_8b_rollouts_are_one_choice(rollouts, group_size):
    chosen = load("rba_8b", f"rollouts={rollouts}").rollouts
    assert (chosen.get("group_size"), chosen.get("max_new_tokens")) == (group_size, group_size and 1024)


@pytest.mark.parametrize("name", ["rba_8b", "rba_8b_lora"])
def test_8b_rivals_can_be_left_out(name):
    cfg = load(name, "~baselines.sft", "~baselines.forward_kl")
    assert list(recipe_parts.arms(cfg)) == ["rba"]


def test_an_arm_that_early_stopping_has_ended_is_finished():
    stopping = EarlyStopping(monitor="val/obeys", patience=2)
    trainer = SimpleNamespace(callbacks=[stopping])
    stopping.wait_count = 1
    assert not recipe._stopped_early(trainer), "by a time limit, then"
    stopping.wait_count = 2
    assert recipe._stopped_early(trainer)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "conditions.typed.split=test_sen",
            "conditions.typed: there is no split 'test_sen'; expected one of train, dev",
        ),
        ("+conditions.typed.augmentatoin=null", r"conditions.typed has the keys \['split', 'typed', 'augmentatoin'\]"),
        ("+conditions.typed.curve=SNR", "has an augmentation or a curve; expected neither"),
    ],
)
def test_conditions_that_cannot_be_met_stop_before_any_work(override, expected):
    recipe_conditions.check_conditions(load("rba_tiny"))
    recipe_conditions.check_conditions(load("rba_8b"))
    with pytest.raises(SystemExit, match=expected):
        recipe_conditions.check_conditions(load("rba_tiny", override))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("{a: {evaluation: spoken_qa}}", r"tasks.a has the keys \['evaluation'\]; expected manifest"),
        ("{a: {manifest: m, type: true}}", r"tasks.a has the keys \['manifest', 'type'\]"),
        ("{a: {manifest: m, evaluation: poetry}}", "tasks.a.evaluation is 'poetry': .*poetry"),
        (
            "{a: {manifest: m, evaluation: translation}}",
            r"evaluation.task.target_language not set; give .* tasks.a.task",
        ),
        ("{a: {manifest: m, task: {max_words: 3}}}", "tasks.a changes a task, but names no evaluation"),
    ],
)
def test_tasks_that_cannot_be_run_are_named(tasks, expected):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("rba_eval", overrides=["aligned=x.nemo", f"tasks={tasks}"])
        with pytest.raises(ValueError, match=expected):
            recipe_conditions.benchmark_sets(cfg)


def test_tasks_may_be_folders_that_know_how_they_are_measured(tmp_path):
    known = {"a": {"evaluation": "translation", "task": {"target_language": "zh"}}, "b": {"evaluation": "spoken_qa"}}
    for name, measure in known.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "benchmark.json").write_text(json.dumps({"name": name, "measure": measure}))
    places = ",".join(str(tmp_path / name) for name in "abc")
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("rba_eval", overrides=["aligned=x.nemo", f"tasks=[{places}]"])
        sets = recipe_conditions.benchmark_sets(cfg)
        assert {name: one.manifest for name, one in sets.items()} == {name: tmp_path / name for name in "abc"}
        assert "tok:zh" in next(iter(sets["a"].make_task(name="a", batches=list)._metrics))
        assert sets["b"].decoding.params.max_new_tokens == 256, "as conf/evaluation/spoken_qa.yaml has it"
        assert sets["b"].decoding.transcribe_context == "transcribe", "as the tiny model knows it"
        assert (sets["c"].make_task, sets["c"].decoding) == (None, None), "the main evaluation's"
        cfg.tasks = [str(tmp_path / "a"), str(tmp_path / "elsewhere" / "a")]
        with pytest.raises(ValueError, match="two manifests called 'a'"):
            recipe_conditions.benchmark_sets(cfg)
        cfg.tasks = str(tmp_path / "b")
        assert list(recipe_conditions.benchmark_sets(cfg)) == ["b"]


def test_every_benchmark_names_a_measure_that_there_is():
    assert set(voicebench.MEASURES) == set(voicebench.SPLITS)
    rooms = (instructions, questions, translation, voicebench)
    named = [c.measure for room in rooms for c in vars(room).values() if isinstance(getattr(c, "measure", None), dict)]
    names = {*voicebench.MEASURES.values(), *(measure["evaluation"] for measure in named), "translation"}
    assert len(named) >= 8
    assert names <= {path.stem for path in (CONF / "evaluation").glob("*.yaml")}


def test_a_task_of_the_main_evaluation_has_what_the_command_line_says(monkeypatch):
    with initialize_config_dir(str(CONF), version_base=None):
        overrides = ["evaluation=spoken_qa", "evaluation.task.max_words=4", "aligned=x.nemo"]
        cfg = compose("rba_eval", overrides=[*overrides, "tasks={a: {manifest: m, evaluation: spoken_qa}}"],
                      return_hydra_config=True)  # fmt: skip
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(cfg)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        made = recipe_conditions.benchmark_sets(cfg)["a"].make_task(name="a", batches=list)
    assert made._contains.max_words == 4


def test_a_model_to_be_evaluated_is_not_taken_for_an_option_of_conf():
    given = ["--config-name=rba_eval", "model=a/x.nemo", "model=salm", "model.folder=y", "tasks=[z]"]
    assert rba_evaluate.respelled(given) == ["--config-name=rba_eval", "aligned=a/x.nemo", *given[2:]]
    assert rba_evaluate.respelled(["model={a: x.nemo, b: y}"]) == ["aligned={a: x.nemo, b: y}"]


def test_a_tasks_own_evaluation_finds_what_it_refers_to():
    with initialize_config_dir(str(CONF), version_base=None):
        tasks = "{a: {manifest: m, evaluation: spoken_qa, task: {max_words: 3}}}"
        cfg = compose("rba_eval", overrides=["aligned=x.nemo", "output=here", f"tasks={tasks}"])
        made = recipe_conditions.benchmark_sets(cfg)["a"].make_task(name="a", batches=list)
        assert made._contains.max_words == 3
        nobody = "{model: m, base_url: 'http://127.0.0.1:9/v1', max_retries: 0}"
        cfg.tasks = OmegaConf.create(f"a: {{manifest: m, evaluation: judge, task: {{reward: {{judge: {nobody}}}}}}}")
        with pytest.raises(
            Exception, match="did not answer"
        ):  # its name and its file of votes were found, not a server
            recipe_conditions.benchmark_sets(cfg)
