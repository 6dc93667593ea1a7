# SPDX-License-Identifier: Apache-2.0
"""A tiny random FastPitch of three speakers and a HiFi-GAN, made on the spot, saved and restored by NeMo."""

from pathlib import Path

import pytest
import torch
from nemo.collections.tts.models import FastPitchModel, HifiGanModel
from omegaconf import OmegaConf

from nemo_rba.synthesis.tts_fastpitch import FastPitchTTS

WIDTH, NUM_SPEAKERS, MODEL_RATE, RATE = 32, 3, 22050, 16000
NEMO = "nemo.collections"
SPECTROGRAM = {
    "lowfreq": 0, "highfreq": MODEL_RATE // 2, "n_fft": 1024, "n_window_size": 1024, "n_window_stride": 256,
    "sample_rate": MODEL_RATE, "window": "hann", "normalize": None, "preemph": None, "dither": 0.0, "log": True,
    "log_zero_guard_type": "add", "log_zero_guard_value": 1e-5, "mag_power": 1.0, "mel_norm": None,
}  # fmt: skip
TRANSFORMER = {
    "n_layer": 2, "n_head": 2, "d_model": WIDTH, "d_head": 16, "d_inner": 64, "kernel_size": 3, "dropout": 0.0,
    "dropatt": 0.0, "dropemb": 0.0,
}  # fmt: skip
PREDICTOR = {
    "_target_": f"{NEMO}.tts.modules.fastpitch.TemporalPredictor", "input_size": WIDTH, "kernel_size": 3,
    "filter_size": 32, "dropout": 0.0, "n_layers": 2,
}  # fmt: skip
FASTPITCH = {
    "learn_alignment": True, "n_speakers": NUM_SPEAKERS, "symbols_embedding_dim": WIDTH, "n_mel_channels": 80,
    "max_token_duration": 75, "pitch_embedding_kernel_size": 3, "pitch_fmin": 65, "pitch_fmax": 2000,
    "sample_rate": MODEL_RATE,
    "text_tokenizer": {
        "_target_": f"{NEMO}.common.tokenizers.text_to_speech.tts_tokenizers.EnglishCharsTokenizer",
        "pad_with_space": True,
    },
    "train_ds": {"dataset": {"_target_": f"{NEMO}.tts.data.dataset.TTSDataset"}},
    "preprocessor": SPECTROGRAM | {
        "_target_": f"{NEMO}.asr.modules.AudioToMelSpectrogramPreprocessor", "features": 80, "window_size": False,
        "window_stride": False, "pad_to": 1, "pad_value": 0,
    },
    "alignment_module": {"_target_": f"{NEMO}.tts.modules.aligner.AlignmentEncoder", "n_text_channels": WIDTH},
    "input_fft": TRANSFORMER | {"_target_": f"{NEMO}.tts.modules.transformer.FFTransformerEncoder", "d_embed": WIDTH},
    "output_fft": TRANSFORMER | {"_target_": f"{NEMO}.tts.modules.transformer.FFTransformerDecoder"},
    "duration_predictor": PREDICTOR, "pitch_predictor": PREDICTOR,
}  # fmt: skip
PHONEMES = {
    "_target_": f"{NEMO}.common.tokenizers.text_to_speech.tts_tokenizers.EnglishPhonemesTokenizer", "stresses": True,
    "chars": False, "pad_with_space": True,
}  # fmt: skip
HIFIGAN = {
    "max_steps": 10, "sample_rate": MODEL_RATE,
    "train_ds": {"dataset": {"_target_": f"{NEMO}.tts.data.dataset.VocoderDataset"}},
    "preprocessor": SPECTROGRAM | {
        "_target_": f"{NEMO}.asr.parts.preprocessing.features.FilterbankFeatures", "nfilt": 80, "pad_to": 0,
        "pad_value": -11.52, "use_grads": False, "exact_pad": True,
    },
    "generator": {
        "_target_": f"{NEMO}.tts.modules.hifigan_modules.Generator", "resblock": 2, "upsample_rates": [8, 8, 4],
        "upsample_kernel_sizes": [16, 16, 8], "upsample_initial_channel": 32, "resblock_kernel_sizes": [3, 5],
        "resblock_dilation_sizes": [[1, 2], [2, 6]],
    },
}  # fmt: skip
SHORT, LONG = "hello world", "good morning my friends, how are you today?"


