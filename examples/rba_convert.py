# SPDX-License-Identifier: Apache-2.0
"""A NeMo SALM checkpoint folder into a ``.nemo``, or back; its language model alone to Hugging Face, or back.

python examples/rba_convert.py source=model.nemo target=salm_folder
python examples/rba_convert.py source=model.nemo target=llm_folder llm_only=true
python examples/rba_convert.py source=llm_folder speech=model.nemo target=other.nemo
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig, MissingMandatoryValue

from nemo_rba.conversion.hf import read_json
from nemo_rba.conversion.llm_folder import load_llm, write_llm
from nemo_rba.conversion.salm import open_salm
from nemo_rba.models.rba_speech_lm import RBASpeechLM


def convert(cfg: DictConfig) -> None:
    """``cfg``: source, target, speech, llm_only, model (how a SALM folder is read).

    Raises:
        ValueError: the target exists, the keys do not go together, or a source cannot be used.
    """
    check(cfg)
    target = Path(cfg.target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    if cfg.llm_only:
        write_llm_only(cfg, target)
    elif target.suffix == ".nemo":
        read(cfg).save_to(target)
    else:
        read(cfg).save_salm(target)
    logging.info(f"wrote {cfg.target}")


def check(cfg: DictConfig) -> None:
    """Refuse, with a ``ValueError``, keys that do not go together, before anything is read."""
    source, target = Path(cfg.source), Path(cfg.target)
    if target.exists():
        raise ValueError(f"target={target} exists already; name a new one or remove it")
    for key in ("source", "speech"):
        if cfg[key] and not Path(cfg[key]).exists():
            raise ValueError(f"{key}={cfg[key]} does not exist; expected a .nemo file or a checkpoint folder")
    if cfg.speech and (cfg.llm_only or source.suffix == ".nemo"):
        raise ValueError(
            f"speech={cfg.speech} is for source=<Hugging Face folder of a language model> and without llm_only; "
            f"found source={source}, llm_only={cfg.llm_only}"
        )
    if cfg.llm_only and target.suffix == ".nemo":
        raise ValueError(f"llm_only=true writes a Hugging Face folder; found target={target}")
    plain = not cfg.speech and not cfg.llm_only
    if plain and (source.suffix == ".nemo") == (target.suffix == ".nemo"):
        raise ValueError(f"source={source} and target={target} are of one kind; expected one .nemo and one folder")
    if plain and source.is_dir() and "perception" not in read_json(source / "config.json"):
        raise ValueError(
            f"source={source} is a language model alone; name the .nemo or SALM folder that it belongs to: speech=..."
        )


def read(cfg: DictConfig) -> RBASpeechLM:
    """The model that ``source`` is, or that it becomes with the speech side of ``speech``."""
    place = cfg.speech or cfg.source
    if Path(place).suffix == ".nemo":
        model = RBASpeechLM.restore_from(place, map_location="cpu")
    else:
        model = instantiate(cfg.model, folder=place)
    if cfg.speech:
        load_llm(model.llm, model.llm_config, model.prompt.vocabulary(), cfg.source, tp_size=1, tp_rank=0)
    return model


def write_llm_only(cfg: DictConfig, target: Path) -> None:
    """A SALM folder's language model is copied tensor by tensor; a ``.nemo`` becomes such a folder for a while."""
    if Path(cfg.source).suffix != ".nemo":
        write_llm(open_salm(cfg.source), target)
        return
    with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:
        folder = Path(scratch) / "salm"
        read(cfg).save_salm(folder)
        write_llm(open_salm(folder), target)


@hydra_runner(config_path="../conf", config_name="rba_convert")
def main(cfg: DictConfig) -> None:
    try:
        convert(cfg)
    except (ValueError, InstantiationException, MissingMandatoryValue) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    main()
