# SPDX-License-Identifier: Apache-2.0
"""The tiny SALM: NeMo's own class around the tiny encoder and the teacher's weights, and its folder on disk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import domain
from .speech import PREPROCESSOR, pad_clips
from .tokenizer import AUDIO_LOCATOR, build_tokenizer, save_tokenizer
from .train_encoder import ENCODER

BACKBONE = "llm_backbone"
INSTRUCT_PROMPT = AUDIO_LOCATOR
TRANSCRIBE_PROMPT = f"{domain.TRANSCRIBE} {AUDIO_LOCATOR}"


def salm_config(llm_config: LlamaConfig) -> dict:
    """NeMo's SALM config; names instead of paths, the folder carries everything else."""
    return {
        "pretrained_llm": "tiny-teacher",
        "pretrained_asr": "tiny-encoder",
        "pretrained_weights": False,
        "audio_locator_tag": AUDIO_LOCATOR,
        "prompt_format": "qwen",
        "freeze_params": [],
        "prevent_freeze_params": [],
        "perception": {
            "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
            "output_dim": llm_config.hidden_size,
            "preprocessor": dict(PREPROCESSOR),
            "encoder": dict(ENCODER),
            "modality_adapter": {
                "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
                "d_model": ENCODER["d_model"],
            },
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
        "model_type": "nemo_speechlm",
        "architectures": ["NeMoSpeechLMForConditionalGeneration"],
    }


def write_frame(folder: Path, llm_config: LlamaConfig) -> None:
    """Everything of a SALM folder but the weights: configs and tokenizer files."""
    (folder / BACKBONE).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(salm_config(llm_config), indent=2) + "\n")
    llm_config.save_pretrained(folder / BACKBONE)
    save_tokenizer(build_tokenizer(), folder)


def build_salm(folder: Path, teacher: Path):
    """A fresh SALM in ``folder``'s frame, with the teacher's weights as its LLM."""
    from nemo.collections.speechlm2.models import SALM

    llm = LlamaForCausalLM.from_pretrained(teacher)
    write_frame(folder, llm.config)
    config = salm_config(llm.config) | {"pretrained_llm": str(folder / BACKBONE), "tokenizer_path": str(folder)}
    model = SALM(config)
    weights = llm.state_dict()
    model.embed_tokens.weight.data.copy_(weights["model.embed_tokens.weight"])
    missing, unexpected = model.llm.load_state_dict(weights, strict=False)
    if missing or unexpected != ["model.embed_tokens.weight"]:
        raise RuntimeError(f"the teacher's weights do not fit: missing {missing}, unexpected {unexpected}")
    return model


def save_salm(model, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights in half precision (NeMo's loader casts them back) beside the frame."""
    state = {name: _compact(tensor, dtype) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)


def load_salm(folder: Path):
    """``SALM.from_pretrained``, after a check by hand that no key is missing or unexpected."""
    from nemo.collections.speechlm2.models import SALM

    model = SALM.from_pretrained(str(folder)).eval()
    stored, expected = set(load_file(folder / "model.safetensors")), set(model.state_dict())
    if stored != expected:
        raise RuntimeError(f"missing keys {sorted(expected - stored)}, unexpected keys {sorted(stored - expected)}")
    return model


def text_llm(model) -> LlamaForCausalLM:
    """A copy of the SALM's LLM that reads text."""
    llm = LlamaForCausalLM(model.llm.config)
    state = dict(model.llm.state_dict()) | {"model.embed_tokens.weight": model.embed_tokens.weight}
    llm.load_state_dict(state)
    return llm.eval()


@torch.no_grad()
def respond(
    model, clips: Sequence[Tensor], prompt: str, *, max_new_tokens: int = 30, batch_size: int = 50, **sampling
) -> list[str]:
    """Answers to spoken prompts through NeMo's own ``SALM.generate``, cut before the end of the turn."""
    from .chat import cut_turn

    model.eval()
    answers = []
    for first in range(0, len(clips), batch_size):
        chunk = clips[first : first + batch_size]
        audio, lengths = pad_clips(chunk)
        turns = [[{"role": "user", "content": prompt}] for _ in chunk]
        ids = model.generate(prompts=turns, audios=audio, audio_lens=lengths, max_new_tokens=max_new_tokens, **sampling)
        answers += [cut_turn(model.tokenizer.tokenizer, row) for row in ids.tolist()]
    return answers


def _compact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().clone().contiguous()
