# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` files that may come from anywhere: restored without running or reading anything outside the file."""

import tarfile
from pathlib import Path, PurePosixPath

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, ListConfig, OmegaConf

ARTIFACT_PREFIX = "nemo:"


class SafeSaveRestoreConnector(SaveRestoreConnector):
    """NeMo's connector with its openings closed.

    Weights are loaded with ``weights_only=True`` whatever the environment says; artifact paths must stay inside the
    archive; ``trust_remote_code`` and foreign ``target`` classes are refused.
    """

    def __init__(self, *, target: str, artifact_keys: tuple[str, ...]):
        super().__init__()
        self._target = target
        self._artifact_keys = artifact_keys

    def load_config_and_state_dict(self, calling_cls, restore_path, *args, **kwargs):
        self._check(Path(restore_path))
        return super().load_config_and_state_dict(calling_cls, restore_path, *args, **kwargs)

    def _check(self, path: Path) -> None:
        """Refuse a bad archive before NeMo unpacks it.

        Raises:
            ValueError: what is wrong, with the file and the key.
        """
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a .nemo file of an RBASpeechLM")
        try:
            with tarfile.open(path) as archive:
                names = {str(PurePosixPath(name)) for name in archive.getnames()}
                file = archive.extractfile(next(n for n in archive.getnames() if n.endswith(self.model_config_yaml)))
                config = OmegaConf.create(file.read().decode())
        except (tarfile.TarError, StopIteration, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable .nemo file: {error or 'no model_config.yaml'}") from error
        if config.get("target") != self._target:
            raise ValueError(f"{path} holds a {config.get('target')!r}, expected {self._target!r}")
        _refuse_remote_code(config, path)
        for key in self._artifact_keys:
            _check_artifact(OmegaConf.select(config, key), key, names, path)

    @staticmethod
    def _load_state_dict_from_disk(model_weights, map_location="cpu"):
        return torch.load(model_weights, map_location=map_location, weights_only=True)


def _refuse_remote_code(config: DictConfig | ListConfig, path: Path, where: str = "") -> None:
    items = config.items() if isinstance(config, DictConfig) else enumerate(config)
    for key, value in items:
        if key == "trust_remote_code" and value:
            raise ValueError(f"{path}: {where}{key} is set; code from a model file is never run")
        if isinstance(value, (DictConfig, ListConfig)):
            _refuse_remote_code(value, path, f"{where}{key}.")


def _check_artifact(value: str | None, key: str, names: set[str], path: Path) -> None:
    if value is None or not str(value).startswith(ARTIFACT_PREFIX):
        raise ValueError(f"{path}: {key} is {value!r}, expected a file inside the archive ('{ARTIFACT_PREFIX}name')")
    name = PurePosixPath(str(value)[len(ARTIFACT_PREFIX) :])
    if name.is_absolute() or ".." in name.parts or str(name) not in names:
        raise ValueError(f"{path}: {key} is {value!r}, which is not a file inside the archive")
