# SPDX-License-Identifier: Apache-2.0
"""Tiny real models with random weights: a SALM checkpoint folder made by NeMo's own class, and batches of noise."""

from pathlib import Path

import torch

from nemo_rba.types import Instruction, SpeechBatch

WORDS = [
    "user",
    "assistant",
    "system",
    "what",
    "is",
    "the",
    "capital",
    "of",
    "france",
    "paris",
    "say",
    "hello",
    "again",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "cat",
    "dog",
    "horse",
    "red",
    "green",
    "blue",
    "name",
    "please",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "transcribe",
    "in",
    "french",
]
VOCABULARY = 65  # odd, so that it must be filled up for tensor parallelism
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio|>"]
PERCEPTION = {
    "output_dim": 64,
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000, "features": 80, "window_size": 0.025, "window_stride": 0.01, "n_fft": 512,
        "window": "hann", "normalize": "per_feature", "dither": 0.0, "pad_to": 0,
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 80, "n_layers": 2, "d_model": 48, "subsampling": "dw_striding", "subsampling_factor": 8,
        "subsampling_conv_channels": 16, "n_heads": 4, "ff_expansion_factor": 2, "conv_kernel_size": 9,
        "dropout": 0.0, "dropout_emb": 0.0, "dropout_att": 0.0, "dropout_pre_encoder": 0.0,
    },
    "modality_adapter": {
        "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector", "d_model": 48,
    },
}  # fmt: skip


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Move norms and biases away from 1 and 0, where a lost one would not show."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)


def make_llm_folder(folder: Path, family: str) -> Path:
    """A random Hugging Face language model with a ChatML word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        additional_special_tokens=SPECIALS[1:],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=family == "llama",
        initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def make_salm_folder(folder: Path, family: str):
    """(folder, NeMo's SALM): a self-contained SALM checkpoint with random weights."""
    from nemo.collections.speechlm2.models import SALM

    llm = make_llm_folder(folder / "llm_backbone", family)
    torch.manual_seed(1)
    salm = SALM(
        {
            "pretrained_llm": str(llm), "pretrained_asr": "none", "pretrained_weights": False,
            "audio_locator_tag": "<|audio|>", "prompt_format": "qwen", "perception": PERCEPTION, "freeze_params": [],
            "prevent_freeze_params": [],
        }
    ).eval()  # fmt: skip
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    salm.embed_tokens.weight.data.copy_(weights.pop("model.embed_tokens.weight"))
    salm.llm.load_state_dict(weights, strict=False)
    if salm.llm.config.tie_word_embeddings:
        salm.llm.lm_head.weight.data.copy_(salm.embed_tokens.weight)
    with torch.no_grad():
        salm.perception.proj.weight.normal_(0, 0.3)
    salm.save_pretrained(folder)
    salm.tokenizer.tokenizer.save_pretrained(folder)
    (llm / "model.safetensors").unlink()
    return folder, salm


def load_speech_lm(folder: Path, params_dtype: str = "float32"):
    """RBASpeechLM from a SALM folder on one process."""
    from nemo_rba.models.rba_speech_lm import RBASpeechLM

    return RBASpeechLM.from_salm(
        folder=folder,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype=params_dtype,
        seed=0,
        sequence_parallel=False,
    )


def make_batch(prompt, seconds: list[float], contexts: list[str], responses: list[str], seed: int = 0) -> SpeechBatch:
    """Noise clips with the prompt and response ids that ``prompt`` (PromptEncoder) gives."""
    from torch.nn.utils.rnn import pad_sequence

    generator = torch.Generator().manual_seed(seed)
    audio = [0.1 * torch.randn(int(16000 * s), generator=generator) for s in seconds]
    instructions = tuple(
        Instruction(id=f"utt-{seed}-{i}", text="hello", response=response, task="test", context=context)
        for i, (context, response) in enumerate(zip(contexts, responses, strict=True))
    )
    prompts = [torch.tensor(prompt.encode_prompt(instruction)) for instruction in instructions]
    answers = [torch.tensor(prompt.encode_response(instruction.response)) for instruction in instructions]
    return SpeechBatch(
        instructions=instructions,
        audio=pad_sequence(audio, batch_first=True),
        audio_lens=torch.tensor([len(x) for x in audio]),
        prompt_ids=pad_sequence(prompts, batch_first=True, padding_value=prompt.pad_id),
        prompt_lens=torch.tensor([len(x) for x in prompts]),
        response_ids=pad_sequence(answers, batch_first=True, padding_value=prompt.pad_id),
        response_lens=torch.tensor([len(x) for x in answers]),
    )


@torch.no_grad()
def move(policy):
    """Weights that training might have led to."""
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
