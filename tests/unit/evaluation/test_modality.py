# SPDX-License-Identifier: Apache-2.0
"""Conditions that are read, and conditions on a curve, are shown on their own and never compared arm by arm."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic_study as synthetic

from nemo_rba.evaluation.conditions import HeldOut, check_curves
from nemo_rba.evaluation.modality import probability
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.statistics import Interval

TEST = Path("test")
SETS = {
    "held-out voices": HeldOut(manifest=TEST),
    "typed": HeldOut(manifest=TEST, typed=True),
    **{f"{at} dB": HeldOut(manifest=TEST, curve="SNR, dB", at=at) for at in (20, 0, 10)},
}


def predictions():
    """The made-up study once for each condition; the cascade is not asked to read."""
    made = [p for p in synthetic.make_predictions(60) if p.task == "held-out voices"]
    found = [replace(p, task=name) for name in SETS for p in made]
    found = [p for p in found if p.task != "typed" or p.system != "cascade"]
    return [replace(p, value=0.0) if p.task == "0 dB" and p.system.startswith("rba") else p for p in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(
        folder=folder, title="modality", roles=synthetic.ROLES, predictions=predictions(), curves=None, budget={},
        held_out=SETS, notes=[], num_samples=2, num_draws=100, seed=0,
    )  # fmt: skip
    return folder


def test_reading_is_set_beside_the_start_model_that_reads(folder):
    page = (folder / "report.md").read_text()
    section = page.split("## On text: typed (60 items)")[1].split("##")[0]
    assert "Cascade" not in section
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("| ")}
    start, rba = (
        np.mean([p.value for p in predictions() if p.task == "typed" and p.system.startswith(name)])
        for name in ("start", "rba")
    )
    assert f"{rba - start:+.1f} [" in rows["RBA"]
    assert rows["Start"].count("–") == 2
    assert float(rows["RBA"].split("|")[4]) < 0.05, "18 points of 60 items are no accident"


def test_a_curve_is_drawn_in_order_and_says_what_was_found(folder):
    page = (folder / "report.md").read_text()
    section = page.split("## Robustness: SNR, dB")[1].split("##")[0]
    assert "| system | 0 | 10 | 20 |" in section
    (row,) = [line for line in section.splitlines() if line.startswith("| RBA ")]
    assert row.split("|")[2].startswith(" 0.0 ["), "0 dB, where RBA answers nothing right"
    assert (folder / "plots" / "robustness-1.png").stat().st_size > 10_000


def test_what_a_model_loses_by_hearing_is_paired_item_by_item(folder):
    page = (folder / "report.md").read_text()
    section = page.split("## The modality gap of each model: held-out voices against typed (60 items)")[1].split("##")[
        0
    ]
    rows = {line.split("|")[1].strip(): line.split("|") for line in section.splitlines() if line.startswith("| ")}
    assert "Cascade" not in rows, "it does not read"
    for label, row in rows.items():
        if label not in ("who", "---"):
            assert "+0.0 [+0.0, +0.0]" in row[4], "this study gave the same answers heard and read"
            assert row[5].strip() == "1.000"
    assert page.count("## The modality gap") == 1, "a point of a curve is not plain hearing"


def test_a_p_value_is_never_zero():
    difference = Interval(value=1.0, low=0.5, high=1.5, p_value=1 / 2001)
    assert probability(difference) == "<.001"
    assert probability(replace(difference, p_value=0.0005)) == "0.001"
    assert probability(replace(difference, p_value=None)) == probability(replace(difference, value=np.nan)) == "–"


def test_two_conditions_at_one_place_of_a_curve_are_refused():
    sets = {"a": HeldOut(manifest=TEST, curve="SNR, dB", at=0), "b": HeldOut(manifest=TEST, curve="SNR, dB", at=0.0)}
    with pytest.raises(ValueError, match="'a' and 'b' are both at 0 of the curve 'SNR, dB'"):
        check_curves(sets)
    check_curves(sets | {"b": HeldOut(manifest=TEST, curve="speed", at=0)} | {"c": HeldOut(manifest=TEST)})


def test_arms_are_compared_where_they_hear_plainly_only(folder):
    page = (folder / "report.md").read_text()
    assert "gap closed, held-out voices" in page
    assert "gap closed, typed" not in page
    assert "gap closed, 10 dB" not in page
    assert len(json.loads((folder / "results.json").read_text())["conditions"]) == 5


def test_nothing_can_be_in_the_way_of_reading():
    with pytest.raises(ValueError, match="typed condition of test has an augmentation or a curve"):
        HeldOut(manifest=TEST, typed=True, curve="SNR, dB")
