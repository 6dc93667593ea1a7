# SPDX-License-Identifier: Apache-2.0
"""Crafted ``.nemo`` files are refused with the file and the key named, and nothing of them is run."""

import io
import json
import os
import tarfile

import pytest
import torch
from omegaconf import OmegaConf

from nemo_rba.models.rba_speech_lm import RBASpeechLM


class _Code:
    """Unpickled by careless loaders, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def good(speech_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.nemo"
    speech_lm.save_to(str(path))
    return path


def craft(good, path, *, config=None, files=None):
    """A copy of ``good`` with config keys and files replaced; a file that is None is left out."""
    with tarfile.open(good) as archive:
        content = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}
    name = next(n for n in content if n.endswith("model_config.yaml"))
    values = OmegaConf.create(content[name].decode())
    for key, value in (config or {}).items():
        OmegaConf.update(values, key, value, force_add=True)
    content[name] = OmegaConf.to_yaml(values).encode()
    content |= {f"./{key}": value for key, value in (files or {}).items()}
    with tarfile.open(path, "w") as archive:
        for key, value in content.items():
            if value is not None:
                info = tarfile.TarInfo(key)
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": "os.system"}, "os.system"),
        ({"tokenizer.model": "/etc/hostname"}, "tokenizer.model is '/etc/hostname'"),
        ({"tokenizer.config": "nemo:../../x"}, "tokenizer.config"),
        ({"tokenizer.config": "nemo:gone.json"}, "not a file inside"),
        ({"tokenizer.model": None}, "tokenizer.model is None"),
        ({"perception.encoder.trust_remote_code": True}, "trust_remote_code"),
        ({"perception.encoder._target_": "os.system"}, "perception.encoder._target_ is 'os.system'"),
        ({"perception.modality_adapter._target_": "nemo.utils.exp_manager.os.system"}, "modality_adapter"),
        ({"model": {"target": "os.system"}}, "key 'model'"),
        ({"params_dtype": "float16"}, "model.params_dtype is 'float16'; expected one of float32, bfloat16"),
        ({"params_dtype": "load"}, "model.params_dtype is 'load'"),
    ],
)
def test_a_crafted_config_is_refused(config, message, good, tmp_path):
    path = craft(good, tmp_path / "bad.nemo", config=config)
    with pytest.raises(ValueError, match=message) as error:
        RBASpeechLM.restore_from(path)
    assert str(path) in str(error.value)


def test_pickled_code_in_the_weights_is_refused_whatever_the_environment(good, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    weights = io.BytesIO()
    torch.save({"x": _Code(tmp_path / "ran")}, weights)
    path = craft(good, tmp_path / "bad.nemo", files={"model_weights.ckpt": weights.getvalue()})
    with pytest.raises(ValueError, match=r"model_weights\.ckpt is no plain file"):
        RBASpeechLM.restore_from(path)
    assert not (tmp_path / "ran").exists()


def test_broken_archives_are_refused(good, tmp_path):
    (tmp_path / "half.nemo").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.nemo").write_text("no archive")
    craft(good, tmp_path / "empty.nemo", files={"model_weights.ckpt": None})
    for name in ("half", "text", "empty", "missing"):
        with pytest.raises(ValueError, match=name):
            RBASpeechLM.restore_from(tmp_path / f"{name}.nemo")


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside.txt", tarfile.REGTYPE, ""),
        ("deep/../../outside.txt", tarfile.REGTYPE, ""),
        ("{tmp}/outside.txt", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/hostname"),
        ("link", tarfile.SYMTYPE, "model_weights.ckpt"),
        ("link", tarfile.LNKTYPE, "model_weights.ckpt"),
        ("link", tarfile.LNKTYPE, "/etc/hostname"),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
    ],
)
def test_members_that_could_lead_outside_are_refused(name, kind, link, good, tmp_path):
    path, name = craft(good, tmp_path / "bad.nemo"), name.format(tmp=tmp_path)
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 4 if kind == tarfile.REGTYPE else 0
    with tarfile.open(path, "a") as archive:
        archive.addfile(member, io.BytesIO(b"text"))
    with pytest.raises(ValueError, match="which is a link, a device or a path that leads outside") as error:
        RBASpeechLM.restore_from(path)
    assert str(path) in str(error.value)
    assert repr(name) in str(error.value)
    assert not list(tmp_path.parent.rglob("outside.txt"))


@pytest.mark.parametrize("name", ["model_config.yaml", "./model_config.yaml"])
def test_a_second_file_of_the_same_name_is_refused(name, good, tmp_path):
    path = craft(good, tmp_path / "bad.nemo")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"holds 'model_config\.yaml' twice"):
        RBASpeechLM.restore_from(path)


def test_code_that_a_tokenizer_asks_for_is_not_run(good, tmp_path):
    with tarfile.open(good) as archive:
        (config,) = [m for m in archive.getmembers() if m.name.endswith("tokenizer_config.json")]
        values = json.loads(archive.extractfile(config).read())
    values |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    ran = tmp_path / "ran"
    path = craft(
        good, tmp_path / "bad.nemo",
        files={
            config.name.removeprefix("./"): json.dumps(values).encode(),
            "evil.py": f"import os\nos.mkdir({str(ran)!r})\nclass Evil: pass\n".encode(),
        },
    )  # fmt: skip
    with pytest.raises(ValueError, match=str(path)):
        RBASpeechLM.restore_from(path)
    assert not ran.exists()
