# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import soundfile
import synthetic_study as synthetic
import torch
from PIL import Image

from nemo_rba.evaluation.browser import Sound, choose_items, write_browser
from nemo_rba.evaluation.browser_script import SCRIPT

NUM_ITEMS = 60
HARMFUL = "</script><script>alert(1)</script><!-- & \u2028 $title ${data} \\u003c"


class Page(HTMLParser):
    """What a browser would make of a page: elements, ids, words outside of scripts, scripts by their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.scripts, self._open = [], [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1][1] += data
        elif self._open != "style":
            self.words += data

    @property
    def data(self) -> dict:
        ((_, text),) = [script for script in self.scripts if script[0].get("id") == "data"]
        return json.loads(text)


def tone(*, frequency: float = 1000) -> Sound:
    times = torch.arange(8000) / 16000
    return Sound(waveform=0.5 * torch.sin(2 * torch.pi * frequency * times), sampling_rate=16000)


def write(folder, predictions, **changes) -> str:
    settings = {"title": "A <made-up> study", "roles": synthetic.ROLES, "sounds": {}, "identity": {"seed": "1 & only"}}
    return write_browser(folder=folder, predictions=predictions, **settings | changes).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def predictions():
    return [replace(p, speaker=f"voice of {p.family}") for p in synthetic.make_predictions(NUM_ITEMS)]


def test_everything_that_was_predicted_comes_back(predictions, tmp_path):
    data = Page(write(tmp_path, predictions)).data
    systems = [system["name"] for system in data["systems"]]
    assert systems == list(synthetic.SYSTEMS)
    assert [condition["name"] for condition in data["conditions"]] == ["held-out voices", "seen voices"]
    found = {
        (name, data["conditions"][item["condition"]]["name"], item["id"]): (
            item["text"], item["reference"], item["family"], item["kind"], item["speaker"],
            answer["response"], answer["score"],
        )
        for item in data["items"] for name, answer in zip(systems, item["answers"], strict=True)
    }  # fmt: skip
    assert found == {
        (p.system, p.task, p.id): (p.text, p.reference, p.family, p.kind, p.speaker, p.response, p.value)
        for p in predictions
    }
    labels = {system["name"]: system["label"] for system in data["systems"]}
    assert (labels["rba-1"], labels["fkl-0"]) == ("RBA (rba-1)", "Forward KL"), "seeds are told apart"
    assert (systems[data["first"]], systems[data["second"]]) == ("start", "rba-0")


def test_no_text_can_break_the_page_or_run_in_it(predictions, tmp_path):
    fields = ("id", "text", "context", "heard", "reference", "response", "family", "kind", "speaker")
    changes = dict.fromkeys(fields, HARMFUL)
    harmful = replace(predictions[0], **changes)
    page = Page(write(tmp_path, [harmful], title=HARMFUL, identity={HARMFUL: HARMFUL}))
    (item,) = page.data["items"]
    assert {item[key] for key in ("id", "text", "context", "reference", "family", "kind", "speaker")} == {HARMFUL}
    assert item["answers"][0]["response"] == HARMFUL
    assert len(page.scripts) == 2
    assert page.words.count(HARMFUL) == 4, "title twice, and a line of the identity"
    assert page.tags == Page(write(tmp_path, predictions)).tags, "no element was added"


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(predictions, tmp_path):
    page = Page(write(tmp_path, predictions, sounds={"seen voices": {"seen voices-0": tone()}}))
    assert [value for key, value in page.attributes if key == "src"] == []
    assert {value for key, value in page.attributes if key == "href"} == {"#identity", "report.html"}
    (policy,) = [value for key, value in page.attributes if key == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"https?:|innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|import", SCRIPT)


def test_the_script_finds_every_field_and_element_that_it_names(predictions, tmp_path):
    attributes = Page(write(tmp_path, predictions)).attributes
    ids, fields = ({value for key, value in attributes if key == wanted} for wanted in ("id", "name"))
    assert set(re.findall(r'getElementById\("([\w-]+)"\)', SCRIPT)) <= ids
    assert set(re.findall(r'given\.(?:get|has)\("(\w+)"\)', SCRIPT)) - {"change"} <= fields, "radios are made by script"


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine here")
def test_the_script_is_javascript(tmp_path):
    (tmp_path / "script.js").write_text(SCRIPT, encoding="utf-8")
    checked = subprocess.run(["node", "--check", tmp_path / "script.js"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_what_a_cascade_heard_is_compared_with_what_was_said(predictions, tmp_path):
    base = replace(predictions[0], text="name the big red fox", system="cascade")
    heard = {"same": base.text, "other": "name big bread fox now", "nothing": ""}
    page = Page(write(tmp_path, [replace(base, id=id, heard=words) for id, words in heard.items()]))
    place = list(synthetic.SYSTEMS).index("cascade")
    found = {item["id"]: item["answers"][place]["heard"] for item in page.data["items"]}
    assert found["same"] is None
    assert found["other"] == [
        ["=", "name"], ["-", "the"], ["=", "big"], ["-", "red"], ["+", "bread"], ["=", "fox"], ["+", "now"]
    ]  # fmt: skip
    assert found["nothing"] == [["-", base.text]]


def test_an_answer_that_is_missing_or_has_no_score_is_told_as_such(predictions, tmp_path):
    wer = replace(predictions[0], measure="wer", value=150.0, weight=4.0)
    no_words = replace(wer, id="no words", value=100.0, weight=0.0)
    data = Page(write(tmp_path, [wer, no_words])).data
    assert data["conditions"] == [{"name": wer.task, "measure": "wer"}]
    assert [item["answers"][0]["score"] for item in data["items"]] == [37.5, None]
    assert data["items"][0]["answers"][1:] == [None] * (len(synthetic.SYSTEMS) - 1)


def test_sounds_decode_back_to_the_waveform(predictions, tmp_path):
    loud = Sound(waveform=torch.linspace(-1.5, 1.5, 8000), sampling_rate=8000)
    sounds = {"seen voices": {"seen voices-7": tone()}, "held-out voices": {"held-out voices-3": loud}}
    data = Page(write(tmp_path, predictions, sounds=sounds)).data
    found = {item["id"]: item["sound"] for item in data["items"] if item["sound"] is not None}
    assert set(found) == {"seen voices-7", "held-out voices-3"}
    for id, expected in (("seen voices-7", tone()), ("held-out voices-3", loud)):
        header, _, audio = found[id]["audio"].partition(",")
        file = soundfile.SoundFile(io.BytesIO(base64.b64decode(audio)))
        assert (header, file.format, file.subtype) == ("data:audio/flac;base64", "FLAC", "PCM_16")
        assert file.samplerate == expected.sampling_rate
        decoded = torch.from_numpy(file.read(dtype="float32"))
        torch.testing.assert_close(decoded, expected.waveform.clamp(-1, 1), rtol=0, atol=2 / 2**15)
        assert found[id]["seconds"] == expected.seconds


def test_a_spectrogram_shows_tones_at_their_frequencies(predictions, tmp_path):
    rows = []
    for frequency in (1000, 4000, 7000):
        sounds = {"seen voices": {"seen voices-7": tone(frequency=frequency)}}
        data = Page(write(tmp_path, predictions, sounds=sounds)).data
        (picture,) = [item["sound"]["picture"] for item in data["items"] if item["sound"] is not None]
        image = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,"))))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (484, 176))
        middle = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(176, 484)[:, 260]
        rows.append(float((middle < 60).nonzero().float().mean()))
    low, mid, high = rows  # from the top
    assert low - mid == pytest.approx(mid - high, abs=2)
    assert low - high > 80
    assert len(picture) < 30_000


def test_silence_and_a_click_have_a_spectrogram(predictions, tmp_path):
    sounds = {"silence": Sound(waveform=torch.zeros(16000), sampling_rate=16000),
              "click": Sound(waveform=torch.ones(1), sampling_rate=16000)}  # fmt: skip
    some = [replace(predictions[0], id=id) for id in sounds]
    page = write(tmp_path, some, sounds={predictions[0].task: sounds})
    assert page.count("data:image/png;base64,") == 2


def test_chosen_items_have_both_changes_and_what_stayed(predictions):
    chosen = choose_items(predictions, synthetic.ROLES, 13, seed=0)
    assert {name: len(ids) for name, ids in chosen.items()} == {"held-out voices": 7, "seen voices": 6}
    for name, ids in chosen.items():
        score = {(p.system, p.id): p.value for p in predictions if p.task == name}
        change = {id: score["rba-0", id] - score["start", id] for _, id in score}
        for by in (100, -100, 0):
            fair = len(ids) // 3
            assert [change[id] for id in ids].count(by) >= min(fair, list(change.values()).count(by)) > 0
    even = choose_items(predictions, synthetic.ROLES, 12, seed=0)
    assert choose_items(predictions[::-1], synthetic.ROLES, 12, seed=0) == even, "whatever comes first"
    assert choose_items(predictions, synthetic.ROLES, 13, seed=1) != chosen


def test_the_same_set_in_two_conditions_gives_the_same_items(predictions):
    first = [p for p in predictions if p.task == "seen voices"]
    both = [*first, *(replace(p, task="noisy") for p in first)]
    chosen = choose_items(both, synthetic.ROLES, 10, seed=3)
    assert chosen["seen voices"] == chosen["noisy"]


def test_no_more_is_chosen_than_there_is(predictions):
    chosen = choose_items(predictions, synthetic.ROLES, 10_000, seed=0)
    assert {name: len(set(ids)) for name, ids in chosen.items()} == dict.fromkeys(chosen, NUM_ITEMS)
    assert choose_items(predictions, synthetic.ROLES, 0, seed=0) == {"held-out voices": [], "seen voices": []}
    assert choose_items([], synthetic.ROLES, 5, seed=0) == {}
    with pytest.raises(ValueError, match=r"num_sounds is -1.*evaluation\.num_sounds"):
        choose_items(predictions, synthetic.ROLES, -1, seed=0)


def test_a_thousand_items_of_nine_systems_are_small(tmp_path):
    page = write(tmp_path, [p for p in synthetic.make_predictions(1000) if p.task == "seen voices"])
    assert len(page.encode()) < 1_500_000


def test_what_does_not_fit_is_refused(predictions, tmp_path):
    with pytest.raises(ValueError, match=r"'ghost' without a label"):
        write(tmp_path, [replace(predictions[0], system="ghost")])
    with pytest.raises(ValueError, match=r"item 'nobody' of condition 'seen voices', which no prediction is of"):
        write(tmp_path, predictions, sounds={"seen voices": {"nobody": tone()}})
    for shape in ((0,), (2, 100)):
        with pytest.raises(ValueError, match=re.escape(f"a sound has shape {shape}")):
            Sound(waveform=torch.zeros(shape), sampling_rate=16000)
