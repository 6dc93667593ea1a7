# SPDX-License-Identifier: Apache-2.0
"""SALM folders trained with LoRA by NeMo (peft): merged on the way in, other kinds of adapters refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PERCEPTION, load_speech_lm, make_batch, randomize

from nemo_rba.conversion.salm import open_salm
from nemo_rba.types import SamplingParams

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.01, "target_modules": ["q_proj", "v_proj"]}


def make_lora_salm(folder, source, **lora):
    """(folder, NeMo's SALM with random weights and factors); tokenizer and LLM config are those of ``source``."""
    from nemo.collections.speechlm2.models import SALM

    llm = shutil.copytree(source / "llm_backbone", folder / "llm_backbone")
    torch.manual_seed(2)
    salm = SALM(
        {
            "pretrained_llm": str(llm), "pretrained_asr": "none", "pretrained_weights": False,
            "audio_locator_tag": "<|audio|>", "prompt_format": "qwen", "perception": PERCEPTION, "freeze_params": [],
            "prevent_freeze_params": [], "lora": LORA | lora,
        }
    ).eval()  # fmt: skip
    with torch.no_grad():
        randomize(salm.llm)
        salm.perception.proj.weight.normal_(0, 0.3)
        for name, parameter in salm.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3)
    salm.save_pretrained(folder)
    salm.tokenizer.tokenizer.save_pretrained(folder)
    return folder, salm


def nemo_logits(salm, model, batch, i: int, answer: list[int]):
    """NeMo's logits (T, V) of an answer's tokens."""
    prompt = batch.prompt_ids[i, : batch.prompt_lens[i]]
    at = prompt.tolist().index(model.prompt.audio_locator_id)
    frames, lens = salm.perception(
        input_signal=batch.audio[i : i + 1, : batch.audio_lens[i]], input_signal_length=batch.audio_lens[i : i + 1]
    )
    words = torch.cat((prompt, torch.tensor(answer[:-1], dtype=torch.long)))
    words = salm.embed_tokens(words.masked_fill(words == model.prompt.audio_locator_id, 0))
    inputs = torch.cat((words[:at], frames[0, : lens[0]], words[at + 1 :]))[None]
    mask = torch.ones(inputs.shape[:2], dtype=torch.bool)
    return salm(inputs, attention_mask=mask)["logits"][0, -len(answer) :]


CASES = {
    "llama": {},  # tied embeddings
    "qwen3": {"target_modules": "all-linear", "use_rslora": True},
}


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_logits_and_greedy_answers_equal_nemo_salm(family, request, tmp_path):
    source, _ = request.getfixturevalue(f"{family}_salm")
    folder, salm = make_lora_salm(tmp_path / "salm", source, **CASES[family])
    model = load_speech_lm(folder)
    batch = make_batch(model.prompt, [0.7, 1.3], ["", "transcribe"], ["paris", "hello again"])
    params = SamplingParams(max_new_tokens=12, temperature=0)
    ours = model.generate(batch, model.encode(batch), group_size=1, params=params)
    prompts = [[{"role": "user", "slots": {"message": f"{i.context} <|audio|>".strip()}}] for i in batch.instructions]
    theirs = salm.generate(
        prompts=prompts, audios=batch.audio, audio_lens=batch.audio_lens, max_new_tokens=12,
        suppress_tokens=model._banned_ids().tolist(),
    )  # fmt: skip
    ids = torch.stack([torch.nn.functional.pad(r.token_ids, (0, 12 - len(r.token_ids))) for r in ours])
    mask = torch.arange(12) < torch.tensor([[len(r.token_ids)] for r in ours])
    logits = model(batch, model.encode(batch), ids, mask, 1).split(mask.sum(1).tolist())
    without = []
    for i, (rollout, row) in enumerate(zip(ours, theirs.tolist(), strict=True)):
        answer = rollout.token_ids.tolist()
        assert answer == row[: len(answer)]
        torch.testing.assert_close(logits[i], nemo_logits(salm, model, batch, i, answer), atol=1e-4, rtol=0)
        with salm.llm.disable_adapter():
            without.append((logits[i] - nemo_logits(salm, model, batch, i, answer)).abs().max())
    assert min(without) > 0.1  # the adapters count


