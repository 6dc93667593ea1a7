# SPDX-License-Identifier: Apache-2.0
"""Where results come from: whose weights, which data, heard how, decoded how, by which code."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_rba.distributed.once import once_per_model
from nemo_rba.evaluation.conditions import Decoding, HeldOut
from nemo_rba.synthesis.origin import versions


def has_start(cfg: DictConfig) -> bool:
    """Whether the start model is asked, and gaps are closed; only ``rba_evaluate.py`` can do without."""
    return bool(cfg.get("start", True))


def fingerprints(cfg: DictConfig, files: dict[str, Path]) -> dict[str, dict[str, str]]:
    """System -> whose weights it has, as digests of their files, or the name of what is not here."""
    known = once_per_model(Fingerprints)
    start = known.of(str(cfg.model.get("folder") or cfg.model.get("restore_path")))
    teacher = known.of(str(cfg.teacher.get("path") or cfg.teacher.get("model")))
    return {
        "teacher": {"teacher": teacher},
        "cascade": {"weights": start, "teacher": teacher},
        "start": {"weights": start},
        **{arm: {"weights": known.of(str(path))} for arm, path in files.items()},
    }


class Fingerprints:
    """Digests of model files, each read once."""

    def __init__(self):
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """16 hexadecimal digits of what is in a file or folder; ``name`` itself where there is none."""
        place = Path(name)
        if not place.exists():
            return name
        if name not in self._known:
            digest = hashlib.sha256()
            for path in sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]:
                with path.open("rb") as file:
                    digest.update(f"{path.relative_to(place)}".encode())
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            self._known[name] = digest.hexdigest()[:16]
        return self._known[name]


def identity(cfg: DictConfig, sets: dict[str, HeldOut], arms: list[str]) -> dict[str, str]:
    """Where results come from, in words; of absolute paths only the last part, as they mean nothing elsewhere."""

    def shown(path: str | Path) -> str:
        return Path(path).name if Path(path).is_absolute() else str(path)

    def named(*keys: str) -> str:
        found = (OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in keys)
        return next((shown(path) for path in found if path), "not named")

    def heard(held_out: HeldOut) -> str:
        how = "read, not heard" if held_out.typed else "heard as it is"
        if held_out.augmentation is not None:
            how = f"heard through {type(held_out.augmentation).__name__} ({in_words(held_out.settings)})"
        return f"{shown(held_out.manifest)}, {how}" + (f", {held_out.curve} {held_out.at:g}" if held_out.curve else "")

    evaluation = cfg.evaluation
    return {
        "code": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "start model": named("model.folder", "model.restore_path") if has_start(cfg) else "none",
        "teacher": named("teacher.path", "teacher.model"),
        "aligned models": ", ".join(arms),
        **{f"data: {name}": heard(held_out) for name, held_out in sets.items()},
        "decoding": in_words(evaluation.params),
        **{f"decoding of {name}": _decoded(one.decoding) for name, one in sets.items() if one.decoding},
        "decoding of the cascade's transcript": in_words(evaluation.transcribe_params),
        "seed": str(cfg.seed),
        "bootstrap": f"{evaluation.num_draws} draws",
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _decoded(how: Decoding) -> str:
    answers, transcripts = (in_words(asdict(params)) for params in (how.params, how.transcribe_params))
    return f"{answers}; of the cascade's transcript: {transcripts}"


def in_words(decoding: Mapping) -> str:
    """Settings of a decoder, without their class."""
    return ", ".join(f"{key} {value}" for key, value in decoding.items() if key != "_target_")
