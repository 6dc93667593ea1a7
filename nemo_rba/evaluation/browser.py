# SPDX-License-Identifier: Apache-2.0
"""``samples.html``: every item of an evaluation, searchable, with every system's answer; a drawn few can be heard.

One file that needs no other: the predictions stand in it as JSON, and a script of ours (``browser_script.py``) shows
them. It asks for nothing from elsewhere and its content security policy lets it ask for nothing. Answers are shown as
text only, so nothing in them can become markup or run.
"""

import base64
import difflib
import hashlib
import html
import json
import math
import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from string import Template

from nemo_rba.evaluation.browser_page import PAGE, STYLE
from nemo_rba.evaluation.browser_script import SCRIPT
from nemo_rba.evaluation.browser_sounds import Sound, audio_uri, spectrogram_uri
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import Prediction

FILE_NAME = "samples.html"
FIELDS = ("id", "family", "kind", "speaker", "context", "text", "reference")  # what all answers to an item share


def choose_items(
    predictions: Sequence[Prediction], roles: Roles, num_items: int, seed: int
) -> dict[str, list[str]]:  # fmt: skip
    """Which items can be heard: condition -> ids, ``num_items`` in all, shared out evenly over the conditions.

    In each condition in turn one item on which the first arm's score rose above the start's (or the teacher's, where
    there is no start), one on which it fell below and one on which it stayed, as long as there are such. Order is drawn
    by (seed, id) alone, so conditions made of the same set tend to have the same items.

    Args:
        predictions: of the conditions that are heard; leave typed ones out.

    Raises:
        ValueError: ``num_items`` is negative.
    """
    if num_items < 0:
        raise ValueError(f"num_sounds is {num_items}, expected 0 or more: change evaluation.num_sounds")
    names = list(dict.fromkeys(prediction.task for prediction in predictions))
    chosen = {}
    for place, name in enumerate(names):
        before, after = (
            {p.id: _score(p) for p in predictions if p.task == name and p.system == roles.seeds(label)[0]}
            for label in (roles.bounds[0], roles.arms[0])
        )
        ids = dict.fromkeys(prediction.id for prediction in predictions if prediction.task == name)
        ids = sorted(ids, key=lambda id: random.Random(f"{seed}/{id}").random())
        groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for id in ids:
            groups[_sign(before.get(id), after.get(id))].append(id)
        in_turn = [id for turn in zip_longest(*groups.values()) for id in turn if id is not None]
        share = num_items // len(names) + (place < num_items % len(names))
        chosen[name] = in_turn[:share]
    return chosen


def write_browser(
    *,
    folder: str | Path,
    title: str,
    roles: Roles,
    predictions: Sequence[Prediction],
    sounds: Mapping[str, Mapping[str, Sound]],
    identity: Mapping[str, str],
) -> Path:
    """Write ``samples.html`` into ``folder``, beside ``report.html``, and return its path.

    Size: some 120 bytes a short answer, so 1.2 MB for 1000 items of 10 systems, and 0.13 MB a sound of 2.6 s, so
    6.4 MB for 48 of them.

    Args:
        predictions: of all systems on all tasks, from ``runner.run``.
        sounds: condition -> id -> what was heard, for some items only, see ``choose_items``.
        identity: what -> value, to tell where the page comes from: models, data, seeds, decoding, version. Shown as
            given: put no absolute paths in it.

    Raises:
        ValueError: predictions of a system without a role; a sound of an item that nobody answered.
    """
    items = _items(predictions, roles)
    for condition, heard in sounds.items():
        for id, sound in heard.items():
            if (condition, id) not in items:
                raise ValueError(f"a sound of item {id!r} of condition {condition!r}, which no prediction is of")
            items[condition, id]["sound"] = {
                "audio": audio_uri(sound), "picture": spectrogram_uri(sound), "seconds": round(sound.seconds, 2)
            }  # fmt: skip
    systems = list(roles.systems)
    measures = {prediction.task: prediction.measure for prediction in predictions}
    data = {
        "title": title,
        "identity": dict(identity),
        "systems": [{"name": name, "label": _label(name, roles)} for name in systems],
        "first": systems.index(roles.seeds(roles.bounds[0])[0]),
        "second": systems.index(roles.seeds(roles.arms[0])[0]),
        "conditions": [{"name": name, "measure": measure} for name, measure in measures.items()],
        "items": list(items.values()),
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(title, data), encoding="utf-8")
    return path


def _items(predictions: Sequence[Prediction], roles: Roles) -> dict[tuple[str, str], dict]:
    """(condition, id) -> an item as the page takes it: ``answers`` has one entry a system, None where it has none."""
    places = {system: place for place, system in enumerate(roles.systems)}
    conditions = {name: place for place, name in enumerate(dict.fromkeys(p.task for p in predictions))}
    items: dict[tuple[str, str], dict] = {}
    for prediction in predictions:
        if prediction.system not in places:
            raise ValueError(
                f"predictions of system {prediction.system!r} without a label, expected {list(places)}: see "
                "report.systems"
            )
        item = items.setdefault(
            (prediction.task, prediction.id),
            {
                "condition": conditions[prediction.task],
                **{key: getattr(prediction, key) for key in FIELDS},
                "answers": [None] * len(places),
                "sound": None,
            },
        )
        item["answers"][places[prediction.system]] = {
            "response": prediction.response,
            "score": _score(prediction),
            "truncated": prediction.truncated,
            "heard": _heard(prediction) if prediction.heard != prediction.text else None,
        }
    return items


def _heard(prediction: Prediction) -> list[tuple[str, str]]:
    """What a cascade took for the instruction, beside what was said: "=" both, "-" only said, "+" only heard."""
    said, heard = prediction.text.split(), prediction.heard.split()
    pieces = []
    for how, a, b, c, d in difflib.SequenceMatcher(a=said, b=heard, autojunk=False).get_opcodes():
        if how == "equal":
            pieces.append(("=", " ".join(said[a:b])))
        else:
            pieces += [(sign, " ".join(words)) for sign, words in (("-", said[a:b]), ("+", heard[c:d])) if words]
    return pieces


def _score(prediction: Prediction) -> float | None:
    """The item's own score in percent; None where it has none, as an error rate over no words."""
    score = prediction.value / prediction.weight if prediction.weight else math.nan
    return round(score, 4) if math.isfinite(score) else None


def _sign(before: float | None, after: float | None) -> int:
    return 0 if before is None or after is None else (after > before) - (after < before)


def _label(name: str, roles: Roles) -> str:
    """The label, with the name where several seeds share it."""
    label = roles.systems[name]
    return label if len(roles.seeds(label)) == 1 else f"{label} ({name})"


def _page(title: str, data: Mapping) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    identity = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd></div>\n"
        for what, value in data["identity"].items()
    )
    return Template(PAGE).substitute(
        title=html.escape(title), style=STYLE, script=SCRIPT, digest=digest, identity=identity, data=_json(data)
    )


def _json(data: Mapping) -> str:
    """JSON in which no character can end or open a tag: ``</script>`` becomes ``\\u003c/script\\u003e``."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&"})
