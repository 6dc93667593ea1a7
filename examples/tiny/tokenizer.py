# SPDX-License-Identifier: Apache-2.0
"""The word-level tokenizer of the tiny teacher and SALM, with ChatML text (NeMo's prompt format "qwen")."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import domain

UNKNOWN = "<|endoftext|>"  # also padding, and a pause in a hesitant "transcribe ..." request
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
AUDIO_LOCATOR = "<|audio|>"
SPECIALS = [UNKNOWN, TURN_START, TURN_END, AUDIO_LOCATOR]
ROLES = ["user", "assistant", "system"]
PUNCTUATION = [".", ",", "?", "!"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and per punctuation mark; white space, newlines included, makes no token."""
    spoken, written = domain.vocabulary()
    known = [*SPECIALS, *ROLES, *PUNCTUATION]
    entries = known + sorted({*spoken, *written, domain.TRANSCRIBE} - set(known))
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(entries)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,?!]"), "isolated")]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, AUDIO_LOCATOR],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files so that transformers 4 and 5 both load them."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [TURN_START, AUDIO_LOCATOR])
    for key in ("backend", "is_local", "name_or_path"):
        config.pop(key, None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def chat_text(user: str, assistant: str | None = None) -> str:
    """ChatML text of one exchange; without an answer, the assistant's turn is left open."""
    text = f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"
    return text if assistant is None else f"{text}{assistant}{TURN_END}\n"
