# SPDX-License-Identifier: Apache-2.0
"""A NeMo SALM checkpoint folder into a ``.nemo``, or back.

python examples/rba_convert.py source=model.nemo target=salm_folder
"""

from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig, MissingMandatoryValue

from nemo_rba.models.rba_speech_lm import RBASpeechLM


def convert(cfg: DictConfig) -> None:
    """``cfg``: source, target, model (how to read a SALM folder).

    Raises:
        ValueError: the target exists, source and target are of one kind, or the source cannot be used.
    """
    source, target = Path(cfg.source), Path(cfg.target)
    if target.exists():
        raise ValueError(f"target={target} exists already; name a new one or remove it")
    if not source.exists():
        raise ValueError(f"source={source} does not exist; expected a .nemo file or a SALM checkpoint folder")
    if (source.suffix == ".nemo") == (target.suffix == ".nemo"):
        raise ValueError(f"source={source} and target={target} are of one kind; expected one .nemo and one folder")
    if target.suffix == ".nemo":
        instantiate(cfg.model).save_to(str(target.absolute()))
    else:
        RBASpeechLM.restore_from(source, map_location="cpu").save_salm(target)
    logging.info(f"wrote {target}")


@hydra_runner(config_path="../conf", config_name="rba_convert")
def main(cfg: DictConfig) -> None:
    try:
        convert(cfg)
    except (ValueError, InstantiationException, MissingMandatoryValue) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    main()
