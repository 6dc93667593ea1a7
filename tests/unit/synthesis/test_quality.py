# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_rba.synthesis.quality import (
    BORDERLINE,
    DROP,
    KEEP,
    ClippingCheck,
    DurationCheck,
    FiniteCheck,
    QualityControl,
    SilenceCheck,
    dropped_for,
)
from nemo_rba.synthesis.quality_asr import AsrRoundTrip, NeMoASR, error_rate
from nemo_rba.synthesis.tts import EspeakTTS
from nemo_rba.types import Instruction, Utterance

CONF = Path(__file__).parents[3] / "conf"
RATE = 8000
TONE = 0.5 * torch.sin(torch.arange(RATE) / 3)


def said(audio: torch.Tensor, text: str = "ten letter", name: str = "a", rate: int = RATE) -> Utterance:
    instruction = Instruction(id=name, text=text, response="r", task="t")
    return Utterance(instruction=instruction, audio=audio, sampling_rate=rate, speaker="s")


def verdicts(check, *clips: torch.Tensor) -> list[tuple[str, str, float]]:
    findings = check([said(audio) for audio in clips])
    return [(finding.verdict, finding.reason, pytest.approx(finding.value, abs=1e-6)) for finding in findings]


def test_samples_must_be_there_and_be_numbers():
    holed, endless = TONE.clone(), TONE.clone()
    holed[:80], endless[5] = torch.nan, -torch.inf
    assert verdicts(FiniteCheck(), TONE, torch.zeros(0), holed, endless) == [
        (KEEP, "", 0.0),
        (DROP, "no samples", 1.0),
        (DROP, "samples are NaN or infinite", 0.01),
        (DROP, "samples are NaN or infinite", 1 / 8000),
    ]


def test_duration_is_measured_by_the_length_of_the_text():
    check = DurationCheck(minimum=0.03, borderline_minimum=0.05, borderline_maximum=0.1, maximum=0.2)
    clips = [torch.zeros(round(seconds * 10 * RATE)) for seconds in (0.02, 0.04, 0.05, 0.1, 0.15, 0.25)]
    assert verdicts(check, *clips) == [
        (DROP, "shorter than 0.03 s a character", 0.02),
        (BORDERLINE, "shorter than 0.05 s a character", 0.04),
        (KEEP, "", 0.05),
        (KEEP, "", 0.1),
        (BORDERLINE, "longer than 0.1 s a character", 0.15),
        (DROP, "longer than 0.2 s a character", 0.25),
    ]