def build(model_class, config: dict):
    """Without the downloads and losses of training."""
    model_class._set_model_restore_state(is_being_restored=True)
    try:
        return model_class(OmegaConf.create(config)).eval()
    finally:
        model_class._set_model_restore_state(is_being_restored=False)


def speaking(config: dict):
    """A FastPitch whose random weights give durations as a trained one's: some six frames a letter, more or less."""
    model = build(FastPitchModel, config)
    with torch.no_grad():
        model.fastpitch.duration_predictor.fc.bias.fill_(2.0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fastpitch")
    speaking(FASTPITCH).save_to(str(folder / "fastpitch.nemo"))
    speaking(FASTPITCH | {"n_speakers": 1}).save_to(str(folder / "alone.nemo"))
    (folder / "words.txt").write_text("HELLO  HH AH0 L OW1\nWORLD  W ER1 L D\n")
    (folder / "heteronyms.txt").write_text("")
    g2p = {"_target_": f"{NEMO}.tts.g2p.models.en_us_arpabet.EnglishG2p", "phoneme_dict": str(folder / "words.txt"),
           "heteronyms": str(folder / "heteronyms.txt")}  # fmt: skip
    speaking(FASTPITCH | {"text_tokenizer": PHONEMES | {"g2p": g2p}}).save_to(str(folder / "phonemes.nemo"))
    build(HifiGanModel, HIFIGAN).save_to(str(folder / "hifigan.nemo"))
    return folder


def load(folder: Path, *, fastpitch: str = "fastpitch", **changes) -> FastPitchTTS:
    settings = {
        "fastpitch": str(folder / f"{fastpitch}.nemo"), "vocoder": str(folder / "hifigan.nemo"), "speakers": [0, 2],
        "pace": 1.0, "batch_size": 4, "sampling_rate": RATE, "device": "cpu",
    }  # fmt: skip
    return FastPitchTTS(**(settings | changes))


@pytest.fixture(scope="module")
def tts(folder) -> FastPitchTTS:
    return load(folder)


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def test_speech_is_mono_float_at_the_rate_that_was_asked_for(tts, folder):
    assert (tts.speakers, tts.sampling_rate) == (("0", "2"), RATE)
    assert tts.languages == {"0": "en", "2": "en"}, "told by the name of the tokenizer"
    assert {name.split(".")[0] for name, _ in tts._vocoder.named_parameters()} == {"generator"}, "no discriminators"
    short, long = tts.synthesize([SHORT, LONG], ["0", "2"])
    assert all(audio.dtype == torch.float32 and audio.dim() == 1 and audio.abs().max() <= 1 for audio in (short, long))
    assert len(long) > 2 * len(short)
    (slower,) = load(folder, pace=0.5).synthesize([SHORT], ["0"])
    assert 1.7 < len(slower) / len(short) < 2.3
    (as_trained,) = load(folder, sampling_rate=MODEL_RATE).synthesize([SHORT], ["0"])
    assert len(as_trained) / MODEL_RATE == pytest.approx(len(short) / RATE, abs=0.02)


def test_speech_depends_on_text_and_speaker_alone(tts):
    texts, speakers = [SHORT, LONG, SHORT, "yes", "no", LONG], ["0", "2", "2", "0", "0", "0"]
    forth = tts.synthesize(texts, speakers)  # in two batches
    again = tts.synthesize(texts, speakers)
    assert all(torch.equal(a, b) for a, b in zip(forth, again, strict=True))
    back = tts.synthesize(texts[::-1], speakers[::-1])[::-1]
    alone = [tts.synthesize([text], [speaker])[0] for text, speaker in zip(texts, speakers, strict=True)]
    assert all(alike(a, b) for a, b in zip(forth, back, strict=True)), "whatever is in the batch"
    assert all(alike(a, b) for a, b in zip(forth, alone, strict=True)), "padding changes nothing"
    assert not alike(forth[0], forth[2]), "another speaker"
    assert not alike(forth[3], forth[4]), "another text"


def test_alone_a_text_is_what_nemo_makes_of_it(tts, folder):
    model = FastPitchModel.restore_from(str(folder / "fastpitch.nemo"), map_location="cpu").eval()
    tokens = model.parse(LONG)
    with torch.no_grad():
        expected, frames, *_ = model(text=tokens, durs=None, pitch=None, speaker=torch.tensor([2]), pace=1.0)
        found, *_ = tts._fastpitch(text=tokens, durs=None, pitch=None, speaker=torch.tensor([2]), pace=1.0)
        padding = torch.full((1, 9), model.vocab.pad)
        padded, num_frames, *_ = model(
            text=torch.cat([tokens, padding], dim=1), durs=None, pitch=None, speaker=torch.tensor([2]), pace=1.0
        )
    assert torch.equal(found, expected)
    other = num_frames[0] != frames[0] or not torch.allclose(padded[..., : int(frames[0])], expected, atol=1e-4)
    assert other, "NeMo's own FastPitch hears padding; when it no longer does, keep_padding_out can go"


def test_a_model_of_one_speaker_speaks_too(folder):
    alone = load(folder, fastpitch="alone", speakers=[0])
    assert len(alone.synthesize([SHORT, LONG], ["0", "0"])) == 2
    with pytest.raises(ValueError, match=r"tts.speakers has 1; expected whole numbers 0 to 0"):
        load(folder, fastpitch="alone", speakers=[1])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tell me about Привет как дела", "'п', 'р', 'и', 'в', 'е', 'т', 'к', 'а', 'д', 'л'"),
        ("hello 你好", "'你', '好'"),
        ("three 3", "'3'"),
        ("ten % of it", "'%'"),
        ("one € more", "'€'"),
        ("?!", "it has no letters"),
    ],
)
def test_a_text_of_which_something_would_be_lost_is_refused(tts, text, why):
    with pytest.raises(ValueError, match=r"FastPitch cannot say .*; write numbers and symbols in words") as caught:
        tts.synthesize([SHORT, text], ["0", "0"])
    assert why in str(caught.value)


