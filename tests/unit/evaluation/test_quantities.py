# SPDX-License-Identifier: Apache-2.0
"""What else was read off the answers stands in the report, with how it was computed; also where nothing is compared."""

import json
from dataclasses import replace

import synthetic_study as synthetic

from nemo_rba.evaluation.report import write_report

BLEU, TER = "accuracy|how:by hand", "TER|case:lc"


def predictions(measure: str):
    """The made-up study, read twice: right or wrong, and as errors of ten words."""
    made = [p for p in synthetic.make_predictions(40) if p.task == "held-out voices"]
    return [
        replace(p, measure=measure, statistics={BLEU: [p.value, 1.0], TER: [500.0 - 4 * p.value, 10.0]}) for p in made
    ]


def report(folder, made, **changes):
    settings = {"title": "t", "roles": synthetic.ROLES, "curves": None, "budget": {}, "held_out": {}, "notes": []}
    settings |= {"num_samples": 2, "num_draws": 50, "seed": 0}
    write_report(folder=folder, predictions=made, **(settings | changes))
    return (folder / "report.md").read_text()


def test_all_measures_have_their_table_and_their_signatures(tmp_path):
    made = predictions("score")
    page = report(tmp_path, made)
    section = page.split("## All measures: held-out voices (40 items)")[1].split("##")[0]
    assert "| system | accuracy | TER |" in section
    assert "- accuracy: how:by hand" in section
    assert "- TER: case:lc" in section
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("| ")}
    share = sum(p.value for p in made if p.system == "start") / 40
    assert f"| {share:.1f} [" in rows["Start"]
    assert f"| {(500 - 4 * share) / 10:.1f} [" in rows["Start"]
    marked = [line.count("**") for line in rows.values() if "**" in line]
    assert marked == [4], "one arm is best in both: the lower TER belongs to the higher accuracy"
    assert ", p 0." in page.split("gap closed, held-out voices")[1].split("##")[0], "differences are tested"


def test_a_transcription_alone_is_reported_without_a_comparison(tmp_path):
    page = report(tmp_path, predictions("wer"))
    assert "Recognition: word error rate" in page
    assert "gap closed" not in page
    assert json.loads((tmp_path / "results.json").read_text())["headline"] == []
