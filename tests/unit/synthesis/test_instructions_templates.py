# SPDX-License-Identifier: Apache-2.0
"""The user's turn of the families whose markup is published: opened for sampling, and closed by the right token.

The templates are cut down to the turns of user, assistant and system; what stands around a message is as published.
"""

import pytest

from nemo_rba.synthesis.instructions import MagpieSampler, PlainMagpieSampler
from nemo_rba.synthesis.instructions_domains import MagpieDomains
from nemo_rba.synthesis.teacher import HFTeacher

from .conftest import WORDS, FakeTeacher, build_tokenizer
from .test_instructions_plan import SHARED, Scripted

LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_31 = (  # puts a system turn of its own before all others
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    + LLAMA.removeprefix("{{ bos_token }}")
)
QWEN_25 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_03 = (  # the system message stands in the last user's turn
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_01 = MISTRAL_03.replace("'[/INST]'", "' [/INST]'")  # plain words for its tokenizer, which has no such tokens

FAMILIES = {  # template, special tokens (bos first), eos, opened user's turn, end of the user's turn
    "Llama 3": (
        LLAMA, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "Llama 3.1": (
        LLAMA_31, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "Qwen 2.5": (
        QWEN_25, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>",
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n", "<|im_end|>",
    ),
    "Gemma 2": (
        GEMMA_2, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos><start_of_turn>user\n",
        "<end_of_turn>",
    ),
    "Mistral 0.3": (MISTRAL_03, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "<s>[INST] ", "[/INST]"),
    "Mistral 0.1": (MISTRAL_01, ["<s>", "</s>"], "</s>", None, None),
}  # fmt: skip
TAKES_SYSTEM = {
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSing.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "Llama 3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nSing."
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    "Qwen 2.5": "<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\n",
    "Mistral 0.3": "<s>[INST] Sing.\n\n",
}


def family_tokenizer(name: str):
    """A tokenizer of a few words with the family's special tokens, which alone are split off from what they touch."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, specials, eos, _, _ = FAMILIES[name]
    plain = [word for word in ["[INST]", "[/INST]", *WORDS] if word not in specials]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *specials, *plain])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=specials[0], eos_token=eos, model_max_length=128,
        additional_special_tokens=[token for token in specials[1:] if token != eos],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, HFTeacher]:
    """A teacher of each family with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    teachers = {}
    for name in FAMILIES:
        folder, tokenizer = tmp_path_factory.mktemp("family"), family_tokenizer(name)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        teachers[name] = HFTeacher(path=str(folder), batch_size=8, device="cpu", dtype="float32")
    return teachers


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name][3]])
def test_the_user_turn_is_opened_and_ends_where_the_template_closes_it(families, name):
    teacher, (_, specials, eos, opened, end) = families[name], FAMILIES[name]
    assert teacher.render([], open_turn="user") == opened
    assert teacher._tokenizer.convert_ids_to_tokens(teacher._user_end) == end
    assert {end, eos} <= set(teacher._tokenizer.convert_ids_to_tokens(sorted(teacher._stop_ids)))
    encoded = teacher._tokenizer.convert_ids_to_tokens(teacher._encode([opened], room=1)[0])
    assert [token for token in encoded if token in specials] == split_specials(opened, specials)
    texts = MagpieSampler(**SHARED | {"teacher": teacher, "batch_size": 12, "top_p": 1.0}).batch(0)
    assert any(texts)
    assert not any(special in text for text in texts for special in specials)


def split_specials(text: str, specials: list[str]) -> list[str]:
    """The special tokens in a text, in order."""
    found = [(place, token) for token in specials for place in range(len(text)) if text.startswith(token, place)]
    return [token for _, token in sorted(found)]


def test_a_turn_that_ends_in_plain_words_cannot_be_sampled(families):
    """[/INST] was no token at first. A hosted teacher can do it, which stops at words: ``stop: "[/INST]"``."""
    assert families["Mistral 0.1"]._user_end is None
    with pytest.raises(ValueError, match="does not close the user's turn with a special token"):
        MagpieSampler(**SHARED | {"teacher": families["Mistral 0.1"]})


