# SPDX-License-Identifier: Apache-2.0
"""What NeMo's synthesizers share: how a model is loaded, and what its tokenizer cannot say."""

import contextlib
import functools
import unicodedata
from collections.abc import Callable
from pathlib import Path

SAID_PUNCTUATION = "%&@#"  # what a reader would say; a tokenizer may skip other punctuation


def load_nemo(model_class, source: str, key: str, device: str):
    """A ``.nemo`` file or a pretrained model, in evaluation mode on ``device``."""
    advice = f"download it where there is a network (ngc.nvidia.com or huggingface.co) and give the file as tts.{key}"
    path = Path(source)
    if source.endswith(".nemo"):
        if not path.is_file():
            raise ValueError(f"tts.{key}: no file {source!r} with a {model_class.__name__}; {advice}")
        load: Callable = functools.partial(model_class.restore_from, str(path), map_location=device)
    else:
        load = functools.partial(model_class.from_pretrained, source, map_location=device)
    try:
        model = load()
    except Exception as error:
        raise ValueError(
            f"tts.{key}: cannot load {model_class.__name__} {source!r} ({type(error).__name__}: {error}); {advice}"
        ) from error
    return model.eval().to(device)


def check_sayable(text: str, tokenizer, name: str) -> None:
    """Raise ValueError where a tokenizer of NeMo would pass over letters, digits or symbols, or finds nothing to say.

    Such a tokenizer makes pieces of a text, characters or phonemes, and skips those it does not know with no more than
    a warning. ``name`` is the synthesizer's, for the message.
    """
    prepared = tokenizer.text_preprocessing_func(text)
    with tokenizer.set_phone_prob(1.0) if hasattr(tokenizer, "set_phone_prob") else contextlib.nullcontext():
        pieces = tokenizer.g2p(prepared) if hasattr(tokenizer, "g2p") else prepared
    known = set(tokenizer.tokens)
    skipped = [p for p in pieces if p not in known and not (len(p) == 3 and p[:2] in known)]  # AH0: AH without stress
    skipped = [piece for piece in dict.fromkeys(skipped) if any(map(_is_said, piece))]
    if skipped or not any(character.isalnum() for character in text):
        why = f"its tokenizer does not know {', '.join(map(repr, skipped))}" if skipped else "it has no letters"
        raise ValueError(f"{name} cannot say {text!r}: {why}; write numbers and symbols in words, in the letters of "
                         "its language (synthesis.spoken_form, synthesis.speech_filters)")  # fmt: skip


def _is_said(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMNS" or character in SAID_PUNCTUATION
