# SPDX-License-Identifier: Apache-2.0
"""Synthesizers: text in, mono float32 waveforms out.

``EspeakTTS`` needs no download and no GPU (the wheel ``espeakng-loader`` carries library and voices); it speaks at a
few hundred times real time on one core and serves recipes that must run anywhere. ``FastPitchTTS`` is NeMo's own
FastPitch + HiFi-GAN, batched. Both fit ``protocols.TTS``; neither holds any state between two calls.

Beside what the protocol asks they offer ``languages`` and ``voices``, speaker -> language and speaker -> voice: one
voice may be several speakers, at other rates or in other languages, and it is voices that must be held out.
"""

import _ctypes
import contextlib
import ctypes
import functools
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

ESPEAK_RATES = range(80, 451)  # words per minute that espeak-ng accepts
ESPEAK_PITCHES = range(100)
SILENCE_LEVEL = 1e-3  # below this a sample counts as silence (-60 dBFS)
EDGE_SECONDS = 0.05  # silence kept before and after the words
SAID_PUNCTUATION = "%&@#"  # what a reader would say; a tokenizer may skip other punctuation
TOKENIZER_LANGUAGES = {
    "English": "en", "German": "de", "Spanish": "es", "French": "fr", "Italian": "it", "Vietnamese": "vi",
    "Hindi": "hi", "Arabic": "ar", "Chinese": "zh", "Japanese": "ja",
}  # what the names of NeMo's tokenizers begin with  # fmt: skip


class EspeakTTS:
    """espeak-ng through ctypes. A speaker is a voice at a rate and a pitch, named like ``en-us+m3-r170-p50``.

    Args:
        voices: espeak-ng voices with an optional variant, e.g. ``en-us``, ``en-us+f2`` (British English is ``en``).
        rates: words per minute, 80-450.
        pitches: 0-99; 50 is the voice's own.
        sampling_rate: Hz of the waveforms returned.

    Raises:
        ValueError: an unknown voice or variant, or a rate or pitch out of range.
    """

    def __init__(self, *, voices: Sequence[str], rates: Sequence[int], pitches: Sequence[int], sampling_rate: int):
        if not (voices and rates and pitches):
            raise ValueError(f"EspeakTTS has no speakers: voices={list(voices)}, rates={list(rates)}, pitches="
                             f"{list(pitches)}; each of tts.voices, tts.rates and tts.pitches needs one")  # fmt: skip
        check_range("rates", rates, ESPEAK_RATES)
        check_range("pitches", pitches, ESPEAK_PITCHES)
        check_sampling_rate(sampling_rate)
        with _Espeak() as espeak:
            for voice in voices:
                espeak.check_voice(voice)
        self.sampling_rate = sampling_rate
        combinations = itertools.product(voices, rates, pitches)
        self._settings = {f"{v}-r{rate}-p{pitch}": (v, rate, pitch) for v, rate, pitch in combinations}
        self.speakers = tuple(self._settings)
        self.voices = {speaker: voice for speaker, (voice, *_) in self._settings.items()}
        self.languages = {speaker: voice.partition("+")[0] for speaker, voice in self.voices.items()}

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        """One waveform (A_i,) per text, silence trimmed to 50 ms at both ends.

        Raises:
            ValueError: an unknown speaker, lists of different length, or a text that gives no sound.
        """
        check_request(texts, speakers, self._settings)
        return [self._speak(text, speaker) for text, speaker in zip(texts, speakers, strict=True)]

    def _speak(self, text: str, speaker: str) -> Tensor:
        with _Espeak() as espeak:
            samples = espeak.speak(text, *self._settings[speaker])
            audio = resample(samples, espeak.sampling_rate, self.sampling_rate)
        return trim_silence(torch.from_numpy(audio), self.sampling_rate, text)