def test_a_model_without_a_template_is_refused(families, teacher_folder, tmp_path):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(teacher_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    build_tokenizer(chat_template=None).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no chat template, so this is a base model"):
        HFTeacher(path=str(folder), batch_size=8, device="cpu", dtype="float32")


def domains(teacher, **changes):
    given = {"music": {"system": "Sing.", "weight": 3.0}, "open": {"system": "", "weight": 1.0}}
    settings = {"teacher": teacher, "domains": given, "suppressed_openings": []}
    return MagpieDomains(**SHARED | settings | changes)


@pytest.mark.parametrize("name", list(TAKES_SYSTEM))
def test_a_system_turn_stands_before_the_open_user_turn(families, name):
    sampler = domains(families[name])
    assert sampler._prompts == {"music": TAKES_SYSTEM[name], "open": FAMILIES[name][3]}
    drafts = sampler.batch(1)
    assert drafts == domains(families[name]).batch(1)
    assert {draft.task for draft in drafts} <= {"music", "open"}


def test_a_template_without_system_turns_is_refused(families):
    with pytest.raises(ValueError, match=r"sampler.domains.music: .* has no system turn \(System role not supported\)"):
        domains(families["Gemma 2"])

    class Deaf(FakeTeacher):
        def render(self, messages, *, open_turn):
            return "<user>"

    with pytest.raises(ValueError, match=r"sampler.domains.music: the teacher's chat template has no system turn;"):
        domains(Deaf())


def test_no_instruction_of_any_domain_opens_as_it_must_not(families):
    teacher, (_, specials, _, _, end) = families["Llama 3"], FAMILIES["Llama 3"]
    words = [word for word in ["<unk>", "[INST]", "[/INST]", *specials, *WORDS] if word not in ("cat", end)]
    settings = {"batch_size": 40, "suppressed_openings": words}
    texts = [draft.text for draft in domains(teacher, **settings).batch(0)]
    texts += PlainMagpieSampler(**SHARED | {"teacher": teacher} | settings).batch(0)
    assert any(texts)
    assert {text.split()[0] for text in texts if text} <= {"cat"}
    unchanged = PlainMagpieSampler(**SHARED | {"teacher": teacher, "suppressed_openings": []})
    assert unchanged.batch(3) == MagpieSampler(**SHARED | {"teacher": teacher}).batch(3)
    with pytest.raises(ValueError, match="expected a list of texts without blanks around"):
        domains(teacher, suppressed_openings=["# "])


def test_a_pre_query_prompt_that_fills_the_teacher_stops_the_run(families):
    with pytest.raises(ValueError, match="cannot write instructions, as the prompt is too long for the teacher"):
        MagpieSampler(**SHARED | {"teacher": families["Llama 3"], "max_new_tokens": 126}).batch(0)
    given = {"long": {"system": "cat " * 200, "weight": 1.0}, "short": {"system": "", "weight": 9.0}}
    with pytest.raises(ValueError, match="cannot write instructions, as the prompt is too long for the teacher"):
        domains(families["Llama 3"], domains=given, batch_size=99).batch(0)


def test_domains_are_drawn_by_weight_and_named_as_the_task():
    teacher = Scripted(lambda message, place: "la" if message == "Sing." else "hello")
    drafts = domains(teacher, batch_size=1000).batch(0)
    assert {(draft.text, draft.task) for draft in drafts} == {("la", "music"), ("hello", "open")}
    assert sum(draft.task == "music" for draft in drafts) == pytest.approx(750, abs=45)  # 3.3 standard deviations
    again = domains(teacher, batch_size=1000)
    assert again.batch(0) == drafts != again.batch(1)


@pytest.mark.parametrize(
    "wrong", [{}, {"a": {"system": "b", "weight": 0}}, {"a": {"system": "b"}}, {"a": {"sytem": "b", "weight": 1}}]
)
def test_domains_without_system_turn_or_weight_are_refused(wrong):
    with pytest.raises(ValueError, match="expected at least one, each with a system turn and a weight above 0"):
        domains(FakeTeacher(), domains=wrong)