def test_punctuation_and_accents_are_no_loss(tts):
    spoken = tts.synthesize(["hello, world… “it’s me”", "café"], ["0", "0"])
    assert all(len(audio) > 0 for audio in spoken)


def test_words_that_a_pronouncing_dictionary_lacks_are_refused(folder):
    tts = load(folder, fastpitch="phonemes")
    assert tts.languages == {"0": "en", "2": "en"}
    assert len(tts.synthesize(["Hello, world"], ["0"])[0]) > 0
    with pytest.raises(ValueError, match="does not know 'f', 'r', 'i', 'e', 'n', 'd'; write"):
        tts.synthesize(["hello friend"], ["0"])


def test_what_the_models_have_not_is_refused(folder):
    with pytest.raises(ValueError, match=r"tts.speakers has 3; expected whole numbers 0 to 2"):
        load(folder, speakers=[3])
    build(HifiGanModel, HIFIGAN | {"sample_rate": 16000}).save_to(str(folder / "low.nemo"))
    with pytest.raises(ValueError, match=r"trained at 22050 Hz but .*low.nemo .* at 16000 Hz; choose a pair"):
        load(folder, vocoder=str(folder / "low.nemo"))


def test_a_text_of_too_few_frames_is_an_error_of_that_text(folder):
    hasty = load(folder, pace=1000.0)
    with pytest.raises((RuntimeError, ValueError)):
        hasty.synthesize([SHORT], ["0"])
