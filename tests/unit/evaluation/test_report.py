# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import synthetic_study as synthetic
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nemo_rba.evaluation.plots import TrainingCurves, _legend_above, read_curve
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles, summarise

NUM_ITEMS = 200


@pytest.fixture(scope="module")
def predictions():
    return synthetic.make_predictions(NUM_ITEMS)


def make_report(folder, predictions, **changes):
    settings = {
        "folder": folder,
        "title": "A <made-up> study",
        "roles": synthetic.ROLES,
        "predictions": predictions,
        "curves": None,
        "budget": {"RBA": {"clips": "1.9k"}, "SFT": {"clips": "1.9k", "time": "45 s"}},
        "notes": ["Choices were made on dev."],
        "held_out": {},
        "num_samples": 4,
        "num_draws": 200,
        "seed": 0,
    }
    return write_report(**settings | changes)


def test_numbers_agree_with_a_direct_computation(predictions):
    whole = summarise(predictions, synthetic.ROLES, num_draws=50, seed=0)[0].whole

    def mean(*systems):
        return np.mean([p.value for p in predictions if p.task == "held-out voices" and p.system in systems])

    start, teacher, rba, sft = mean("start"), mean("teacher"), mean("rba-0", "rba-1", "rba-2"), mean("sft-0", "sft-1")
    assert whole.num_items == NUM_ITEMS
    assert whole.scores["RBA"].value == pytest.approx(rba)
    assert whole.seeds["RBA"] == pytest.approx([mean("rba-0"), mean("rba-1"), mean("rba-2")])
    assert whole.gap_closed["SFT"].value == pytest.approx(100 * (sft - start) / (teacher - start))
    assert whole.differences["SFT"].value == pytest.approx(rba - sft)


def test_parts_split_the_items(predictions):
    condition = summarise(predictions, synthetic.ROLES, num_draws=50, seed=0)[1]
    assert condition.name == "seen voices"
    assert {kind: part.num_items for kind, part in condition.kinds.items()} == {"one answer": 120, "open": 80}
    assert sum(part.num_items for part in condition.families.values()) == NUM_ITEMS
    wrong = [p for p in predictions if p.task == "seen voices" and p.heard != p.text]
    assert condition.heard_wer == {"Cascade: transcribe, then teacher": pytest.approx(100 * len(wrong) / 7 / NUM_ITEMS)}


def test_the_report_is_written_and_contains_the_numbers(predictions, tmp_path):
    results = make_report(tmp_path, predictions, curves=synthetic.write_curves(tmp_path))
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["headline"] == results["headline"]
    whole = stored["conditions"][0]["whole"]
    closed, score = whole["gap_closed"]["RBA"], whole["scores"]["RBA"]
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for text in (markdown, page):
        assert f"RBA closed {closed['value']:.1f} % [{closed['low']:.1f}, {closed['high']:.1f}]" in text
        assert f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" in text
        assert "held-out voices, 200 items, 3 seeds" in text
        assert "SFT: 2 training seed(s), 3 are needed for a claim." in text
        assert "Choices were made on dev." in text
    assert page.count("data:image/png;base64,") == 4
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"systems", "gap", "families", "curves"}


def test_the_report_leads_to_all_items_and_its_results_say_where_they_come_from(predictions, tmp_path):
    make_report(tmp_path, predictions, identity={"code": "nemo_rba 1.2"}, samples_page="all samples.html")
    assert '<a href="all%20samples.html">All items' in (tmp_path / "report.html").read_text()
    assert "[All items, to search, compare and hear](all%20samples.html)" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["identity"] == {"code": "nemo_rba 1.2"}
    make_report(tmp_path, predictions)
    assert "All items" not in (tmp_path / "report.html").read_text()


def test_answers_cannot_break_the_page(predictions, tmp_path):
    make_report(tmp_path, predictions)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert r"\| something \*else\* \<b\>" in markdown
    assert "A &lt;made-up&gt; study" in page
    opened = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag != "b"
            if tag not in ("meta", "img"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(page)
    assert opened == []


def test_samples_show_both_directions_and_are_seeded(predictions, tmp_path):
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_report(tmp_path / name, predictions, seed=seed)
        pages.append((tmp_path / name / "report.md").read_text().split("## Sample prompts")[1])
    assert pages[0] == pages[1] != pages[2]
    assert (pages[0].count("| better |"), pages[0].count("| worse |")) == (2, 2)


def test_without_a_start_nothing_is_said_of_a_gap(predictions, tmp_path):
    labels = {name: label for name, label in synthetic.ROLES.systems.items() if label != synthetic.ROLES.start}
    alone = replace(synthetic.ROLES, systems=labels, start=None)
    asked = [p for p in predictions if p.system in labels]
    results = make_report(tmp_path, asked, roles=alone, budget={})
    with_start = make_report(tmp_path / "both", predictions)
    ours, theirs = (found["conditions"][0]["whole"] for found in (results, with_start))
    assert ours["scores"]["RBA"] == theirs["scores"]["RBA"]
    assert ours["differences"] == theirs["differences"]
    assert (ours["gap_closed"], ours["gains"]) == ({}, {})
    score, teacher = (ours["scores"][label]["value"] for label in ("RBA", alone.teacher))
    assert results["headline"][0].startswith(f"RBA scores {score:.1f} [")
    assert f"where the teacher, who reads, scores {teacher:.1f} [" in results["headline"][0]
    page = (tmp_path / "report.md").read_text()
    assert "minus the start" not in page
    assert "gap closed" not in page
    assert "## The first model against the others" in page
    assert "worse than the teacher" in page
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"systems", "families"}
    one = replace(alone, systems={n: label for n, label in labels.items() if label != "SFT"}, arms=["RBA"])
    make_report(tmp_path / "one", [p for p in asked if p.system in one.systems], roles=one, budget={})
    assert "## The first model" not in (tmp_path / "one" / "report.md").read_text()