def test_clipping_is_the_share_of_samples_at_full_scale():
    clips = []
    for count in (0, 8, 80, 800):
        clip = TONE.clone()
        clip[:count] = torch.tensor([1.0, -1.0]).repeat(count // 2)
        clips.append(clip)
    assert verdicts(ClippingCheck(borderline=0.005, maximum=0.05), *clips) == [
        (KEEP, "", 0.0),
        (KEEP, "", 0.001),
        (BORDERLINE, "more than 0.005 of it clipped", 0.01),
        (DROP, "more than 0.05 of it clipped", 0.1),
    ]


def test_silence_is_the_share_of_frames_below_a_level():
    half, most = TONE.clone(), TONE.clone()
    half[4000:], most[1600:] = 0, 0
    check = SilenceCheck(level_db=-40, borderline=0.4, maximum=0.6)
    assert verdicts(check, TONE, half, most, torch.zeros(RATE), TONE * 0.01, torch.zeros(3)) == [
        (KEEP, "", 0.0),
        (BORDERLINE, "more than 0.4 of it silent", 0.5),
        (DROP, "more than 0.6 of it silent", 0.8),
        (DROP, "more than 0.6 of it silent", 1.0),
        (DROP, "more than 0.6 of it silent", 1.0),  # 0.5 / sqrt(2) / 100 is -49 dB
        (DROP, "more than 0.6 of it silent", 1.0),
    ]


def test_error_rates_by_hand():
    assert error_rate("What's one plus two?", "whats one two", "wer") == pytest.approx(1 / 4)
    assert error_rate("abcd", "abxd", "cer") == pytest.approx(1 / 4)
    assert error_rate("yes", "no no no", "wer") == pytest.approx(3)
    assert error_rate("one two", "", "wer") == 1
    assert (error_rate("?", "", "wer"), error_rate("?", "hm", "wer")) == (0, 1)


class Parrot:
    """Hears the texts it is given, whatever is said; notes what it was asked."""

    def __init__(self, *texts: str):
        self.texts, self.asked = list(texts), []

    def __call__(self, audio, sampling_rate: int) -> list[str]:
        self.asked.append(([len(waveform) for waveform in audio], sampling_rate))
        return [self.texts.pop(0) for _ in audio]


def test_the_round_trip_keeps_what_was_heard():
    asr = Parrot("One, two three FOUR", "one two three", "one", "one two three")
    check = AsrRoundTrip(asr=asr, metric="wer", borderline=0.2, maximum=0.5)
    clips = [said(TONE[:size], "one two three four") for size in (10, 20, 30)]
    found = [(f.verdict, f.reason, f.value, f.heard) for f in check(clips)]
    assert found == [
        (KEEP, "", 0.0, "One, two three FOUR"),
        (BORDERLINE, "wer above 0.2", 0.25, "one two three"),
        (DROP, "wer above 0.5", 0.75, "one"),
    ]
    assert asr.asked == [([10, 20, 30], RATE)]
    by_letter = AsrRoundTrip(asr=asr, metric="cer", borderline=0.2, maximum=0.5)
    assert by_letter(clips[:1])[0].value == pytest.approx(5 / 18)


def test_a_check_sees_only_what_the_ones_before_it_did_not_drop():
    asr = Parrot("one two", "something else altogether")
    control = QualityControl(
        checks={
            "finite": FiniteCheck(),
            "off": None,
            "silence": SilenceCheck(level_db=-40, borderline=0.4, maximum=0.6),
            "words": AsrRoundTrip(asr=asr, metric="wer", borderline=0.2, maximum=0.5),
        },
        max_dropped_share=0.5,
    )
    half = TONE.clone()
    half[4000:] = 0
    clips = [
        said(audio, "one two", name)
        for name, audio in [("a", TONE), ("b", TONE * torch.nan), ("c", TONE * 0), ("d", half)]
    ]
    rows = control(clips)
    assert asr.asked == [([8000, 8000], RATE)]
    assert [dropped_for(found) for found in rows] == [
        None,
        "finite: samples are NaN or infinite",
        "silence: more than 0.6 of it silent",
        "words: wer above 0.5",
    ]
    assert rows[0] == []
    assert rows[3] == [
        {"id": "d", "verdict": "borderline", "reason": "silence: more than 0.4 of it silent", "value": 0.5,
         "text": "one two", "heard": ""},
        {"id": "d", "verdict": "drop", "reason": "words: wer above 0.5", "value": 1.5,
         "text": "one two", "heard": "something else altogether"},
    ]  # fmt: skip
    assert control([]) == []
    assert len(control(clips[1:3])) == 2
    assert len(asr.asked) == 1, "nobody listens to nothing"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QualityControl(checks={"off": None}, max_dropped_share=0.1), "at least one check"),
        (lambda: QualityControl(checks={"f": FiniteCheck()}, max_dropped_share=10), "max_dropped_share=10"),
        (lambda: ClippingCheck(borderline=0.2, maximum=0.1), "ClippingCheck: borderline=0.2, maximum=0.1"),
        (lambda: SilenceCheck(level_db=-40, borderline=0.2, maximum=1.0), "SilenceCheck: .*maximum < 1"),
        (lambda: SilenceCheck(level_db=40, borderline=0.2, maximum=0.5), "level_db=40"),
        (
            lambda: DurationCheck(minimum=0.2, borderline_minimum=0.1, borderline_maximum=0.3, maximum=0.4),
            "seconds per character",
        ),
        (lambda: AsrRoundTrip(asr=Parrot(), metric="mer", borderline=0.1, maximum=0.2), "one of wer, cer"),
        (lambda: AsrRoundTrip(asr=Parrot(), metric="wer", borderline=0.3, maximum=0.2), "borderline=0.3"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_good_speech_passes_the_limits_of_the_large_recipe_and_bad_speech_does_not():
    quality = instantiate(OmegaConf.load(CONF / "synthesis" / "magpie.yaml").quality)
    tts = EspeakTTS(voices=["en-us", "en+f2"], rates=[140, 200], pitches=[50], sampling_rate=16000)
    text = "please name three animals that live in the sea"
    clips = tts.synthesize([text] * 4, tts.speakers)
    assert quality([said(clip, text, rate=16000) for clip in clips]) == [[], [], [], []]
    clip = clips[0]
    bad = [clip[: len(clip) // 4], (clip * 20).clamp(-1, 1), clip * 1e-3, clip.repeat(5), clip / 0]
    names = [dropped_for(rows).split(":")[0] for rows in quality([said(audio, text, rate=16000) for audio in bad])]
    assert names == ["duration", "clipping", "silence", "duration", "finite"]


def test_the_round_trip_is_one_override_away():
    override = "+quality@synthesis.quality.checks.round_trip=asr_round_trip"
    with initialize_config_dir(str(CONF), version_base=None):
        plain, checked = compose("rba_8b"), compose("rba_8b", overrides=[override])
    assert plain.synthesis.quality.checks.round_trip is None
    assert checked.synthesis.quality.checks.round_trip.asr.model == "nvidia/parakeet-ctc-0.6b"
    assert list(checked.synthesis.quality.checks)[-1] == "round_trip", "the dear one last"


LETTERS = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]


@pytest.fixture(scope="module")
def ctc_file(tmp_path_factory) -> Path:
    """A real CTC model of NeMo with random weights, saved."""
    from nemo.collections.asr.models import EncDecCTCModel

    layer = {"filters": 16, "repeat": 1, "kernel": [5], "stride": [2], "dilation": [1], "dropout": 0.0,
             "residual": False}  # fmt: skip
    torch.manual_seed(0)
    model = EncDecCTCModel(OmegaConf.create({
        "sample_rate": 16000,
        "preprocessor": {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                         "sample_rate": 16000, "features": 32, "window_size": 0.02, "window_stride": 0.01,
                         "n_fft": 512, "window": "hann", "normalize": "per_feature"},
        "encoder": {"_target_": "nemo.collections.asr.modules.ConvASREncoder", "feat_in": 32, "activation": "relu",
                    "conv_mask": True, "jasper": [layer]},
        "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": 16,
                    "num_classes": len(LETTERS), "vocabulary": LETTERS},
        "decoding": {"strategy": "greedy"},
    }))  # fmt: skip
    path = tmp_path_factory.mktemp("asr") / "tiny.nemo"
    model.save_to(str(path))
    return path


def test_a_model_of_nemo_listens(ctc_file):
    asr = NeMoASR(model=str(ctc_file), batch_size=2, device="cpu")
    rng = torch.Generator().manual_seed(1)
    clips = [torch.rand(size, generator=rng) - 0.5 for size in (16000, 30000, 24000)]
    heard = asr(clips, 16000)
    assert len(heard) == 3
    assert all(isinstance(text, str) and set(text) <= set(LETTERS) for text in heard)
    assert any(heard), "random weights say something"
    assert asr(clips, 16000) == heard
    assert [asr([clip], 16000)[0] for clip in clips] == heard, "whoever is in the batch"
    assert len(asr([clips[0][::2]], 8000)) == 1
    findings = AsrRoundTrip(asr=asr, metric="cer", borderline=0.1, maximum=0.3)(
        [said(c, "hi", rate=16000) for c in clips]
    )
    assert [finding.heard for finding in findings] == heard
    assert findings[0].value == pytest.approx(error_rate("hi", heard[0], "cer"))


def test_a_missing_or_broken_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"asr.model: no file '.*gone.nemo'; download it"):
        NeMoASR(model=str(tmp_path / "gone.nemo"), batch_size=1, device="cpu")
    (tmp_path / "broken.nemo").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"asr.model: cannot load '.*broken.nemo'"):
        NeMoASR(model=str(tmp_path / "broken.nemo"), batch_size=1, device="cpu")