@pytest.fixture(scope="module")
def lora_salm(llama_salm, tmp_path_factory):
    return make_lora_salm(tmp_path_factory.mktemp("salm-lora"), llama_salm[0])[0]


def test_only_what_is_asked_for_is_merged_and_keeps_its_type(lora_salm, tmp_path):
    folder = shutil.copytree(lora_salm, tmp_path / "salm")
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    salm = open_salm(folder)
    assert not [name for name in salm.weights.names() if "lora" in name or "base_" in name]
    layer = "llm.base_model.model.model.layers.1."
    plain = salm.read_llm("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(plain, weights[layer + "mlp.up_proj.weight"])
    value = salm.read_llm("model.layers.1.self_attn.v_proj.weight")
    base, a, b = (
        weights[f"{layer}self_attn.v_proj.{part}.weight"].float()
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    assert torch.equal(value, (base + 6 / 4 * (b @ a)).bfloat16())


def _change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _change_lora(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lora": config["lora"] | values}))


Q = "llm.base_model.model.model.layers.0.self_attn.q_proj."
A, B, BASE = Q + "lora_A.default.weight", Q + "lora_B.default.weight", Q + "base_layer.weight"
VECTOR = Q + "lora_magnitude_vector.default.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _change_lora(f, use_dora=True), "lora has use_dora=True; expected plain LoRA"),
        (lambda f: _change_lora(f, bias="lora_only"), "bias='lora_only'"),
        (lambda f: _change_lora(f, lora_bias=True), "lora_bias=True"),
        (lambda f: _change_lora(f, modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (lambda f: _change_lora(f, rank_pattern={"q_proj": 2}), "rank_pattern"),
        (lambda f: _change_lora(f, something_new=1), "something_new=1"),
        (lambda f: _change_lora(f, r=0), "r=0 and lora_alpha=6"),
        (lambda f: _change_lora(f, r=8), r"q_proj.weight have shapes .*expected .*\(8, 64\).* lora.r = 8"),
        (lambda f: _change_weights(f, lambda w: w.pop(A)), "lacks base_layer, lora_A or lora_B"),
        (lambda f: _change_weights(f, lambda w: w.pop(BASE)), "lacks base_layer, lora_A or lora_B"),
        (lambda f: _change_weights(f, lambda w: w.update({B: torch.ones(64, 2)})), r"\(64, 2\)"),
        (lambda f: _change_weights(f, lambda w: w.update({VECTOR: torch.ones(64)})), "not plain LoRA.*magnitude"),
        (
            lambda f: _change_weights(f, lambda w: w.update({BASE.replace(".base_layer", ""): torch.ones(64, 64)})),
            "not plain LoRA.*q_proj",
        ),
        (
            lambda f: _change_weights(f, lambda w: [w.pop(name) for name in list(w) if ".lora_" in name]),
            "no tensor is a LoRA factor",
        ),
        (
            lambda f: _change_weights(f, lambda w: w.pop(Q.replace("q_proj", "o_proj") + "weight")),
            r"1 missing \['llm.model.layers.0.self_attn.o_proj.weight'\]",
        ),
    ],
)
def test_open_salm_refuses(spoil, message, lora_salm, tmp_path):
    folder = shutil.copytree(lora_salm, tmp_path / "salm")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_salm(folder)


def test_lora_must_be_the_options_of_peft(lora_salm, tmp_path):
    folder = shutil.copytree(lora_salm, tmp_path / "salm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lora": "yes"}))
    with pytest.raises(ValueError, match="lora is 'yes'; expected the keys of peft's LoraConfig"):
        open_salm(folder)


@pytest.mark.parametrize("options", [{"use_rslora": False, "modules_to_save": None, "bias": "none"}])
def test_defaults_written_out_are_plain_lora(options, lora_salm, tmp_path):
    folder = shutil.copytree(lora_salm, tmp_path / "salm")
    _change_lora(folder, **options)
    open_salm(folder)
