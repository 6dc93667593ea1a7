# SPDX-License-Identifier: Apache-2.0
"""NeMo's FastPitch and HiFi-GAN, batched. See ``tts.py`` for what a synthesizer offers beside its protocol."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rba.synthesis.tts import check_range, check_request, check_sampling_rate, resample, trim_silence
from nemo_rba.synthesis.tts_nemo import check_sayable, load_nemo

TOKENIZER_LANGUAGES = {
    "English": "en", "German": "de", "Spanish": "es", "French": "fr", "Italian": "it", "Vietnamese": "vi",
    "Hindi": "hi", "Arabic": "ar", "Chinese": "zh", "Japanese": "ja",
}  # what the names of NeMo's tokenizers begin with  # fmt: skip


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
