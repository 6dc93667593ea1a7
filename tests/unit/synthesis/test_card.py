# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
from collections import Counter
from pathlib import Path

import matplotlib.image
import pytest

from nemo_rba.synthesis import origin
from nemo_rba.synthesis.card import account, write_card
from nemo_rba.synthesis.text import STEPS, TextResult
from nemo_rba.types import Instruction

VOICES = {"train": "EspeakTTS, 2 speakers", "test": "FastPitchTTS, 1 speakers"}
ORIGIN = {"code": "nemo_rba 0.1.0", "teacher": "llama", "seed": 1, "voices": VOICES}
SETTINGS = {
    "sampler": {"_target_": "nemo_rba.synthesis.instructions.MagpieSampler", "_partial_": True, "batch_size": 500,
                "temperature": 1.0, "topics": ["a"] * 9},
    "splits": [
        {"name": "train", "tts": {"_target_": "nemo_rba.synthesis.tts.EspeakTTS", "voices": ["en"],
                                  "sampling_rate": 16000}},
        {"name": "test", "tts": {"_target_": "nemo_rba.synthesis.tts_fastpitch.FastPitchTTS",
                                 "fastpitch": "/models/fp.nemo", "vocoder": "/models/hg.nemo", "sampling_rate": 22050}},
    ],
}  # fmt: skip
COUNTS = (20, 15, 14, 12, 10, 9, 8, 7)


def item(name: str, text: str) -> Instruction:
    return Instruction(id=name, text=text, response="a b", task="t")


def report(clips: int, reasons: dict[str, int], languages: dict[str, int]) -> dict:
    dropped = [{"id": f"x{n}", "text": "x", "reason": r} for r, count in reasons.items() for n in range(count)]
    return {
        "items": clips + len(dropped), "clips": clips, "seconds": 2.0 * clips, "dropped": dropped,
        "speakers": {"a": clips}, "tasks": {"t": clips}, "languages": languages,
        "histograms": {"seconds": {"2.0": clips}, "words spoken": {"3": clips}, "words answered": {"2": clips}},
    }  # fmt: skip


def found() -> TextResult:
    reasons = {"duplicate: seen before": 3, "near duplicate: shares 70% of its 2-word runs with an earlier text": 2,
               "length: more than 3 words": 7,
               "response: the same as another answer to this instruction": 1}  # fmt: skip
    dropped = [(item(f"d{n}", "x"), r) for r, count in reasons.items() for n in range(count)]
    splits = {"train": [item(f"t{n}", "tell me about the weather") for n in range(5)],
              "test": [item("e", "tell me something about your garden")]}  # fmt: skip
    return TextResult(splits=splits, num_batches=2, num_sampled=20, dropped=dropped,
                      steps=Counter(dict(zip(STEPS, COUNTS, strict=True))))  # fmt: skip


def reports() -> dict:
    lost = {"speech: the synthesizer refused the text": 2, "speech: longer than 9 s": 3, "silence: too much": 4,
            "speech: the synthesizer failed (RuntimeError)": 1}  # fmt: skip
    return {
        "train": [report(4, lost, {"en-us": 3, "en-gb-x-rp": 1}), report(2, {}, {"en": 2})],
        "test": [report(1, {}, {"en-us": 1})],
    }


def written(folder: Path, settings: dict = SETTINGS) -> dict:
    (folder / "config.json").write_text(json.dumps(settings))
    card = account(folder, found(), reports(), ORIGIN, checked=False)
    write_card(folder, card)
    assert json.loads((folder / "card.json").read_text()) == json.loads(json.dumps(card))
    assert json.loads((folder / "counts.json").read_text()).items() <= card.items()
    return card


def test_every_stage_is_counted(tmp_path):
    card = written(tmp_path)
    assert card["stages"]["text"] == dict(zip(STEPS, COUNTS, strict=True))
    assert card["stages"]["speech"] == {
        "train": {"to speak": 16, "spoken": 13, "short enough": 10, "checked and written": 6},
        "test": {"to speak": 1, "spoken": 1, "short enough": 1, "checked and written": 1},
    }
    text = (tmp_path / "card.md").read_text()
    assert "| 20 | 15 | 14 | 12 | 10 | 9 | 8 | 7 |" in text
    assert "| train | 16 | 13 | 10 | 6 |" in text


def test_duplicates_are_a_figure_of_their_own(tmp_path):
    card = written(tmp_path)
    assert card["duplicates"] == {
        "by filter": {"duplicate": 3, "near duplicate": 2}, "share of sampled": 0.25, "answers given twice": 1
    }  # fmt: skip
    assert (
        "Duplicates dropped: 3 duplicate, 2 near duplicate; 25.0% of what was sampled."
        in (tmp_path / "card.md").read_text()
    )


