# SPDX-License-Identifier: Apache-2.0
"""The filters and augmentations that conf/ offers, chosen on a recipe's command line as docs/synthesis.md says."""

import re
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from nemo_rba.synthesis.augment import Chain
from nemo_rba.synthesis.filters import apply_filters
from nemo_rba.types import Instruction

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
FILTERS = sorted(path.stem for path in (CONF / "filter").glob("*.yaml"))
AUGMENTATIONS = sorted(path.stem for path in (CONF / "augmentation").glob("*.yaml"))
STAGES = ("instruction_filters", "speech_filters", "response_filters")


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, overrides=list(overrides))


def made(cfg: DictConfig, stage: str) -> list:
    return instantiate(cfg.synthesis[stage], _convert_="all")


def instruction(text: str, response: str = "yes") -> Instruction:
    return Instruction(id="x", text=text, response=response, task="t")


@pytest.fixture(scope="module")
def tiny() -> DictConfig:
    return composed("rba_tiny")


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_can_be_added_by_name(tiny, tmp_path, name):
    (tmp_path / "test.txt").write_text("who wrote hamlet")
    overrides = [f"+filter@synthesis.{stage}.mine={name}" for stage in STAGES]
    if name == "contamination":
        overrides += [f"synthesis.{stage}.mine.files=[{tmp_path}/test.txt]" for stage in STAGES]
    cfg = composed("rba_tiny", *overrides)
    for stage in STAGES:
        assert set(cfg.synthesis[stage].mine) == set(OmegaConf.load(CONF / "filter" / f"{name}.yaml"))
        if name in ("embedding_duplicate", "reward_model"):
            continue  # made, with their models, in test_deduplicate.py and test_filters_quality.py
        found, before = made(cfg, stage), made(tiny, stage)
        assert [type(f) for f in found[:-1]] == [type(f) for f in before], "it comes last"
        assert isinstance(found[-1], partial) == ("_partial_" in cfg.synthesis[stage].mine), "waits for the teacher"


def test_filters_are_changed_and_switched_off_by_name():
    changes = ("near_duplicate=null", "length.max_words=7")
    cfg = composed("rba_8b", "~synthesis.instruction_filters.markup",
                   *(f"synthesis.instruction_filters.{change}" for change in changes))  # fmt: skip
    found = made(cfg, "instruction_filters")
    assert [f.name for f in found] == ["length", "language", "repetition", "duplicate"]
    assert found[0].reason(instruction("one two three four five six seven eight")) == "more than 7 words"


def test_a_list_of_ones_own_takes_the_place_of_all():
    mine = "+synthesis.response_filters=[{_target_: nemo_rba.synthesis.filters.ResponseFilter, max_words: 3}]"
    found = made(composed("rba_tiny", "~synthesis.response_filters", mine), "response_filters")
    assert [f.name for f in found] == ["response"]


def test_the_recipe_for_production_drops_what_must_not_be_spoken_or_learned():
    pytest.importorskip("py3langid")
    pytest.importorskip("datasketch")
    cfg = composed("rba_8b")
    texts = {
        "Can you please tell me what the weather will be like in London tomorrow morning?": None,
        "Can you please tell me what the weather will be like in London tomorrow evening?":
            "near duplicate: shares 70% of its 2-word runs with an earlier text",
        "Könntest du mir bitte sagen, wie das Wetter morgen in London wird?": "language: is in another language (de)",
        "Please look at https://nvidia.com/x for me": "markup: has URL",
        "What is the meaning of $x^2$ in this?": "markup: has LaTeX",
        "Please buy for me:\n- milk\n- bread": "markup: has list",
        "Explain to me what def main(x) does": "markup: has code",
        "It costs $5 and weighs 3 kg, is that much?": None,
    }  # fmt: skip
    items = [instruction(text) for text in texts]
    kept, _, dropped = apply_filters(items, made(cfg, "instruction_filters"))
    assert {item.text: reason for item, reason in dropped} == {t: r for t, r in texts.items() if r}
    assert len(kept) == 2
    spoken = made(cfg, "speech_filters")
    foreign = [instruction("hello there Привет"), instruction("say 你好世界 to me"), instruction("go to the café now")]
    assert apply_filters(foreign, spoken)[1] == {"characters: has letters of another script": 2}
    answers = [instruction("x", "I'm sorry, but I can't help with that."), instruction("x", "It is four.")]
    assert apply_filters(answers, made(cfg, "response_filters"))[1] == {"refusal: refuses": 1}


def test_the_filters_of_the_recipe_are_those_that_can_be_chosen():
    cfg = composed("rba_8b")
    for stage in STAGES:
        for name, node in cfg.synthesis[stage].items():
            if name in FILTERS:
                chosen = OmegaConf.create({"seed": cfg.seed, "it": OmegaConf.load(CONF / "filter" / f"{name}.yaml")})
                assert OmegaConf.to_container(node, resolve=True) == OmegaConf.to_container(chosen.it, resolve=True)


def test_only_latin_letters_are_spoken_in_both_recipes():
    for name, stage in (("rba_tiny", "instruction_filters"), ("rba_8b", "speech_filters")):
        filters = {f.name: f for f in made(composed(name), stage)}
        assert filters["characters"].reason(instruction("Привет")) == "has letters of another script"


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("recipe", ["rba_tiny", "rba_8b"])
def test_every_augmentation_can_be_stored(recipe, name):
    cfg = composed(recipe, f"augmentation@noise={name}")
    chosen = OmegaConf.create({"seed": cfg.seed, "it": OmegaConf.load(CONF / "augmentation" / f"{name}.yaml")})
    expected = OmegaConf.to_container(chosen.it, resolve=True)
    plain = OmegaConf.to_container(OmegaConf.create({"seed": cfg.seed, "noise": cfg.noise}), resolve=True)["noise"]
    assert plain == expected, "and nothing of what was there before"
    assert {split.augment._target_ for split in cfg.synthesis.splits} == {expected["_target_"]}
    assert callable(instantiate(plain))


def test_one_split_can_be_augmented_otherwise():
    cfg = composed("rba_tiny", "+augmentation@far=far_field", "synthesis.splits.2.augment=${far}",
                   "synthesis.splits.1.augment=null")  # fmt: skip
    train, dev, test, *_ = cfg.synthesis.splits
    assert isinstance(instantiate(test.augment), Chain)
    assert train.augment == cfg.noise
    assert dev.augment is None


@pytest.mark.parametrize(("recipe", "limits"), [("rba_tiny", (15, 35, "white")), ("rba_8b", (10, 40, "pink"))])
def test_what_the_recipes_add_by_themselves_has_not_changed(recipe, limits):
    noise = composed(recipe).noise
    assert noise._target_.endswith("NoiseAugmentation")
    assert (noise.snr_db_min, noise.snr_db_max, noise.color) == limits
    assert (noise.peak_min, noise.peak_max) == (0.3, 0.9)


def test_every_command_line_of_the_document_composes():
    """Those of docs/synthesis.md that begin as an override does."""
    lines = re.findall(r"^(?:\+|~|augmentation@|synthesis\.)\S.*$", (ROOT / "docs" / "synthesis.md").read_text(), re.M)
    assert len(lines) >= 8
    for line in lines:
        overrides = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line.partition("  #")[0])]
        for name in ("rba_8b",) if line.startswith("synthesis.") else ("rba_tiny", "rba_8b"):
            composed(name, *overrides)
