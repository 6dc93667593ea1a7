# SPDX-License-Identifier: Apache-2.0
"""The samplers that conf/sampler offers, chosen for a recipe as its comments say, and run."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_rba.synthesis.instructions import Draft

from .test_instructions_plan import Scripted

CONF = Path(__file__).resolve().parents[3] / "conf"
SAMPLERS = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))


def chosen(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("rba_tiny", overrides=list(overrides), return_hydra_config=False)
    return OmegaConf.create({"seed": cfg.seed, "sampler": cfg.synthesis.sampler}).sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_chosen_and_run(tmp_path, name):
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"text": f"say {i}"}) + "\n" for i in range(9)))
    overrides = [f"+sampler@synthesis.sampler={name}", "synthesis.sampler.batch_size=3"]
    overrides += [f"synthesis.sampler.pool={pool}"] if name == "self_instruct" else []
    cfg = chosen(*overrides)
    assert set(cfg) == {"_target_", "_partial_", *OmegaConf.load(CONF / "sampler" / f"{name}.yaml")}
    teacher = Scripted(lambda message, place: f"reply {place}")
    teacher.without_openings = lambda openings: teacher
    written = instantiate(cfg, _convert_="all")(teacher=teacher).batch(0)
    assert len(written) == 3
    assert all(isinstance(item, str | Draft) for item in written)
    assert not any("{topic}" in prompt or "{number}" in prompt for heard in teacher.heard for prompt in heard)


def test_a_schedule_takes_the_place_of_a_temperature():
    cfg = chosen("+temperature@synthesis.sampler.temperature=linear", "synthesis.sampler.batch_size=2")
    teacher = Scripted(lambda message, place: "hello")
    instantiate(cfg, _convert_="all")(teacher=teacher).batch(99)
    assert teacher.params[0].temperature == pytest.approx(1.2)