def test_the_card_says_what_wrote_and_what_spoke(tmp_path):
    card = written(tmp_path)
    assert card["origin"]["sampler"] == SETTINGS["sampler"]
    assert card["origin"]["synthesizers"]["test"]["fastpitch"] == "/models/fp.nemo"
    (made_with,) = card["origin"]["made_with"]
    assert made_with == origin.versions()
    assert {"nemo_rba", "nemo", "torch", "transformers"} <= set(made_with)
    text = (tmp_path / "card.md").read_text()
    assert "- instructions by MagpieSampler (batch_size 500, temperature 1)\n" in text
    assert "- train spoken by EspeakTTS (sampling_rate 16000)\n" in text
    assert (
        "- test spoken by FastPitchTTS (fastpitch /models/fp.nemo, vocoder /models/hg.nemo, sampling_rate 22050)"
        in text
    )
    assert f"torch {made_with['torch']}" in text


def test_versions_of_an_earlier_run_stay(tmp_path, monkeypatch):
    now = origin.versions()
    monkeypatch.setattr(origin, "versions", lambda: now | {"torch": "1.0"})
    assert written(tmp_path)["origin"]["made_with"] == [now | {"torch": "1.0"}]
    monkeypatch.setattr(origin, "versions", lambda: now)
    for _ in range(2):  # once more, and nothing is added
        assert written(tmp_path)["origin"]["made_with"] == [now | {"torch": "1.0"}, now]
    assert (tmp_path / "card.md").read_text().count("- with nemo_rba") == 2


def test_a_commit_is_named_where_the_code_is_a_repository(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)

    assert origin.commit(tmp_path) == ""
    origin.commit.cache_clear()
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert origin.commit(tmp_path) == head
    origin.commit.cache_clear()
    (tmp_path / "a.py").write_text("2")
    assert origin.commit(tmp_path) == f"{head}, changed"
    (tmp_path / "package").mkdir()
    assert origin.commit(tmp_path / "package") == "", "installed within somebody else's repository"
    origin.commit.cache_clear()


def test_regional_codes_are_one_language(tmp_path):
    split = written(tmp_path)["splits"]["train"]
    assert split["languages"] == {"en": 6}
    assert split["accents"] == {"en": 2, "en-gb-x-rp": 1, "en-us": 3}
    assert [origin.language_of(code) for code in ("cmn", "pt-br", "not told", "en-us to de", "not told to de")] == [
        "zh", "pt", "not told", "en to de", "not told to de"
    ]  # fmt: skip


@pytest.mark.parametrize("filters", [{"_target_": "x.in_order", "l": None}, [], None])
@pytest.mark.parametrize("spoken", ["speech_filters", "instruction_filters"])
def test_the_language_of_the_text_is_that_of_the_filter_else_that_of_the_voices(filters, spoken):
    splits = found().splits
    judge = {"_target_": "nemo_rba.synthesis.filters_content.LanguageFilter", "languages": ["de"], "field": "text"}
    plain = {"instruction_filters": filters}
    assert origin.text_languages(plain, splits, {"en-us", "en"}) == {
        "as": "the voices speak", "splits": {"train": {"en": 5}, "test": {"en": 1}}
    }  # fmt: skip
    assert origin.text_languages(plain, splits, {"not told"})["splits"]["train"] == {"not told": 5}
    for settings in ({spoken: {"_target_": "x.in_order", "a": judge}}, {spoken: [judge]}):
        assert origin.text_languages(settings, splits, {"en"}) == {
            "as": "the language filter lets pass", "splits": {"train": {"de": 5}, "test": {"de": 1}}
        }  # fmt: skip
    answers = {spoken: [judge | {"field": "response"}]}
    assert origin.text_languages(answers, splits, {"en"})["splits"]["test"] == {"en": 1}


def test_several_languages_are_told_apart(tmp_path):
    pytest.importorskip("py3langid")
    texts = ["please tell me about the weather in London", "sag mir bitte, wie das Wetter in Berlin wird", "hm"]
    splits = {"train": [item(f"t{n}", text) for n, text in enumerate(texts * 100)], "dev": []}
    told = origin.text_languages({}, splits, {"en-us", "de"})
    assert told["as"] == "detected among those that the voices speak"
    assert told["splits"] == {"train": {"en": 50, "not sure": 50, "de": 50}, "dev": {}}  # every second one
    unknown = origin.text_languages({}, splits, {"en-us", "xx"})
    assert unknown["splits"]["train"] == {"en or xx": 300}


def test_a_card_without_settings_says_so(tmp_path):
    card = written(tmp_path, {})
    assert card["origin"]["sampler"] is None
    assert "instructions by not told" in (tmp_path / "card.md").read_text()


def test_the_picture_shows_stages_and_clips(tmp_path):
    written(tmp_path)
    height, width, _ = matplotlib.image.imread(tmp_path / "card.png").shape
    assert (width, height) == (1350, 660)
    first = (tmp_path / "card.png").read_bytes()
    written(tmp_path)
    assert (tmp_path / "card.png").read_bytes() == first
