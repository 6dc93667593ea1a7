# SPDX-License-Identifier: Apache-2.0
"""RBASpeechLM: NeMo's speech perception in front of megatron-core's GPTModel, saved as ``.nemo``.

    audio -> perception -> frames --+
                                    +-> splice -> GPTModel -> answer
    prompt ids -> word embeddings --+

It is built from a NeMo SALM checkpoint folder (``from_salm``) or restored from a ``.nemo`` (``restore_from``).
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from nemo.core import ModelPT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_rba.checkpoint.nemo_file import SafeSaveRestoreConnector
from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.hf import config_from_dict, load_weights
from nemo_rba.conversion.salm import open_salm
from nemo_rba.data.prompt import SALMPrompt
from nemo_rba.distributed import parallel
from nemo_rba.modules.generation import generate
from nemo_rba.modules.gpt import answer_logits, build_gpt, embed
from nemo_rba.modules.perception import EncodedSpeech, adapt, check_perception, encode
from nemo_rba.modules.splice import splice
from nemo_rba.types import Rollout, SamplingParams, SpeechBatch

_TOKENIZER_FILES = {"model": "tokenizer.json", "config": "tokenizer_config.json", "template": "chat_template.jinja"}
_TARGET = "nemo_rba.models.rba_speech_lm.RBASpeechLM"


class RBASpeechLM(ModelPT):
    """A speech language model that megatron can shard and NeMo can carry.

    ``cfg`` keys: ``perception`` (NeMo AudioPerceptionModule), ``llm`` (Hugging Face config), ``tokenizer``
    (files model, config, template), ``prompt_format``, ``audio_locator_tag``, ``tensor_model_parallel_size``,
    ``pipeline_model_parallel_size``, ``params_dtype``, ``seed``.
    """

    def __init__(self, cfg: DictConfig, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        cfg = self.cfg
        parallel.initialize(
            tensor_parallel_size=cfg.tensor_model_parallel_size,
            pipeline_parallel_size=cfg.pipeline_model_parallel_size,
            seed=cfg.seed,
        )
        self.prompt = self._load_prompt()
        self.llm_config = config_from_dict(OmegaConf.to_container(cfg.llm))
        dtype = getattr(torch, cfg.params_dtype)
        self.llm = build_gpt(**gpt_arguments(self.llm_config), params_dtype=dtype).to(parallel.device())
        self.perception = AudioPerceptionModule(cfg.perception).to(parallel.device(), dtype)
        check_perception(self.perception)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron's schedules
        self.eval()

    @classmethod
    def from_salm(
        cls, *, folder: str | Path, tensor_model_parallel_size: int, pipeline_model_parallel_size: int,
        params_dtype: str, seed: int,
    ) -> "RBASpeechLM":  # fmt: skip
        """Build from a NeMo SALM checkpoint folder (``SALM.save_pretrained`` with tokenizer and ``llm_backbone``).

        Raises:
            ValueError: a file, key or tensor is missing, unexpected or of the wrong shape.
        """
        salm = open_salm(folder)
        model = cls(
            OmegaConf.create(
                {
                    "perception": salm.config["perception"],
                    "llm": salm.llm_config.to_diff_dict(),
                    "tokenizer": {key: str(salm.folder / name) for key, name in _TOKENIZER_FILES.items()},
                    "prompt_format": salm.config["prompt_format"],
                    "audio_locator_tag": salm.config["audio_locator_tag"],
                    "tensor_model_parallel_size": tensor_model_parallel_size,
                    "pipeline_model_parallel_size": pipeline_model_parallel_size,
                    "params_dtype": params_dtype,
                    "seed": seed,
                }
            )
        )
        load_weights(
            model.llm,
            salm.read_llm,
            salm.llm_config,
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        )
        _load_perception(model.perception, salm.perception_state(), salm.folder)
        return model

    @classmethod
    def restore_from(cls, restore_path, *args, save_restore_connector=None, **kwargs) -> "RBASpeechLM":
        """Restore a ``.nemo``; nothing in the file is executed and nothing outside it is read.

        Raises:
            ValueError: not a ``.nemo`` of this class, or one that asks for either.
        """
        connector = save_restore_connector or SafeSaveRestoreConnector(
            target=_TARGET, artifact_keys=tuple(f"tokenizer.{key}" for key in _TOKENIZER_FILES)
        )
        return super().restore_from(str(restore_path), *args, save_restore_connector=connector, **kwargs)

    def _load_prompt(self) -> SALMPrompt:
        """Tokenizer from its registered files, which only exist under these names while the model is being built."""
        with tempfile.TemporaryDirectory() as folder:
            for key, name in _TOKENIZER_FILES.items():
                shutil.copy(self.register_artifact(f"tokenizer.{key}", self.cfg.tokenizer[key]), Path(folder) / name)
            return SALMPrompt.from_folder(
                folder=folder, prompt_format=self.cfg.prompt_format, audio_locator_tag=self.cfg.audio_locator_tag
            )

    @property
    def sampling_rate(self) -> int:
        """Hz of the audio the encoder expects."""
        return self.cfg.perception.preprocessor.sample_rate

    @property
    def config(self):
        """megatron's TransformerConfig, where its schedules look for it."""
        return self.llm.config

    def set_input_tensor(self, tensor) -> None:
        """Called by megatron's pipeline schedule."""
        self.llm.set_input_tensor(tensor)

    def encode(self, batch: SpeechBatch) -> EncodedSpeech:
        """Run the speech encoder once for a batch; the result can be used for generation and for training."""
        device, dtype = parallel.device(), next(self.perception.encoder.parameters()).dtype
        return encode(self.perception, batch.audio.to(device, dtype), batch.audio_lens.to(device))

    def embed_prompts(self, batch: SpeechBatch, speech: EncodedSpeech) -> tuple[Tensor, Tensor]:
        """Left-padded prompt embeddings (S, B, H) and their valid positions (B, S)."""
        frames, frame_lens = adapt(self.perception, speech)
        ids = batch.prompt_ids.to(frames.device)
        return splice(
            token_embeddings=embed(self.llm, ids),
            prompt_ids=ids,
            prompt_lens=batch.prompt_lens.to(frames.device),
            frames=frames,
            frame_lens=frame_lens,
            locator_id=self.prompt.audio_locator_id,
        )

    def forward(
        self,
        batch: SpeechBatch,
        speech: EncodedSpeech | None,
        response_ids: Tensor,
        response_mask: Tensor,
        group_size: int,
    ) -> Tensor:
        """Teacher-forced logits (M, V / tp) of the real tokens of N = B * G answers; see ``answer_logits``.

        Without ``speech`` the encoder runs here, with its gradient.
        """
        prompts, valid = self.embed_prompts(batch, self.encode(batch) if speech is None else speech)
        device = prompts.device
        return answer_logits(self.llm, prompts, valid, response_ids.to(device), response_mask.to(device), group_size)

    @torch.no_grad()
    def generate(
        self, batch: SpeechBatch, speech: EncodedSpeech, *, group_size: int, params: SamplingParams
    ) -> list[Rollout]:
        """``group_size`` answers to every prompt, ordered by prompt."""
        prompts, valid = self.embed_prompts(batch, speech)
        out = generate(
            self.llm,
            prompts,
            valid,
            ids=[instruction.id for instruction in batch.instructions],
            group_size=group_size,
            end_id=self.prompt.eot_id,
            banned_ids=self._banned_ids(),
            params=params,
        )
        return [
            Rollout(
                prompt_index=row // group_size,
                instruction=batch.instructions[row // group_size],
                response=self.prompt.decode(ids.tolist()),
                token_ids=ids,
                logprobs=logprobs,
                truncated=truncated,
            )
            for row, (ids, logprobs, truncated) in enumerate(
                zip(out.token_ids, out.logprobs, out.truncated, strict=True)
            )
        ]

    def _banned_ids(self) -> Tensor:
        """Tokens that are no words: the audio locator, and rows that only pad the embedding."""
        padding = range(self.prompt.vocab_size, self.llm_config.vocab_size)
        return torch.tensor([self.prompt.audio_locator_id, *padding], device=parallel.device())

    @classmethod
    def list_available_models(cls) -> Sequence:
        """None are published."""
        return []

    def setup_training_data(self, config) -> None:
        """Data belongs to the training loop (``algorithms.alignment``), not to the model."""

    def setup_validation_data(self, config) -> None:
        """As ``setup_training_data``."""


def _load_perception(perception: AudioPerceptionModule, state: dict[str, Tensor], folder: Path) -> None:
    result = perception.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"{folder}: the perception weights do not fit config.json: {len(result.missing_keys)} missing "
            f"{result.missing_keys[:5]}, {len(result.unexpected_keys)} unexpected {result.unexpected_keys[:5]}"
        )
