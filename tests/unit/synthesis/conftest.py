# SPDX-License-Identifier: Apache-2.0
"""A random teacher of 24 words, and fakes with the real interfaces."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_rba.synthesis.text import TextStage
from nemo_rba.synthesis.text_work import TextWork
from nemo_rba.types import SamplingParams

SENTENCE = "what is one two three plus minus say the word cat dog tell me name a color hello red blue"
WORDS = SENTENCE.split()
SPECIALS = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "<bos>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(chat_template: str | None = TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIALS, "user", "assistant", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # as Llama's tokenizer: puts <bos> in front of everything unless told not to
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=128,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    from nemo_rba.synthesis.teacher import HFTeacher

    return HFTeacher(path=str(teacher_folder), batch_size=8, device="cpu", dtype="float32")


class FakeTeacher:
    """Writes two-word instructions drawn by the seed, and answers with the words turned round."""

    def __init__(self):
        self.calls = 0

    def render(self, messages: Sequence[dict[str, str]], *, open_turn: str) -> str:
        return "\n".join(message["content"] for message in messages) + f"<{open_turn}>"

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        self.calls += 1
        if prompts[0].endswith("<user>"):
            generator = torch.Generator().manual_seed(params.seed)
            picks = torch.randint(len(WORDS), (len(prompts), 2), generator=generator).tolist()
            return [" ".join(WORDS[i] for i in pick) for pick in picks]
        return [f"{' '.join(reversed(prompt.split('<')[0].split()))} {params.seed % 97}" for prompt in prompts]


class FakeTTS:
    """A tone as long as the text, its pitch by speaker; refuses the words in ``mute``."""

    sampling_rate = 8000

    def __init__(self, speakers: Sequence[str], mute: Sequence[str] = ()):
        self.speakers, self.mute, self.calls = tuple(speakers), mute, 0

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        self.calls += 1
        if any(word in text.split() for text in texts for word in self.mute):
            raise ValueError("no sound")
        pitch = [1 + self.speakers.index(speaker) for speaker in speakers]
        return [torch.sin(torch.arange(100 * len(t)) * 0.1 * p) for t, p in zip(texts, pitch, strict=True)]


def text_stage(folder, *, teacher, sampler, response_params, seed=1, spoken_form=None, **settings) -> TextStage:
    """A text stage whose orders are done here and at once."""
    work = TextWork(
        teacher=teacher, sampler=sampler, spoken_form=spoken_form, response_params=response_params, folder=folder,
        seed=seed,
    )  # fmt: skip

    def have_done(kind, orders):
        for order in orders.values():
            work.handlers[kind](order)()

    return TextStage(work=work, have_done=have_done, **{"num_responses": {}, "batches_at_once": 1} | settings)