def test_a_bad_result_is_told_as_one(tmp_path):
    worse = synthetic.make_predictions(NUM_ITEMS, shift={"rba-0": -2, "rba-1": -2, "rba-2": -2})
    sentences = make_report(tmp_path / "worse", worse)["headline"]
    assert sentences[0].startswith("RBA closed -")
    assert sentences[1].startswith("Against the best rival, ")
    assert ": -" in sentences[1]
    no_gap = synthetic.make_predictions(NUM_ITEMS, shift={"teacher": -9})
    results = make_report(tmp_path / "no_gap", no_gap)
    assert results["headline"][0].startswith("There is no gap to close")
    assert any("undefined" in note for note in results["notes"])
    stored = json.loads((tmp_path / "no_gap" / "results.json").read_text())
    assert stored["conditions"][0]["whole"]["gap_closed"]["RBA"]["value"] is None
    same = [replace(p, value=100.0 * (int(p.id.split("-")[-1]) % 2)) if p.system != "teacher" else p for p in worse]
    assert "not distinguishable from 0" in make_report(tmp_path / "same", same)["headline"][1]


def test_word_error_rates_are_listed_but_not_compared(predictions, tmp_path):
    wer = [replace(p, task="words", measure="wer", value=300.0, weight=7.0) for p in predictions if p.system == "rba-0"]
    unique = {p.id: p for p in wer}
    results = make_report(tmp_path, [*predictions, *unique.values()])
    words = results["conditions"][2]
    assert words["whole"]["scores"]["RBA"]["value"] == pytest.approx(300 / 7)
    assert words["whole"]["gap_closed"] == {}
    assert "| words | 200 | – | – | – | 42.9 [42.9, 42.9] | – | – |" in (tmp_path / "report.md").read_text()


def test_systems_that_do_not_pair_are_refused(predictions):
    with pytest.raises(ValueError, match=r"\['fkl-0'\]: run them"):
        summarise([p for p in predictions if p.system != "fkl-0"], synthetic.ROLES, num_draws=9, seed=0)
    odd = [p for p in predictions if not (p.system == "start" and p.id.endswith("-7"))]
    with pytest.raises(ValueError, match="'start' answered other items"):
        summarise(odd, synthetic.ROLES, num_draws=9, seed=0)
    with pytest.raises(ValueError, match=r"systems \['ghost'\] without a label"):
        summarise([replace(predictions[0], system="ghost")], synthetic.ROLES, num_draws=9, seed=0)
    with pytest.raises(ValueError, match="'GRPO'"):
        Roles(systems={"t": "T", "s": "S"}, teacher="T", start="S", arms=["GRPO"])


def test_curves_are_read_from_csv_with_holes_and_json_lines(tmp_path):
    curves = synthetic.write_curves(tmp_path)
    steps, values = read_curve(tmp_path / "rba-0.csv", step="step", column="dev/score")
    assert steps.tolist() == list(range(0, 200, 20))
    assert values[0] == pytest.approx(58, abs=5)
    assert len(read_curve(tmp_path / "sft-0.jsonl", step="step", column="reward/mean")[0]) == 100
    assert len(read_curve(tmp_path / "sft-0.jsonl", step="step", column="kl/reference")[0]) == 0
    missing = TrainingCurves(runs=curves.runs, panels={"Nothing": "nothing/at-all"}, step="step")
    with pytest.raises(ValueError, match=r"'nothing/at-all' of panel 'Nothing'.*report\.curves\.panels"):
        make_report(tmp_path, synthetic.make_predictions(20), curves=missing)


@pytest.mark.parametrize(
    ("label", "num_rows"), [("SFT", 1), ("some forty letters, all of them in a row", 3), ("x" * 400, 5)]
)
def test_a_legend_takes_as_many_rows_as_its_names_need(label, num_rows):
    figure = Figure(figsize=(9.2, 3.0), layout="constrained")
    figure.subplots()
    _legend_above(figure, [Line2D([], [], label=label) for _ in range(5)])
    (legend,) = figure.legends
    assert legend._ncols == -(-5 // num_rows)
    assert num_rows == 5 or legend.get_window_extent().width <= figure.bbox.width
