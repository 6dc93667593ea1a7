# SPDX-License-Identifier: Apache-2.0
"""Fixtures around the models of ``tiny_models.py``; made once per session, because NeMo and its models are slow."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny_models import load_speech_lm, make_batch, make_salm_folder
from xdist.scheduler import LoadFileScheduling

from nemo_rba.types import SpeechBatch

START_JOBS = ("tests/distributed/", "tests/functional/")


class OneJobAtATime(LoadFileScheduling):
    """A file is one worker's, and all files whose tests start jobs are one worker's too.

    Two jobs whose processes wait for each other's messages would share the cores; so they share ``forked``'s server.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "jobs" if nodeid.startswith(START_JOBS) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return OneJobAtATime(config, log)


def pytest_collection_finish():
    """The million objects that importing NeMo makes stay: no collection needs to walk through them, 0.7 s each time."""
    gc.collect()
    gc.freeze()


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
