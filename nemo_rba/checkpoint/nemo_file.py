# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` files that may come from anywhere: restored without running or reading anything outside the file.

``RBASpeechLM.restore_from`` uses the connector below. The generic ``ModelPT.restore_from`` cannot: NeMo picks the
connector before it knows the class, so there a file is as safe as NeMo makes it. What remains closed on that path:
classes outside NeMo's allow-list (NeMo 3), classes inside ``perception`` other than NeMo's speech modules (the model
checks its own config), and pickled code in the weights, unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set. What stays
open: a tokenizer entry that is a path of this machine is read. Restore files from strangers with ``RBASpeechLM``.
"""

import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from nemo_rba.checkpoint.whole import load_state
from nemo_rba.conversion.foreign import refuse_foreign_code

ARTIFACT_PREFIX = "nemo:"


class SafeSaveRestoreConnector(SaveRestoreConnector):
    """NeMo's connector with its openings closed.

    Weights are loaded with ``weights_only=True`` whatever the environment says; artifact paths must stay inside the
    archive; ``trust_remote_code`` and foreign classes are refused. ``optional_artifact_keys`` may be absent.
    ``settings`` are keys of this process's model: its layout and type, which are not the file's to say.
    """

    def __init__(
        self, *, target: str, artifact_keys: tuple[str, ...], optional_artifact_keys: tuple[str, ...],
        settings: Mapping[str, Any],
    ):  # fmt: skip
        super().__init__()
        self._target, self._settings = target, dict(settings)
        self._artifact_keys = artifact_keys
        self._optional_artifact_keys = optional_artifact_keys

    def load_config_and_state_dict(self, calling_cls, restore_path, override_config_path=None, *args, **kwargs):
        config = self._check(Path(restore_path))
        if override_config_path is None:
            override_config_path = OmegaConf.create(config | self._settings)
        try:
            return super().load_config_and_state_dict(calling_cls, restore_path, override_config_path, *args, **kwargs)
        except (_UnreadableWeights, ValueError) as error:  # a ValueError: the model cannot be built as the file says
            raise ValueError(f"{restore_path}: {error}") from error
        finally:
            calling_cls._set_model_restore_state(is_being_restored=False)

    def load_instance_with_state_dict(self, instance, state_dict, strict):
        try:
            load_state(instance, state_dict)
        except ValueError as error:
            raise ValueError(f"{self.model_weights_ckpt} does not fit {self.model_config_yaml}: {error}") from error

    def _check(self, path: Path) -> dict:
        """The config of an archive that may be unpacked.

        Raises:
            ValueError: what is wrong, with the file and the key.
        """
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a .nemo file of an RBASpeechLM")
        names, config = self._read(path)
        if config.get("target") != self._target:
            raise ValueError(f"{path} holds a {config.get('target')!r}, expected {self._target!r}")
        if "model" in config:  # NeMo would take the model's config from there
            raise ValueError(f"{path}: {self.model_config_yaml} has a key 'model', expected the model's own keys")
        for key, value in config.items():
            if key != "target":
                refuse_foreign_code({key: value}, f"{path}: {self.model_config_yaml}")
        if self.model_weights_ckpt not in names:
            raise ValueError(f"{path} has no {self.model_weights_ckpt}; it is incomplete")
        for key in self._artifact_keys + self._optional_artifact_keys:
            value = OmegaConf.select(OmegaConf.create(config), key)
            if value is not None or key in self._artifact_keys:
                _check_artifact(value, key, names, path)
        return config

    def _read(self, path: Path) -> tuple[set[str], dict]:
        """Names of the files in the archive, and its config."""
        try:
            with self._tar_open(str(path)) as archive:
                members = _regular_files(archive, path)
                if self.model_config_yaml not in members:
                    raise ValueError(f"{path} has no {self.model_config_yaml}; it is no .nemo file")
                text = archive.extractfile(members[self.model_config_yaml]).read().decode()
            config = OmegaConf.create(text)
        except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable .nemo file, or a part of one: {error}") from error
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{path}: {self.model_config_yaml} is no readable config: {error}") from error
        if not isinstance(config, DictConfig):
            raise ValueError(f"{path}: {self.model_config_yaml} holds no keys")
        return set(members), OmegaConf.to_container(config, resolve=False)

    def _load_state_dict_from_disk(self, model_weights, map_location="cpu"):
        try:
            return torch.load(model_weights, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise _UnreadableWeights(f"{self.model_weights_ckpt} is no plain file of tensors: {error}") from error


class WholeStateConnector(SaveRestoreConnector):
    """Writes a ``.nemo`` whose weights were gathered before, and whose config has the ``settings`` of one process."""

    def __init__(self, *, state: Mapping[str, Tensor], settings: Mapping[str, Any]):
        super().__init__()
        self._state, self._settings = dict(state), dict(settings)

    def _update_subconfigs(self, model, path2yaml_file):
        super()._update_subconfigs(model, path2yaml_file)
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(path2yaml_file), self._settings), path2yaml_file)

    def _save_state_dict_to_disk(self, state_dict, filepath):
        super()._save_state_dict_to_disk(self._state, filepath)


class _UnreadableWeights(Exception):
    """The weights cannot be loaded; the message lacks the file's name."""


def _regular_files(archive: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Files of the archive by their normal name.

    Raises:
        ValueError: links, devices, paths that lead outside, or two files of one name (the last one would win).
    """
    files = {}
    for member in archive.getmembers():
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
            raise ValueError(f"{path} holds {member.name!r}, which is a link, a device or a path that leads outside")
        if member.isreg() and str(name) in files:
            raise ValueError(f"{path} holds {str(name)!r} twice")
        if member.isreg():
            files[str(name)] = member
    return files


def _check_artifact(value: str | None, key: str, names: set[str], path: Path) -> None:
    if value is None or not str(value).startswith(ARTIFACT_PREFIX):
        raise ValueError(f"{path}: {key} is {value!r}, expected a file inside the archive ('{ARTIFACT_PREFIX}name')")
    name = str(value)[len(ARTIFACT_PREFIX) :]
    if name not in names or PurePosixPath(name).name != name:
        raise ValueError(f"{path}: {key} is {value!r}, which is not a file inside the archive")
