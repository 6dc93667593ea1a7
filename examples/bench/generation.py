# SPDX-License-Identifier: Apache-2.0
"""Group sampling beside ``SALM.generate(num_return_sequences=G)``: speed, and the cost of one more."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from nemo.collections.speechlm2.models import SALM

from bench.systems import Load, Times, alternate, answer_nemo, answer_ours, noise_clips, num_parameters
from nemo_rba.models.rba_speech_lm import RBASpeechLM

AIMS = {3.0: 2.0, 20.0: 4.0}  # seconds of audio -> how many times faster than NeMo we want to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both systems under one load."""

    llm: str
    load: Load
    ours: Times
    nemo: Times
    encoder: Times  # the speech encoder alone: both run it once, and what a policy shares with its update
    greedy_agreement: float | None = None  # share of equal tokens


def compare(model: RBASpeechLM, salm: SALM, load: Load, *, repeats: int, check_greedy: bool) -> Comparison:
    """Time both systems under the same load, taking turns."""
    batch = noise_clips(model, load.prompts, load.seconds)
    times = alternate(
        {
            "ours": lambda: answer_ours(model, batch, load),
            "nemo": lambda: answer_nemo(salm, batch, load),
            "encoder": torch.no_grad()(lambda: model.encode(batch)),
        },
        repeats,
    )
    agreement = greedy_agreement(model, salm, replace(load, group=1)) if check_greedy else None
    return Comparison(llm=num_parameters(model), load=load, **times, greedy_agreement=agreement)


def greedy_agreement(model: RBASpeechLM, salm: SALM, load: Load) -> float:
    """Share of greedy tokens on which the two systems agree: the proof that their weights are the same."""
    batch = noise_clips(model, load.prompts, load.seconds)
    ours = answer_ours(model, batch, load, temperature=0.0)
    locator, size = model.prompt.audio_locator_id, model.llm_config.vocab_size
    no_words = [locator, *range(model.prompt.vocab_size, size)]  # which our sampler never chooses
    nemo = answer_nemo(salm, batch, load, do_sample=False, suppress_tokens=no_words)
    return float((ours == nemo[:, -load.tokens :].to(ours.device)).float().mean())


def by_group(model: RBASpeechLM, salm: SALM, load: Load, groups: Sequence[int], repeats: int) -> list[Comparison]:
    """Cost against the number of answers, at one length of audio."""
    return [compare(model, salm, replace(load, group=g), repeats=repeats, check_greedy=False) for g in groups]


def by_audio(model: RBASpeechLM, salm: SALM, load: Load, lengths: Sequence[float], repeats: int) -> list[Comparison]:
    """Cost against seconds of audio, at one number of answers."""
    return [compare(model, salm, replace(load, seconds=s), repeats=repeats, check_greedy=False) for s in lengths]


def slope(places: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Least-squares line through (place, cost): what one more costs, and the cost at 0."""
    rise, start = np.polyfit(np.asarray(places, float), np.asarray(costs, float), 1)
    return float(rise), float(start)


def cost_per_prompt(times: Times, load: Load) -> float:
    """Milliseconds of CPU for one prompt with all its answers."""
    return 1000 * times.median / load.prompts


def speed_rows(found: Sequence[Comparison]) -> list[dict[str, str]]:
    """Table 1."""
    rows = []
    for one in found:
        answers = one.load.prompts * one.load.group
        ratio, low, high = one.nemo.over(one.ours)
        aim = AIMS.get(one.load.seconds)
        rows.append(
            {
                "LLM": one.llm,
                "audio": f"{one.load.seconds:g} s",
                "ours, answers/s": f"{answers / one.ours.median:.1f}",
                "NeMo, answers/s": f"{answers / one.nemo.median:.1f}",
                "ours, ms/answer": one.ours.per(answers),
                "NeMo, ms/answer": one.nemo.per(answers),
                "ours / NeMo speed": f"**{ratio:.2f}** [{low:.2f}, {high:.2f}]",
                "aim": f"{aim:g}" if aim else "",
                "encoder, ms/answer": one.encoder.per(answers),
                "speed without encoder": f"{one.nemo.less(one.encoder).over(one.ours.less(one.encoder))[0]:.2f}",
                "greedy tokens equal": "" if one.greedy_agreement is None else f"{one.greedy_agreement:.1%}",
            }
        )
    return rows


def sweep_rows(found: Sequence[Comparison], attribute: str, label: str) -> list[dict[str, str]]:
    """Table 2: one row a place, and a last one with the fitted slopes."""
    rows, places = [], [getattr(one.load, attribute) for one in found]
    for one, place in zip(found, places, strict=True):
        rows.append(
            {
                "LLM": one.llm,
                label: f"{place:g}",
                "ours, ms/prompt": one.ours.per(one.load.prompts),
                "NeMo, ms/prompt": one.nemo.per(one.load.prompts),
                "NeMo / ours": f"{one.nemo.over(one.ours)[0]:.2f}",
            }
        )
    if len(found) > 1:
        ours, nemo = (
            slope(places, [cost_per_prompt(getattr(one, name), one.load) for one in found]) for name in ("ours", "nemo")
        )
        line = {"LLM": found[0].llm, label: "fitted: each one more"}
        line |= {
            f"{name}, ms/prompt": f"{fit[0]:.2f} (+ {fit[1]:.1f})" for name, fit in (("ours", ours), ("NeMo", nemo))
        }
        rows.append(line | {"NeMo / ours": f"{nemo[0] / ours[0]:.2f}"})
    return rows
