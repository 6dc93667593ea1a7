# SPDX-License-Identifier: Apache-2.0
"""Texts as vectors, for ``deduplicate.EmbeddingDuplicateFilter``: two texts that mean the same point the same way."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFEmbedder:
    """The mean of a Hugging Face encoder's last hidden states over the real tokens, of unit length.

    As Sentence-BERT pools (arXiv 1908.10084, section 3), so the encoders of sentence-transformers that pool by the mean
    (all-MiniLM, all-mpnet, gte, e5) can be given as they are, their folder of ``transformers`` files.

    Args:
        path: local folder with config.json, weights and tokenizer.
        batch_size: texts per forward pass; those of similar length go together.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: of the encoder, ``float32``, ``bfloat16`` or ``float16``; it pools in float32.
        max_tokens: what a text has beyond so many tokens is not read.

    Raises:
        ValueError: no model in the folder, weights missing, settings out of range.
    """

    def __init__(self, *, path: str, batch_size: int, device: str, dtype: str, max_tokens: int):
        from transformers import AutoModel, AutoTokenizer

        if batch_size < 1 or max_tokens < 1 or dtype not in DTYPES:
            raise ValueError(f"HFEmbedder: batch_size={batch_size}, max_tokens={max_tokens}, dtype={dtype!r}; expected "
                             f"both at least 1, and one of {', '.join(DTYPES)}")  # fmt: skip
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"HFEmbedder: no model in path={path!r}: config.json is missing; give a local folder, "
                             "e.g. one that `hf download <name> --local-dir <folder>` wrote")  # fmt: skip
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model, info = AutoModel.from_pretrained(
            path, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # a pooler is not used
        if missing:
            raise ValueError(f"HFEmbedder: the weights in path={path!r} lack {len(missing)} tensors "
                             f"({', '.join(missing[:3])}); download the whole model")  # fmt: skip
        self._model = model.to(device).eval()
        self._batch_size, self._device, self._max_tokens = batch_size, device, max_tokens

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU, each of length 1; the same up to rounding whatever stands beside a text."""
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        vectors = torch.zeros(len(texts), self._model.config.hidden_size)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            vectors[places] = self._embed([texts[place] for place in places])
        return vectors

    def _embed(self, texts: list[str]) -> Tensor:
        rows = self._tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        states = self._model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        real = rows["attention_mask"][:, :, None].float()  # (N, T, 1)
        mean = (states.float() * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        return torch.nn.functional.normalize(mean, dim=1).cpu()