class _Espeak:
    """The C library, freshly loaded: a context for one clip.

    espeak-ng keeps its wave generator's phase, flutter and random state in static variables, which neither
    ``espeak_Initialize`` nor ``espeak_Cancel`` resets, so a second clip sounds a little different from a first one.
    Unloading the library resets them (about 3 ms a clip), and speech is a function of text and speaker alone.
    """

    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    _SYNCHRONOUS, _UTF8 = 2, 1  # enum values of speak_lib.h
    _RATE, _PITCH = 1, 3

    def __enter__(self) -> "_Espeak":
        import espeakng_loader

        self._data = Path(espeakng_loader.get_data_path())
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self._lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        arguments = [ctypes.c_char_p, ctypes.c_size_t] + [ctypes.c_uint] * 4 + [ctypes.c_void_p] * 2
        self._lib.espeak_Synth.argtypes = arguments
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.sampling_rate = self._lib.espeak_Initialize(self._SYNCHRONOUS, 0, str(self._data).encode(), 0)
        if self.sampling_rate <= 0:
            raise ValueError(f"espeak-ng does not start from its data in {self._data}; reinstall espeakng-loader")
        self._lib.espeak_ng_SetRandSeed(1)
        self._lib.espeak_ListVoices.restype = ctypes.c_void_p
        self._voices = self._lib.espeak_ListVoices(None)  # choosing a voice would list them: to free what it forgets
        self._chunks: list[np.ndarray] = []
        self._callback = self._CALLBACK(self._collect)  # kept: ctypes frees callbacks that nobody holds
        self._lib.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *_exception) -> None:
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(self._voices)  # 2 kB that no call of the library gives back
        self._lib.espeak_Terminate()
        _ctypes.dlclose(self._lib._handle)

    def check_voice(self, voice: str) -> None:
        """Raise ValueError unless the library has the voice and its variant (it ignores unknown variants silently)."""
        base, plus, variant = voice.partition("+")
        if self._lib.espeak_SetVoiceByName(base.encode()) != 0:
            known = sorted(p.name.lower() for p in (self._data / "lang").rglob("*") if p.is_file())
            alike = [name for name in known if name[:2] == base[:2].lower()]
            raise ValueError(f"espeak-ng has no voice {base!r} (tts.voices); it has {', '.join(alike or known)}")
        variants = sorted(p.name for p in (self._data / "voices" / "!v").iterdir())
        if plus and variant not in variants:
            raise ValueError(f"espeak-ng has no variant {variant!r} (tts.voices: {voice!r}); it has {variants}")

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """Float32 samples (A,) at ``self.sampling_rate``; empty where espeak-ng finds nothing to say."""
        self._lib.espeak_SetVoiceByName(voice.encode())
        self._lib.espeak_SetParameter(self._RATE, rate, 0)
        self._lib.espeak_SetParameter(self._PITCH, pitch, 0)
        encoded = text.encode() + b"\0"
        self._lib.espeak_Synth(encoded, len(encoded), 0, 1, 0, self._UTF8, None, None)
        self._lib.espeak_Synchronize()
        if not self._chunks:
            return np.zeros(0, dtype=np.float32)
        return np.concatenate(self._chunks).astype(np.float32) / 32768.0

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            # not numpy.ctypeslib.as_array: it makes a type for every length, and ctypes keeps them all
            self._chunks.append(np.frombuffer(ctypes.string_at(samples, 2 * count), dtype=np.int16))
        return 0


