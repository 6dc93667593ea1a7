# SPDX-License-Identifier: Apache-2.0
"""What the config inside a model file may ask for: NeMo's own speech modules, and nothing else."""

import re

_SPEECH_MODULE = re.compile(r"nemo\.collections\.(asr\.modules|speechlm2\.modules\.perception)\.[A-Z]\w*")
_CLASS_KEYS = ("_target_", "target", "cls")
_CALL_KEYS = ("_args_", "_partial_", "trust_remote_code")


def refuse_foreign_code(node, where: str) -> None:
    """Check a config of plain dictionaries and lists; ``where`` names it in the error.

    Only classes are allowed, by their short path: an allow-listed module would also lead to the functions and modules
    it imports.

    Raises:
        ValueError: a class, an argument or an interpolation that could run or read what is not in the file.
    """
    if isinstance(node, str) and "${" in node:
        raise ValueError(f"{where} is {node!r}; expected a value, not an interpolation, in a model file")
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        path = f"{where}.{key}"
        if key in _CLASS_KEYS and not _SPEECH_MODULE.fullmatch(str(value)):
            raise ValueError(
                f"{path} is {value!r}; expected a class of nemo.collections.asr.modules or "
                "nemo.collections.speechlm2.modules.perception: nothing else is built from a model file"
            )
        if key in _CALL_KEYS and value:
            raise ValueError(f"{path} is set to {value!r}; code from a model file is never run")
        refuse_foreign_code(value, path)
