# SPDX-License-Identifier: Apache-2.0
"""Packaging. The version is read, not imported, so that building needs neither torch nor NeMo."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    text = (HERE / "nemo_rba" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise ValueError('nemo_rba/__init__.py: expected a line __version__ = "x.y.z"')
    return match.group(1)


def conf_packages() -> list[str]:
    """``conf/`` and its groups, shipped as ``nemo_rba.conf``, ``nemo_rba.conf.model``, ..."""
    folders = sorted({path.parent.relative_to(HERE / "conf") for path in (HERE / "conf").rglob("*.yaml")})
    return [".".join(("nemo_rba.conf", *folder.parts)) for folder in folders]


def readme() -> str:
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


setup(
    name="nemo_rba",
    version=version(),
    description="Reinforced Behavior Alignment of speech LLMs, for NVIDIA NeMo",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["nemo_rba", "nemo_rba.*"]), *conf_packages()],
    package_dir={"nemo_rba.conf": "conf"},
    package_data={"": ["*.yaml"]},
    install_requires=[
        "nemo_toolkit[asr,nlp,tts]>=2.7.3,<4",
        "megatron-core>=0.16,<0.18",
        "torch>=2.6",
        "peft",  # imported by nemo.collections.speechlm2, yet only required by its extra of that name
        "transformers",
        "lightning",
        "hydra-core",
        "omegaconf",
        "lhotse",
        "soundfile",
        "soxr",
        "sacrebleu",
        "espeakng-loader",
        "kaldialign",
        "librosa",
        "pillow",
        "py3langid",  # LanguageFilter
        "datasketch",  # NearDuplicateFilter
        "pyarrow",
        "regex",
        "requests",
        "torchmetrics",
        "safetensors",
        "scikit-learn",
        "tqdm",
        "matplotlib",
    ],
    extras_require={"test": ["pytest", "pytest-xdist", "ruff", "lm_eval[ifeval]", "sacrebleu[ja]"]},
)
