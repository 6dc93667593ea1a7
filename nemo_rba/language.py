# SPDX-License-Identifier: Apache-2.0
"""In which language is a text? py3langid: the naive Bayes model of langid.py (ACL 2012, P12-3005).

Its model of about a hundred languages comes inside the package, so that nothing is downloaded.
"""

from functools import lru_cache


@lru_cache(maxsize=8)
def language_identifier(candidates: tuple[str, ...]):
    """py3langid's model, telling apart ``candidates`` (ISO 639-1), or all it knows; loaded once (seconds).

    Returns:
        The model, whose ``rank(text)`` gives (code, probability), the likeliest first; and the codes it tells apart.

    Raises:
        ValueError: a code that py3langid does not know.
        ImportError: py3langid is missing.
    """
    try:
        from py3langid import langid
    except ImportError as error:
        raise ImportError("to tell languages apart, pip install py3langid (4.5 MB, its model inside)") from error
    kind = langid.LanguageIdentifier
    load = getattr(kind, "from_model_file", None) or kind.from_pickled_model  # from 0.4; before
    identifier = load(langid.MODEL_FILE, norm_probs=True)
    known = frozenset(str(code) for code in identifier.nb_classes)
    unknown = sorted(set(candidates) - known)
    if unknown:
        raise ValueError(
            f"py3langid does not know {unknown}; expected codes such as en, de, zh in languages and candidates"
        )
    if candidates:
        identifier.set_languages(list(candidates))
    return identifier, frozenset(candidates) or known


def num_letter_bytes(text: str) -> int:
    """How much there is to judge by: bytes in UTF-8 of its letters; a Latin letter has one, a Chinese one three."""
    return sum(len(character.encode()) for character in text if character.isalpha())
