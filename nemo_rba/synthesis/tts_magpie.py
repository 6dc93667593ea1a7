# SPDX-License-Identifier: Apache-2.0
"""NeMo's MagpieTTS: an autoregressive synthesizer of several languages, with the voices baked into its checkpoint."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rba.synthesis.tts import check_range, check_request, check_sampling_rate, resample, trim_silence
from nemo_rba.synthesis.tts_nemo import check_sayable, load_nemo


class MagpieTTS:
    """MagpieTTS of NeMo 3 and later (arXiv 2502.05236). A speaker is a language and a baked voice: ``"en-0"``.

    It samples its speech. Random numbers come from (seed, speaker, text), so an utterance does not depend on what else
    is spoken. It does not normalise text: write numbers and symbols in words (``synthesis.spoken_form``).

    Args:
        model: path of a ``.nemo`` file, or a pretrained name such as ``nvidia/magpie_tts_multilingual_357m``.
        languages: codes that the model's tokenizers know, e.g. ``en``.
        speakers: baked voices to use, e.g. ``[0, 1, 2, 3, 4]``.
        use_cfg: classifier-free guidance: better speech at twice the work.
        sampling_rate: Hz of the waveforms returned.
        seed: of the sampling.
        device: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: a model that cannot be loaded or has no baked voices, a speaker or language it has not.
    """

    def __init__(self, *, model: str, languages: Sequence[str], speakers: Sequence[int], use_cfg: bool,
                 sampling_rate: int, seed: int, device: str):  # fmt: skip
        from nemo.collections.tts.models import MagpieTTSModel

        if not speakers or not languages:
            raise ValueError(f"MagpieTTS: tts.speakers={list(speakers)}, tts.languages={list(languages)}; expected at "
                             "least one of each")  # fmt: skip
        check_sampling_rate(sampling_rate)
        self._model = load_nemo(MagpieTTSModel, model, "model", device)
        if not self._model.has_baked_context_embedding:
            raise ValueError(
                f"{model} (tts.model) has no baked voices; choose a checkpoint with baked context embeddings"
            )
        check_range("speakers", speakers, range(self._model.num_baked_speakers))
        self._tokenizers = self._find_tokenizers(languages)
        self._use_cfg, self._seed, self._device = use_cfg, seed, device
        self.sampling_rate = sampling_rate
        self._settings = {f"{language}-{index}": (language, index) for language in languages for index in speakers}
        self.speakers = tuple(self._settings)
        self.languages = {speaker: language for speaker, (language, _) in self._settings.items()}
        self.voices = {speaker: f"baked voice {index}" for speaker, (_, index) in self._settings.items()}

    def _find_tokenizers(self, languages: Sequence[str]) -> dict:
        """Of each language; NeMo would take any for one it does not know."""
        try:
            from nemo.collections.tts.parts.utils.tts_dataset_utils import LANGUAGE_TOKENIZER_MAP
        except ImportError as error:
            raise ValueError(
                "tts is MagpieTTS, whose languages this NeMo does not tell; expected NeMo 3 or newer: update NeMo, or "
                "choose nemo_rba.synthesis.tts_fastpitch.FastPitchTTS"
            ) from error

        has = set(self._model.tokenizer.tokenizers)
        known = sorted(language for language, names in LANGUAGE_TOKENIZER_MAP.items() if has.intersection(names))
        for language in languages:
            if language not in known:
                raise ValueError(f"tts.languages has {language!r}; this model speaks {', '.join(known)}")
        names = {language: next(n for n in LANGUAGE_TOKENIZER_MAP[language] if n in has) for language in languages}
        return {language: self._model.tokenizer.tokenizers[name] for language, name in names.items()}

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        """One waveform (A_i,) per text, one by one, on the CPU; see ``EspeakTTS.synthesize``."""
        check_request(texts, speakers, self.speakers)
        return [self._speak(text, speaker) for text, speaker in zip(texts, speakers, strict=True)]

    @torch.inference_mode()
    def _speak(self, text: str, speaker: str) -> Tensor:
        if not any(character.isalpha() for character in text) or any(character.isdigit() for character in text):
            raise ValueError(f"MagpieTTS cannot say {text!r}; write numbers and symbols in words")
        language, index = self._settings[speaker]
        if hasattr(self._tokenizers[language], "text_preprocessing_func"):  # one of NeMo's own, which skip letters
            check_sayable(text, self._tokenizers[language], "MagpieTTS")
        digest = hashlib.blake2b(f"{self._seed}:{speaker}:{text}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[self._device] if self._device.startswith("cuda") else []):
            torch.manual_seed(int.from_bytes(digest, "big") >> 1)
            audio, lengths = self._model.do_tts(text, language=language, use_cfg=self._use_cfg, speaker_index=index)
        samples = audio[0, : int(lengths[0])].float().clamp(-1, 1).cpu().numpy()
        waveform = torch.from_numpy(resample(samples, int(self._model.output_sample_rate), self.sampling_rate))
        return trim_silence(waveform, self.sampling_rate, text)
