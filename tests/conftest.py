# SPDX-License-Identifier: Apache-2.0
"""Fixtures around the models of ``tiny_models.py``; made once per session, because NeMo and its models are slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny_models import load_speech_lm, make_batch, make_salm_folder

from nemo_rba.types import SpeechBatch


@pytest.fixture(scope="session")
def llama_salm(tmp_path_factory):
    """(folder, NeMo SALM) around a Llama with tied embeddings."""
    return make_salm_folder(tmp_path_factory.mktemp("salm-llama"), "llama")


@pytest.fixture(scope="session")
def qwen3_salm(tmp_path_factory):
    """(folder, NeMo SALM) around a Qwen3 with its own output layer."""
    return make_salm_folder(tmp_path_factory.mktemp("salm-qwen3"), "qwen3")


@pytest.fixture(scope="session")
def speech_lm(llama_salm):
    """RBASpeechLM of ``llama_salm``; tests must not change its weights."""
    return load_speech_lm(llama_salm[0])


@pytest.fixture
def batch(speech_lm) -> SpeechBatch:
    """Three prompts of different lengths."""
    return make_batch(
        speech_lm.prompt, [0.7, 1.3, 1.0], ["", "transcribe", "in french please"], ["paris", "hello again", "a b c d"]
    )
