# SPDX-License-Identifier: Apache-2.0
"""The student's own language model as the teacher: it reads what the student hears.

A SpeechLM that answered speech as its LLM answers text would have no modality gap, so its LLM is a teacher that is
always at hand and always of the same vocabulary. It is asked in the chat template of its tokenizer, as an LLM is.
"""

from pathlib import Path

import torch

from nemo_rba.conversion.salm import open_salm
from nemo_rba.synthesis.teacher import HFTeacher


class SALMTeacher(HFTeacher):
    """The language model of a NeMo SALM checkpoint folder, LoRA merged, as an ``HFTeacher``: ``teacher=self``.

    Args:
        path: the SALM folder, ``model.folder`` of the student.
        batch_size, device, dtype: as for ``HFTeacher``, but the device is one.

    Raises:
        ValueError: as ``HFTeacher``, or not a SALM folder.
    """

    def _check_folder(self, path: Path) -> None:
        if self._device == "auto":
            raise ValueError(
                "teacher.device is 'auto', but the student's own LLM is not spread; give cpu, cuda or cuda:1"
            )
        self._salm = open_salm(path)

    def _load_model(self, path: Path, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self._salm.llm_config, dtype=dtype)
        tied = self._salm.llm_config.tie_word_embeddings
        names = [name for name in model.state_dict() if not (tied and name == "lm_head.weight")]
        state = {name: self._salm.read_llm(name).to(dtype) for name in names}
        model.load_state_dict(state, strict=not tied)
        return model