class FastPitchTTS:
    """NeMo FastPitch and HiFi-GAN. A speaker is a number of the FastPitch model, written as a string: ``"0"``.

    What is said does not depend on what else is in the batch, see ``keep_padding_out``. The language is the model's,
    where its normalizer or its tokenizer tells.

    Args:
        fastpitch: path of a ``.nemo`` file, or a pretrained name such as ``tts_en_fastpitch_multispeaker``.
        vocoder: the same for HiFi-GAN, e.g. ``tts_en_hifitts_hifigan_ft_fastpitch``.
        speakers: speaker numbers to use; ``[0]`` for a single-speaker model.
        pace: 1 = as trained, above 1 = faster.
        batch_size: texts per forward pass.
        sampling_rate: Hz of the waveforms returned.
        device: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: a model that cannot be loaded, is of another kind, or has not the speaker; or two models of
            different sampling rates.
    """

    def __init__(self, *, fastpitch: str, vocoder: str, speakers: Sequence[int], pace: float, batch_size: int,
                 sampling_rate: int, device: str):  # fmt: skip
        from nemo.collections.tts.models import FastPitchModel, HifiGanModel

        if not speakers or pace <= 0 or batch_size < 1:
            raise ValueError(f"FastPitchTTS: tts.speakers={list(speakers)}, tts.pace={pace}, tts.batch_size="
                             f"{batch_size}; expected at least one speaker, pace > 0, batch_size >= 1")  # fmt: skip
        check_sampling_rate(sampling_rate)
        self._fastpitch = load_nemo(FastPitchModel, fastpitch, "fastpitch", device)
        self._vocoder = load_nemo(HifiGanModel, vocoder, "vocoder", device)
        self._vocoder.mpd = self._vocoder.msd = None  # the discriminators, 71 M parameters that only training needs
        self._model_rate = int(self._fastpitch.cfg.sample_rate)
        if self._model_rate != int(self._vocoder.cfg.sample_rate):
            raise ValueError(f"{fastpitch} (tts.fastpitch) is trained at {self._model_rate} Hz but {vocoder} "
                             f"(tts.vocoder) at {self._vocoder.cfg.sample_rate} Hz; choose a pair")  # fmt: skip
        if not self._fastpitch.learn_alignment or self._fastpitch.fastpitch.speaker_encoder is not None:
            raise ValueError(f"{fastpitch} (tts.fastpitch) has no tokenizer of its own (learn_alignment), or speakers "
                             "that are encoded and not numbered; choose another model")  # fmt: skip
        keep_padding_out(self._fastpitch.fastpitch)
        embedding = self._fastpitch.fastpitch.speaker_emb
        self._multispeaker = embedding is not None
        num_speakers = embedding.num_embeddings if self._multispeaker else 1
        check_range("speakers", speakers, range(num_speakers))
        self._pace, self._batch_size, self._device = pace, batch_size, device
        self.sampling_rate = sampling_rate
        self.speakers = tuple(str(speaker) for speaker in speakers)
        language = _language_of(self._fastpitch)
        self.languages = dict.fromkeys(self.speakers, language) if language else {}

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        """One waveform (A_i,) per text, on the CPU; see ``EspeakTTS.synthesize``."""
        check_request(texts, speakers, self.speakers)
        waveforms = []
        for start in range(0, len(texts), self._batch_size):
            batch = slice(start, start + self._batch_size)
            waveforms += self._forward(texts[batch], speakers[batch])
        return waveforms

    @torch.inference_mode()
    def _forward(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        rows = [self._parse(text) for text in texts]
        pad = self._fastpitch.vocab.pad
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(self._device)
        speaker = torch.tensor([int(s) for s in speakers], device=self._device) if self._multispeaker else None
        spectrogram, num_frames, *_ = self._fastpitch(
            text=tokens, durs=None, pitch=None, speaker=speaker, pace=self._pace
        )  # (B, mel, frames), (B,)
        waveforms = []
        for row, frames, text in zip(spectrogram, num_frames.tolist(), texts, strict=True):
            # one by one: the vocoder would hear the padding at the end of the shorter rows
            audio = self._vocoder.convert_spectrogram_to_audio(spec=row[None, :, : int(frames)])[0]  # (A,)
            samples = audio.float().clamp(-1, 1).cpu().numpy()
            waveform = torch.from_numpy(resample(samples, self._model_rate, self.sampling_rate))
            waveforms.append(trim_silence(waveform, self.sampling_rate, text))
        return waveforms

    def _parse(self, text: str) -> Tensor:
        model, said = self._fastpitch, text
        if model.text_normalizer_call is not None:
            said = model.text_normalizer_call(text, **model.text_normalizer_call_kwargs)
        check_sayable(said, model.vocab, "FastPitch")
        return model.parse(said, normalize=False)[0].cpu()


def keep_padding_out(fastpitch: torch.nn.Module) -> None:
    """Have the layers of a ``FastPitchModule`` see zeros behind the end of a text, as if it were alone.

    NeMo masks what a layer gives, but not what stands between two convolutions of a layer. There the padding of a batch
    would reach into the ends of its shorter texts, and by attention everywhere: other durations, other speech.
    """
    from nemo.collections.tts.modules.fastpitch import TemporalPredictor
    from nemo.collections.tts.modules.transformer import TransformerLayer

    for module in fastpitch.modules():
        if isinstance(module, TransformerLayer):
            _mask_inputs(module, [module.pos_ff.CoreNet[2]])  # the second convolution
        elif isinstance(module, TemporalPredictor):
            _mask_inputs(module, [layer.conv for layer in module.layers])


def _mask_inputs(module: torch.nn.Module, convolutions: Sequence[torch.nn.Module]) -> None:
    """Multiply what the convolutions inside ``module`` get, (B, C, T), by the mask it was called with, (B, T, 1)."""
    mask: list[Tensor] = []

    def note(_, arguments: tuple, keywords: dict) -> None:
        mask[:] = [keywords["mask"] if "mask" in keywords else arguments[1]]

    module.register_forward_pre_hook(note, with_kwargs=True)
    for convolution in convolutions:
        convolution.register_forward_pre_hook(lambda _, arguments: arguments[0] * mask[0].transpose(1, 2))


def _language_of(model) -> str | None:
    """The language of a FastPitch model, None where its config does not tell."""
    told = [
        (model.cfg.get(part) or {}).get(key)
        for part, key in (("text_normalizer", "lang"), ("text_tokenizer", "locale"))
    ]
    name = type(model.vocab).__name__
    told += [language for start, language in TOKENIZER_LANGUAGES.items() if name.startswith(start)]
    return next((str(language) for language in told if language), None)


def check_sayable(text: str, tokenizer, name: str) -> None:
    """Raise ValueError where a tokenizer of NeMo would pass over letters, digits or symbols, or finds nothing to say.

    Such a tokenizer makes pieces of a text, characters or phonemes, and skips those it does not know with no more than
    a warning. ``name`` is the synthesizer's, for the message.
    """
    prepared = tokenizer.text_preprocessing_func(text)
    with tokenizer.set_phone_prob(1.0) if hasattr(tokenizer, "set_phone_prob") else contextlib.nullcontext():
        pieces = tokenizer.g2p(prepared) if hasattr(tokenizer, "g2p") else prepared
    known = set(tokenizer.tokens)
    skipped = [p for p in pieces if p not in known and not (len(p) == 3 and p[:2] in known)]  # AH0: AH without stress
    skipped = [piece for piece in dict.fromkeys(skipped) if any(map(_is_said, piece))]
    if skipped or not any(character.isalnum() for character in text):
        why = f"its tokenizer does not know {', '.join(map(repr, skipped))}" if skipped else "it has no letters"
        raise ValueError(f"{name} cannot say {text!r}: {why}; write numbers and symbols in words, in the letters of "
                         "its language (synthesis.spoken_form, synthesis.speech_filters)")  # fmt: skip


def _is_said(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMNS" or character in SAID_PUNCTUATION


def load_nemo(model_class, source: str, key: str, device: str):
    """A ``.nemo`` file or a pretrained model, in evaluation mode on ``device``."""
    advice = f"download it where there is a network (ngc.nvidia.com or huggingface.co) and give the file as tts.{key}"
    path = Path(source)
    if source.endswith(".nemo"):
        if not path.is_file():
            raise ValueError(f"tts.{key}: no file {source!r} with a {model_class.__name__}; {advice}")
        load: Callable = functools.partial(model_class.restore_from, str(path), map_location=device)
    else:
        load = functools.partial(model_class.from_pretrained, source, map_location=device)
    try:
        model = load()
    except Exception as error:
        raise ValueError(
            f"tts.{key}: cannot load {model_class.__name__} {source!r} ({type(error).__name__}: {error}); {advice}"
        ) from error
    return model.eval().to(device)


def resample(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Float32 samples (A,) at ``source_rate`` Hz -> float32 (A',) at ``target_rate`` Hz, kept inside [-1, 1]."""
    if source_rate == target_rate or len(samples) == 0:
        return np.asarray(samples, dtype=np.float32)
    return np.clip(soxr.resample(samples, source_rate, target_rate).astype(np.float32), -1.0, 1.0)


def trim_silence(audio: Tensor, sampling_rate: int, text: str) -> Tensor:
    """Cut silence at both ends of (A,) down to 50 ms. Raises ValueError naming ``text`` if nothing is left."""
    (loud,) = torch.nonzero(audio.abs() > SILENCE_LEVEL, as_tuple=True)
    if len(loud) == 0:
        raise ValueError(f"no sound came out of the text {text!r}; it has nothing a synthesizer can pronounce")
    margin = round(EDGE_SECONDS * sampling_rate)
    return audio[max(0, int(loud[0]) - margin) : int(loud[-1]) + margin + 1].clone()


def check_request(texts: Sequence[str], speakers: Sequence[str], known) -> None:
    if len(texts) != len(speakers):
        raise ValueError(f"{len(texts)} texts but {len(speakers)} speakers; expected one speaker per text")
    for speaker in speakers:
        if speaker not in known:
            raise ValueError(f"unknown speaker {speaker!r}; this synthesizer has {', '.join(list(known)[:20])}")


def check_range(key: str, values: Sequence[int], allowed: range) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"tts.{key} has {value!r}; expected whole numbers {allowed.start} to {allowed.stop - 1}")


def check_sampling_rate(sampling_rate: int) -> None:
    if sampling_rate < 8000:
        raise ValueError(f"tts.sampling_rate is {sampling_rate!r}; expected Hz, at least 8000 (speech models: 16000)")
