# SPDX-License-Identifier: Apache-2.0
"""RBASpeechLM: NeMo's speech perception in front of megatron-core's GPTModel, saved as ``.nemo``.

    audio -> perception -> frames --+
                                    +-> splice -> GPTModel -> answer
    prompt ids -> word embeddings --+

It is built from a NeMo SALM checkpoint folder (``from_salm``) or restored from a ``.nemo`` (``restore_from``).
"""

import gc
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from nemo.core import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_rba.checkpoint.nemo_file import SafeSaveRestoreConnector, WholeStateConnector
from nemo_rba.checkpoint.whole import gather_state
from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.foreign import refuse_foreign_code
from nemo_rba.conversion.hf import config_from_dict, export_weights, load_weights
from nemo_rba.conversion.salm import open_salm, write_salm
from nemo_rba.conversion.tokenizer_files import for_both_versions
from nemo_rba.data.prompt import SALMPrompt
from nemo_rba.distributed import parallel, pipeline
from nemo_rba.modules.generation import generate
from nemo_rba.modules.gpt import answer_logits, build_gpt, check_layout, embed, whole_sequences
from nemo_rba.modules.lora import merged
from nemo_rba.modules.perception import EncodedSpeech, adapt, build_perception, encode
from nemo_rba.modules.splice import left_pad, splice, valid_positions
from nemo_rba.types import Rollout, SamplingParams, SpeechBatch

_TOKENIZER_FILES = {"model": "tokenizer.json", "config": "tokenizer_config.json", "template": "chat_template.jinja"}
_OPTIONAL_FILES = ("template",)  # NeMo's prompt formats do not use it
_ONE_PROCESS = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False}
_TARGET = "nemo_rba.models.rba_speech_lm.RBASpeechLM"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float16 would need its loss scaled


