# SPDX-License-Identifier: Apache-2.0
"""What a teacher is loaded from: a Hugging Face folder, its vocabulary and its chat template."""

from pathlib import Path

import torch

SENTINEL = "nemorbasentinel"  # stands for a message's content where a chat template is taken apart


def check_hf_folder(path: Path) -> None:
    """Raise ValueError naming what a Hugging Face folder lacks: config, tokenizer or weights."""
    if not (path / "config.json").is_file():
        raise ValueError(f"no model in {path} (teacher.path): config.json is missing; give a Hugging Face model's "
                         "folder, e.g. one that `hf download <name> --local-dir <folder>` wrote")  # fmt: skip
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"no tokenizer in {path} (teacher.path): tokenizer.json is missing; copy it from the model")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ValueError(f"no weights in {path} (teacher.path): *.safetensors is missing; download the whole model")


def load_hf_model(path: str, dtype: torch.dtype, *, device_map: str | None):
    """The folder's causal LM, spread by ``device_map``. Raises ValueError where the weights lack tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_rba.conversion.families import with_rope

    config = with_rope(AutoConfig.from_pretrained(path, local_files_only=True))
    model, info = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, device_map=device_map
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"the weights in {path} (teacher.path) lack {len(missing)} tensors ({', '.join(missing[:3])})"
                         "; download the whole model")  # fmt: skip
    return model


def end_of_turn(tokenizer, role: str) -> int | None:
    """Id of the special token that follows a message of ``role`` in the chat template; None if there is none."""
    messages = [{"role": "user", "content": SENTINEL if role == "user" else "hello"}]
    if role == "assistant":
        messages.append({"role": "assistant", "content": SENTINEL})
    after = tokenizer.apply_chat_template(messages, tokenize=False).partition(SENTINEL)[2]
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return ids[0] if ids and ids[0] in special else None


def check_same_vocabulary(teacher_vocab: dict[str, int], student_vocab: dict[str, int]) -> None:
    """Raise ValueError unless every teacher token has the same id in the student.

    Dense judgement compares ids, so one shifted token would silently reward the wrong words. The student may have
    further tokens of its own, such as the audio locator, which it never writes.
    """
    ordered = sorted(teacher_vocab.items(), key=lambda item: item[1])
    different = [
        (token, index) for token, index in ordered if token not in student_vocab or student_vocab[token] != index
    ]
    if not different:
        return
    shown = [
        f"{t!r} is {i} for the teacher, {student_vocab.get(t, 'absent')} for the student" for t, i in different[:5]
    ]
    raise ValueError(
        f"teacher and student differ in {len(different)} of {len(ordered)} tokens: {'; '.join(shown)}. Token-level "
        "judgement needs a teacher of the student's family: change teacher.path, or use a reward over text"
    )
