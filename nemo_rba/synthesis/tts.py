# SPDX-License-Identifier: Apache-2.0
"""Synthesizers: text in, mono float32 waveforms out.

``EspeakTTS`` needs no download and no GPU (the wheel ``espeakng-loader`` carries library and voices); it speaks at a
few hundred times real time on one core and serves recipes that must run anywhere. NeMo's own are in
``tts_fastpitch.py`` and ``tts_magpie.py``. All fit ``protocols.TTS``; none holds any state between two calls.

Beside what the protocol asks they offer ``languages`` and ``voices``, speaker -> language and speaker -> voice: one
voice may be several speakers, at other rates or in other languages, and it is voices that must be held out.
"""

import _ctypes
import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

ESPEAK_RATES = range(80, 451)  # words per minute that espeak-ng accepts
ESPEAK_PITCHES = range(100)
SILENCE_LEVEL = 1e-3  # below this a sample counts as silence (-60 dBFS)
EDGE_SECONDS = 0.05  # silence kept before and after the words


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