class RBASpeechLM(ModelPT):
    """A speech language model that megatron can shard and NeMo can carry.

    The speech side lives on the first pipeline stage, whole on each of its tensor-parallel ranks; elsewhere
    ``perception`` is None.

    ``cfg`` keys: ``perception`` (NeMo AudioPerceptionModule), ``llm`` (Hugging Face config), ``tokenizer``
    (files model, config, template), ``prompt_format``, ``audio_locator_tag``, ``tensor_model_parallel_size``,
    ``pipeline_model_parallel_size``, ``sequence_parallel``, ``params_dtype``, ``seed``.
    """

    def __init__(self, cfg: DictConfig, trainer=None):
        gc.collect()  # a model trained before lies in cycles, with gradients and optimizer: a GPU has no room for two
        super().__init__(cfg=cfg, trainer=trainer)
        cfg = self.cfg
        refuse_foreign_code(OmegaConf.to_container(cfg.perception, resolve=False), "perception")
        parallel.initialize(
            tensor_parallel_size=cfg.tensor_model_parallel_size,
            pipeline_parallel_size=cfg.pipeline_model_parallel_size,
            seed=cfg.seed,
        )
        self.prompt = self._load_prompt()
        self.llm_config = config_from_dict(OmegaConf.to_container(cfg.llm))
        dtype = _dtype(cfg.params_dtype)
        self.llm = build_gpt(
            **gpt_arguments(self.llm_config), params_dtype=dtype, sequence_parallel=cfg.sequence_parallel
        ).to(parallel.device())
        self.perception = None
        if pipeline.is_first_stage():
            self.perception = build_perception(cfg.perception).to(parallel.device(), dtype)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron's schedules
        self.eval()

    @classmethod
    def from_salm(
        cls, *, folder: str | Path, tensor_model_parallel_size: int, pipeline_model_parallel_size: int,
        params_dtype: str, seed: int, sequence_parallel: bool,
    ) -> "RBASpeechLM":  # fmt: skip
        """Build from a NeMo SALM checkpoint folder (``SALM.save_pretrained`` with tokenizer and ``llm_backbone``).

        Raises:
            ValueError: a file, key or tensor is missing, unexpected or of the wrong shape; a layout does not divide.
        """
        salm = open_salm(folder)
        model = cls(
            OmegaConf.create(
                {
                    "perception": salm.config["perception"],
                    "llm": salm.llm_config.to_diff_dict(),
                    "tokenizer": _tokenizer_files(salm.folder),
                    "prompt_format": salm.config["prompt_format"],
                    "audio_locator_tag": salm.config["audio_locator_tag"],
                    "tensor_model_parallel_size": tensor_model_parallel_size,
                    "pipeline_model_parallel_size": pipeline_model_parallel_size,
                    "sequence_parallel": sequence_parallel,
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
        if model.perception is not None:
            _load_perception(model.perception, salm.perception_state(), salm.folder)
        return model

    @classmethod
    def check_salm(
        cls, folder: str | Path, *, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1,
        sequence_parallel: bool = False, world_size: int = 1,
    ) -> None:  # fmt: skip
        """Find all that ``from_salm`` would refuse, from names and shapes, without building the language model.

        Raises:
            ValueError: as ``from_salm``, also for the tokenizer, the prompt format and the audio tag.
        """
        salm = open_salm(folder)
        arguments = gpt_arguments(salm.llm_config)
        check_layout(
            transformer=arguments["transformer"],
            tensor_parallel_size=tensor_model_parallel_size,
            pipeline_parallel_size=pipeline_model_parallel_size,
            sequence_parallel=sequence_parallel,
            world_size=world_size,
        )
        SALMPrompt.from_folder(
            folder=salm.folder,
            prompt_format=salm.config["prompt_format"],
            audio_locator_tag=salm.config["audio_locator_tag"],
        )
        perception = build_perception(OmegaConf.create(salm.config["perception"]))
        salm.check_perception({name: tuple(value.shape) for name, value in perception.state_dict().items()})

    def save_salm(self, folder: str | Path) -> None:
        """Write a NeMo SALM checkpoint folder, which NeMo and its vLLM plug-in read. Collective, from any layout.

        LoRA is merged, here as in ``save_to``.

        Each pipeline stage writes its own tensors into one file, one by one: all nodes must see the folder.

        Raises:
            ValueError: the folder exists.
        """
        keys = ("perception", "prompt_format", "audio_locator_tag")
        rank = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_data_parallel_rank()
        with merged(self.llm):
            write_salm(
                Path(folder),
                settings={key: value for key, value in OmegaConf.to_container(self.cfg).items() if key in keys},
                llm_config=self.llm_config,
                dtype=_dtype(self.cfg.params_dtype),
                tokenizer=self._tokenizer,
                perception=None if self.perception is None else self.perception.state_dict(),
                llm_tensors=export_weights(
                    self.llm, self.llm_config, tp_group=parallel_state.get_tensor_model_parallel_group()
                ),
                is_writer=rank == 0,
            )

    @classmethod
    def restore_from(
        cls, restore_path, *args, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1,
        sequence_parallel: bool = False, save_restore_connector=None, **kwargs,
    ) -> "RBASpeechLM":  # fmt: skip
        """Restore a ``.nemo`` at any layout; nothing in the file is executed and nothing outside it is read.

        Raises:
            ValueError: not a ``.nemo`` of this class, or one that asks for either; a layout does not divide.
        """
        if not Path(restore_path).is_file():
            raise ValueError(
                f"{restore_path} is no file; expected a .nemo of an RBASpeechLM (a SALM folder: model=salm)"
            )
        connector = save_restore_connector or SafeSaveRestoreConnector(
            target=_TARGET,
            artifact_keys=tuple(f"tokenizer.{key}" for key in _TOKENIZER_FILES if key not in _OPTIONAL_FILES),
            optional_artifact_keys=tuple(f"tokenizer.{key}" for key in _OPTIONAL_FILES),
            settings={
                "tensor_model_parallel_size": tensor_model_parallel_size,
                "pipeline_model_parallel_size": pipeline_model_parallel_size,
                "sequence_parallel": sequence_parallel,
            },
        )
        return super().restore_from(str(restore_path), *args, save_restore_connector=connector, **kwargs)

    def save_to(self, save_path: str | Path) -> None:
        """Write a ``.nemo``, whole and in one place, from any layout. Collective; rank 0 writes.

        Host memory: one copy of the weights on rank 0, one tensor at a time elsewhere.
        """
        path = Path(save_path)
        with merged(self.llm):
            whole = gather_state(self)
        if parallel.rank() == 0:
            draft = path.with_name(path.name + ".partial")
            self._save_restore_connector = WholeStateConnector(state=whole, settings=_ONE_PROCESS)
            try:
                super().save_to(str(draft))
            finally:
                self._save_restore_connector = SaveRestoreConnector()
            draft.replace(path)
        parallel.barrier()

    def _load_prompt(self) -> SALMPrompt:
        """Tokenizer from its registered files, which only exist under these names while the model is being built."""
        with tempfile.TemporaryDirectory() as folder:
            for key in list(self.cfg.tokenizer):
                path = self.register_artifact(f"tokenizer.{key}", self.cfg.tokenizer[key])
                shutil.copy(path, Path(folder) / _TOKENIZER_FILES[key])
            files = for_both_versions({path.name: path.read_bytes() for path in Path(folder).iterdir()})
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self._tokenizer = files  # for save_salm
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

    # Looked up by megatron when it sums the gradients of tied embeddings over the first and last stage.

    @property
    def pre_process(self) -> bool:
        """Whether this stage has the embeddings."""
        return self.llm.pre_process

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether the word embeddings are tied to the output layer."""
        return self.llm.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
        """This stage's copy of the tied embeddings."""
        return self.llm.shared_embedding_or_output_weight()

    def encode(self, batch: SpeechBatch) -> EncodedSpeech | None:
        """Run the speech encoder once for a batch; the result can be used for generation and for training.

        None for typed prompts. Collective over pipeline stages: those without the encoder get the number of frames,
        and no features.
        """
        if batch.is_typed:
            return None
        speech = None if self.perception is None else self._encode_here(batch)
        if pipeline.num_stages() == 1:
            return speech
        with torch.no_grad():
            lens = batch.prompt_lens.to(parallel.device()) if speech is None else adapt(self.perception, speech)[1]
            lens = pipeline.from_first_stage(lens.clone())
        return EncodedSpeech(lens.new_empty(len(lens), 0), lens) if speech is None else speech

    def _encode_here(self, batch: SpeechBatch) -> EncodedSpeech:
        device = parallel.device()
        return encode(self.perception, batch.audio.to(device, torch.float32), batch.audio_lens.to(device))

    def embed_prompts(self, batch: SpeechBatch, speech: EncodedSpeech | None) -> tuple[Tensor | None, Tensor]:
        """Left-padded prompt embeddings (S, B, H), None beyond the first stage, and their valid positions (B, S).

        ``speech`` is None for typed prompts.
        """
        prompt_lens = batch.prompt_lens.to(parallel.device())
        if batch.is_typed:
            if self.perception is None:
                return None, valid_positions(prompt_lens)
            return left_pad(embed(self.llm, batch.prompt_ids.to(parallel.device())), prompt_lens)
        if self.perception is None:
            return None, valid_positions(prompt_lens - 1 + speech.lens)
        frames, frame_lens = adapt(self.perception, speech)
        ids = batch.prompt_ids.to(frames.device)
        locator = self.prompt.audio_locator_id  # may lie beyond the embedding: its row is never used
        return splice(
            token_embeddings=embed(self.llm, ids.masked_fill(ids == locator, 0)),
            prompt_ids=ids,
            prompt_lens=prompt_lens,
            frames=frames,
            frame_lens=frame_lens,
            locator_id=locator,
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

        Without ``speech`` the encoder runs here, with its gradient, unless prompts are typed. Before the last pipeline
        stage the result is hidden states, beyond the first the input comes by ``set_input_tensor``.
        """
        if speech is None and not batch.is_typed:
            speech = self._encode_here(batch)
        prompts, valid = self.embed_prompts(batch, speech)
        device = valid.device
        return answer_logits(self.llm, prompts, valid, response_ids.to(device), response_mask.to(device), group_size)

    @torch.no_grad()
    def generate(
        self, batch: SpeechBatch, speech: EncodedSpeech | None, *, group_size: int, params: SamplingParams
    ) -> list[Rollout]:
        """``group_size`` answers to every prompt, ordered by prompt; ``speech`` is None for typed prompts."""
        prompts, valid = self.embed_prompts(batch, speech)
        with whole_sequences(self.llm):
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
        size = self.llm_config.vocab_size
        locator = [self.prompt.audio_locator_id] if self.prompt.audio_locator_id < size else []
        return torch.tensor([*locator, *range(self.prompt.vocab_size, size)], device=parallel.device()).long()

    @classmethod
    def list_available_models(cls) -> Sequence:
        """None are published."""
        return []

    def setup_training_data(self, config) -> None:
        """Data belongs to the training loop (``algorithms.alignment``), not to the model."""

    def setup_validation_data(self, config) -> None:
        """As ``setup_training_data``."""


def _tokenizer_files(folder: Path) -> dict[str, str]:
    paths = {key: folder / name for key, name in _TOKENIZER_FILES.items()}
    return {key: str(path) for key, path in paths.items() if key not in _OPTIONAL_FILES or path.is_file()}


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"model.params_dtype is {name!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _load_perception(perception: torch.nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    result = perception.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"{folder}: the perception weights do not fit config.json: {len(result.missing_keys)} missing "
            f"{result.missing_keys[:5]}, {len(result.unexpected_keys)} unexpected {result.unexpected_keys[:5]}"
        )
