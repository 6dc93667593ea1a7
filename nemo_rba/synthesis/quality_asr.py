# SPDX-License-Identifier: Apache-2.0
"""The round trip: what a speech recognizer hears in a synthetic clip is compared with what it was to say.

Any callable ``(waveforms, sampling rate) -> texts`` will do as recognizer; ``NeMoASR`` is every ASR model of NeMo. A
recognizer makes mistakes of its own, so limits belong well above its error rate on good speech, and one that writes
numbers as digits is no judge of texts that say them in words.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.text import char_error_rate, word_error_rate

from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.synthesis.quality import Finding, grade
from nemo_rba.synthesis.tts import resample
from nemo_rba.types import Utterance

Transcribe = Callable[[Sequence[Tensor], int], list[str]]  # (waveforms (A_i,), sampling rate) -> one text each
METRICS = {"wer": word_error_rate, "cer": char_error_rate}


class AsrRoundTrip:
    """Word or character error rate of what is heard, without case and punctuation. Value: the rate, 0.5 = 50 %.

    Args:
        asr: who listens, see ``Transcribe``.
        metric: ``wer``, or ``cer`` for languages without blanks and for short texts.
        borderline: above this rate a clip is borderline.
        maximum: above it, it is dropped. Rates may exceed 1.

    Raises:
        ValueError: an unknown metric, or limits upside down.
    """

    def __init__(self, *, asr: Transcribe, metric: str, borderline: float, maximum: float):
        if metric not in METRICS or not 0 <= borderline <= maximum:
            raise ValueError(f"AsrRoundTrip: metric={metric!r}, borderline={borderline}, maximum={maximum}; expected "
                             f"one of {', '.join(METRICS)} and 0 <= borderline <= maximum")  # fmt: skip
        self._asr, self._metric, self._borderline, self._maximum = asr, metric, borderline, maximum

    def __call__(self, utterances: Sequence[Utterance]) -> list[Finding]:
        """See ``quality.QualityCheck``; all utterances have one sampling rate."""
        texts = self._asr([utterance.audio for utterance in utterances], utterances[0].sampling_rate)
        return [
            self._compare(utterance.instruction.text, heard)
            for utterance, heard in zip(utterances, texts, strict=True)
        ]  # fmt: skip

    def _compare(self, text: str, heard: str) -> Finding:
        rate = error_rate(text, heard, self._metric)
        reason = f"{self._metric} above {{:g}}"
        return replace(grade(rate, borderline=self._borderline, maximum=self._maximum, reason=reason), heard=heard)


def error_rate(text: str, heard: str, metric: str) -> float:
    """Edits over the words (``wer``) or characters (``cer``) of ``text``; where it has none, 1 if anything is heard."""
    expected, found = normalize_text(text), normalize_text(heard)
    if not expected:
        return float(bool(found))
    return float(METRICS[metric]([found], [expected]))


class NeMoASR:
    """An ASR model of NeMo (CTC, RNN-T, TDT, hybrid, Canary) behind ``Transcribe``.

    Args:
        model: a ``.nemo`` file, or a pretrained name to download, e.g. ``nvidia/parakeet-ctc-0.6b``.
        batch_size: clips per pass.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: a model that is not there or cannot be loaded.
    """

    def __init__(self, *, model: str, batch_size: int, device: str):
        from nemo.collections.asr.models import ASRModel

        advice = "download it where there is a network (huggingface.co or ngc.nvidia.com) and give the .nemo file"
        if model.endswith(".nemo") and not Path(model).is_file():
            raise ValueError(f"asr.model: no file {model!r}; {advice}")
        load = ASRModel.restore_from if model.endswith(".nemo") else ASRModel.from_pretrained
        try:
            self._model = load(model, map_location=torch.device(device)).eval().to(device)
        except Exception as error:
            raise ValueError(f"asr.model: cannot load {model!r} ({type(error).__name__}: {error}); {advice}") from error
        self._sampling_rate, self._batch_size = int(self._model.cfg.preprocessor.sample_rate), batch_size
        self._model.sample_rate = self._sampling_rate  # transcribe looks for it here where the config lacks it

    def __call__(self, audio: Sequence[Tensor], sampling_rate: int) -> list[str]:
        """What is said in each waveform (A_i,), at any sampling rate."""
        samples = [resample(waveform.numpy(), sampling_rate, self._sampling_rate) for waveform in audio]
        found = self._model.transcribe(samples, batch_size=self._batch_size, num_workers=0, verbose=False)
        return [getattr(hypothesis, "text", hypothesis) for hypothesis in found]
