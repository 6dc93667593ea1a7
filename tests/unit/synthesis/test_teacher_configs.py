# SPDX-License-Identifier: Apache-2.0
"""Each teacher that conf/teacher offers can be chosen for each recipe."""

from pathlib import Path

import pytest
import recipe_checks
import recipe_parts
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[3]
OPENAI = [
    "teacher=openai",
    "teacher.model=org/m",
    r"teacher.pre_query='<|im_start|>user\n'",
    "teacher.stop='<|im_end|>'",
]
BY_REWARD_ALONE = ["rollouts=policy", "objective=rba", "objective.dense_weight=0", "~baselines.forward_kl"]
CHOICES = {
    "openai": (OPENAI, "org/m"),
    "self": (["teacher=self", "model.folder=examples/tiny/salm"], "examples/tiny/salm"),
    "hf": (["teacher=hf", "teacher.path=examples/tiny/teacher"], "examples/tiny/teacher"),
}


def load(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose(name, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


@pytest.mark.parametrize("name", ["rba_tiny", "rba_8b", "rba_8b_lora"])
@pytest.mark.parametrize("choice", list(CHOICES))
def test_every_teacher_goes_with_every_recipe(monkeypatch, name, choice):
    monkeypatch.chdir(ROOT)
    overrides, named = CHOICES[choice]
    cfg = load(name, *overrides, *BY_REWARD_ALONE)
    objective = instantiate(cfg.objective)
    assert not objective.needs_teacher, "a server does not judge"
    assert cfg.synthesis.teacher_name == named
    assert recipe_checks.unfit(cfg) == []
    assert recipe_checks.unset(cfg) == []
    assert not any("teacher" in line for line in recipe_checks.missing(cfg))
    recipe_parts.keys(cfg, recipe_parts.SYNTHESIS + recipe_parts.ALIGNMENT + recipe_parts.EVALUATION)
    if name == "rba_tiny":
        recipe_checks.preflight(cfg)


def test_what_a_choice_of_teacher_leaves_open_is_named():
    assert [line for line in recipe_checks.unset(load("rba_tiny", "teacher=openai")) if "teacher" in line] == [
        "teacher.model is not set; expected a value: give teacher.model=..."
    ]


def test_the_names_of_the_recipes_own_teachers_are_their_folders():
    assert load("rba_tiny").synthesis.teacher_name == "examples/tiny/teacher"
    assert load("rba_8b", "checkpoints=/data").synthesis.teacher_name == "/data/Llama-3.1-8B-Instruct"
    assert load("rba_8b", "teacher.path=/x").teacher.path == "/x"


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "teacher").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_teacher_calls_free_are_keys_of_its_config(path):
    cfg = OmegaConf.load(path)
    free = get_object(cfg["_target_"]).FREE_KEYS
    assert set(free) < set(cfg)
    assert not set(free) & {"path", "model", "dtype", "pre_query", "stop"}, "on which the words depend"
