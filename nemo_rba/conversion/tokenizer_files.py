# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face tokenizer, so that transformers 4 and 5 both read them.

transformers 5 writes a class, and a kind of list of special tokens, that 4 (NeMo 2.7.3) does not know: a model exported
where it was trained would not open elsewhere. 5 reads the names of 4.
"""

import json
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_OPTIONAL = ("chat_template.jinja",)


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a folder that has a tokenizer, by name, for both versions."""
    names = [*TOKENIZER_FILES, *(name for name in _OPTIONAL if (folder / name).is_file())]
    return for_both_versions({name: (folder / name).read_bytes() for name in names})


def for_both_versions(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files, with ``tokenizer_config.json`` under the names of transformers 4 where those of 5 are new."""
    config = json.loads(files["tokenizer_config.json"])
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed == config:
        return files
    return files | {"tokenizer_config.json": (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()}
