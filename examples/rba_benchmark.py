# SPDX-License-Identifier: Apache-2.0
"""A local copy of a public benchmark as a manifest, ready for evaluation. Nothing is downloaded.

python examples/rba_benchmark.py benchmark=voicebench source=folder subset=sd-qa target=shar_folder
python examples/rba_benchmark.py benchmark=trivia_qa source=folder target=shar_folder       # spoken by tts
"""

from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rba.benchmarks.writing import read_summary, render, write_benchmark
from nemo_rba.stages import Stages


def convert(cfg: DictConfig) -> str:
    """Make the manifest ``cfg.target`` unless it is there for this configuration; returns a table of what is in it.

    Raises:
        ValueError: a key is missing or has no meaning for this benchmark, the source cannot be used, or the target
            cannot be written.
    """
    asked = {"benchmark": _resolved(cfg), "shard_size": cfg.shard_size, "audio_format": cfg.audio_format}
    target = Path(cfg.target).absolute()
    benchmark = instantiate(cfg.benchmark)
    folder = Stages(target.parent).run(
        target.name,
        asked,
        lambda folder: write_benchmark(benchmark, folder, shard_size=cfg.shard_size, audio_format=cfg.audio_format),
    )
    return f"{render(read_summary(folder))}\nwritten to {folder}"


def _resolved(cfg: DictConfig) -> dict:
    try:
        plain = OmegaConf.to_container(cfg.benchmark, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"benchmark={cfg.benchmark._target_.rpartition('.')[2]}: {error}") from error
    if not OmegaConf.is_missing(cfg, "subset") and "subset" not in plain | plain.get("benchmark", {}):
        raise ValueError(f"subset={cfg.subset}: this benchmark has no subsets; leave it out, or choose another one")
    return plain


@hydra_runner(config_path="../conf", config_name="rba_benchmark")
def main(cfg: DictConfig) -> None:
    try:
        print(convert(cfg))
    except (ValueError, InstantiationException, MissingMandatoryValue) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    main()
