# SPDX-License-Identifier: Apache-2.0
"""A reward model of the Hugging Face kind: sequence classification with one label, over transcript and answer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_rba.functional import typed
from nemo_rba.types import Rollout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RewardModel:
    """Score of (what was said, answer) in the model's own chat template; Bradley-Terry models as of 2403.13787.

    Args:
        path: folder with config.json, weights, tokenizer and chat template; one label.
        batch_size: answers per forward pass; they are sorted by length.
        device, dtype: as for ``HFTeacher``.
        scale: what the score is divided by.
        sigmoid: whether it is then put into (0, 1): under Bradley-Terry, the chance of being preferred to a score of 0.

    Raises:
        ValueError: no such folder, no chat template, another number of labels, untrained weights; at a call, an answer
            that is too long for the model.
    """

    def __init__(self, *, path: str, batch_size: int, device: str, dtype: str, scale: float, sigmoid: bool):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if batch_size < 1 or scale <= 0 or dtype not in _DTYPES:
            raise ValueError(
                f"reward model: batch_size={batch_size}, scale={scale}, dtype={dtype!r}; expected 1 or more, above 0, "
                f"one of {', '.join(_DTYPES)}"
            )
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"no reward model in {path}: config.json is missing; give a Hugging Face model's folder")
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {path} has no chat template; put the reward model's into the folder")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=_DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        if model.config.num_labels != 1 or info["missing_keys"]:
            raise ValueError(
                f"{path} has {model.config.num_labels} labels and lacks the weights {sorted(info['missing_keys'])[:3]};"
                " expected a trained reward model with one label"
            )
        self._path, self._batch_size, self._scale, self._sigmoid = path, batch_size, scale, sigmoid
        self._device = "cuda" if device == "gpu" else device  # Lightning's word for it
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        texts = [self._text(rollout) for rollout in rollouts]
        rows = {text: self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in dict.fromkeys(texts)}
        self._check_lengths(rows.values())
        order = sorted(rows, key=lambda text: len(rows[text]))
        scores: dict[str, float] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            scores |= dict(zip(part, self._score([rows[text] for text in part]), strict=True))
        return torch.tensor([scores[text] for text in texts], dtype=torch.float32)

    def _text(self, rollout: Rollout) -> str:
        messages = [
            {"role": "user", "content": typed(rollout.instruction)},
            {"role": "assistant", "content": rollout.response},
        ]
        return self._tokenizer.apply_chat_template(messages, tokenize=False)

    def _check_lengths(self, rows) -> None:
        longest, limit = max(map(len, rows)), getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"an instruction with its answer has {longest} tokens, but the reward model in {self._path} reads "
                f"{limit}; lower rollouts.max_new_tokens"
            )

    def _score(self, rows: Sequence[list[int]]) -> list[float]:
        """One row at a time where the model cannot find the end of a padded one, else as a batch."""
        pad = self._tokenizer.pad_token_id
        if pad is None or self._model.config.pad_token_id != pad:
            outputs = [self._model(input_ids=torch.tensor([row], device=self._device)).logits for row in rows]
        else:
            width = max(map(len, rows))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
            outputs = [self._model(input_ids=ids, attention_mask=mask).logits]
        scores = torch.cat(outputs)[:, 0].float() / self._scale
        return (scores.sigmoid() if self._sigmoid else scores).tolist()
