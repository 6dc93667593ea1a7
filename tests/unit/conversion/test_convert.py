# SPDX-License-Identifier: Apache-2.0
"""examples/rba_convert.py: what it writes is read by NeMo's and Hugging Face's own classes; what it refuses."""

import json
import shutil

import pytest
import rba_convert
import torch
from safetensors.torch import load_file, save_file
from test_configs import load
from tiny_models import load_speech_lm
from transformers import AutoModelForCausalLM


def convert(*overrides: str) -> None:
    rba_convert.convert(load("rba_convert", *overrides))


@pytest.fixture(scope="module")
def nemo_file(llama_salm, tmp_path_factory):
    """A .nemo of the SALM with tied embeddings, in a folder that was not there."""
    target = tmp_path_factory.mktemp("convert") / "new" / "model.nemo"
    convert(f"source={llama_salm[0]}", f"target={target}")
    return target


def llm_tensors(salm_folder) -> dict[str, torch.Tensor]:
    """Hugging Face names of a SALM folder's language model."""
    found = load_file(salm_folder / "model.safetensors")
    found["model.embed_tokens.weight"] = found.pop("embed_tokens.weight")
    return {name.removeprefix("llm."): value for name, value in found.items() if not name.startswith("perception.")}


def test_a_salm_becomes_a_nemo_and_comes_back_bit_equal(llama_salm, nemo_file, tmp_path):
    convert(f"source={nemo_file}", f"target={tmp_path / 'salm'}")
    before, after = (load_file(folder / "model.safetensors") for folder in (llama_salm[0], tmp_path / "salm"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_the_language_model_of_a_nemo_is_a_hugging_face_folder(llama_salm, nemo_file, tmp_path):
    target = tmp_path / "llm"
    convert(f"source={nemo_file}", f"target={target}", "llm_only=true")
    hf, loaded = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    stored, expected = load_file(target / "model.safetensors"), llm_tensors(llama_salm[0])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (target / "tokenizer.json").read_bytes() == (llama_salm[0] / "tokenizer.json").read_bytes()
    ids = torch.tensor([[1, 4, 7, 2]])
    torch.testing.assert_close(hf(ids).logits, llama_salm[1](llama_salm[1].embed_tokens(ids))["logits"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm"]  # nothing is left of the way there


def test_the_language_model_of_a_salm_keeps_its_types(qwen3_salm, tmp_path):
    source = shutil.copytree(qwen3_salm[0], tmp_path / "salm")
    weights = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    convert(f"source={source}", f"target={tmp_path / 'llm'}", "llm_only=true")
    stored, expected = load_file(tmp_path / "llm" / "model.safetensors"), llm_tensors(source)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) and stored[name].dtype == torch.bfloat16 for name in stored)
    assert json.loads((tmp_path / "llm" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def trained(qwen3_salm, tmp_path_factory):
    """The language model of ``qwen3_salm`` with other weights, in shards, as it comes back from elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    convert(f"source={qwen3_salm[0]}", f"target={folder / 'llm'}", "llm_only=true")
    model = AutoModelForCausalLM.from_pretrained(folder / "llm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder / "trained", max_shard_size="40KB")
    assert (folder / "trained" / "model.safetensors.index.json").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "llm" / name, folder / "trained" / name)
    return folder / "trained"


def test_a_hugging_face_folder_in_shards_takes_the_place_of_a_language_model(qwen3_salm, trained, tmp_path):
    convert(f"source={trained}", f"speech={qwen3_salm[0]}", f"target={tmp_path / 'model.nemo'}")
    convert(f"source={tmp_path / 'model.nemo'}", f"target={tmp_path / 'salm'}")
    new, old = llm_tensors(tmp_path / "salm"), llm_tensors(qwen3_salm[0])
    assert all(torch.equal(new[name], old[name] * 1.5) for name in old)
    before, after = (load_file(folder / "model.safetensors") for folder in (qwen3_salm[0], tmp_path / "salm"))
    speech = [name for name in before if name.startswith("perception.")]
    assert speech
    assert all(torch.equal(before[name], after[name]) for name in speech)


def _change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


ROPE = {"rope_type": "default", "rope_theta": 500000.0}
BIAS, INV_FREQ = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _change_weights(f, lambda w: w.pop("model.norm.weight")), r"1 missing \['model.norm.weight'\]"),
        (lambda f: _change_weights(f, lambda w: w.update({BIAS: torch.ones(64)})), f"1 unexpected .*{BIAS}"),
        (lambda f: _change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(8)})), r"norm.weight \(8,\)"),
        (lambda f: _change_json(f / "config.json", rope_parameters=ROPE), "rotary_base.: .*500000"),
        (lambda f: _change_json(f / "config.json", num_hidden_layers=1), "num_layers"),
        (lambda f: _change_json(f / "config.json", model_type="gpt2"), "gpt2"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: _swap_words(f / "tokenizer.json", "cat", "dog"), "2 tokens have another id .*cat"),
    ],
)
def test_another_language_model_is_refused(spoil, message, llama_salm, speech_lm, tmp_path):
    from nemo_rba.conversion.llm_folder import load_llm

    folder = tmp_path / "llm"
    convert(f"source={llama_salm[0]}", f"target={folder}", "llm_only=true")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_llm(
            speech_lm.llm, speech_lm.llm_config, speech_lm.prompt.vocabulary(), folder, tp_size=1, tp_rank=0
        )  # fmt: skip


def _swap_words(path, one, other):
    text = path.read_text()
    path.write_text(text.replace(f'"{one}"', '"?"').replace(f'"{other}"', f'"{one}"').replace('"?"', f'"{other}"'))


def test_what_old_folders_keep_besides_is_let_pass(llama_salm, tmp_path):
    from nemo_rba.conversion.llm_folder import load_llm

    model, folder = load_speech_lm(llama_salm[0]), tmp_path / "llm"
    convert(f"source={llama_salm[0]}", f"target={folder}", "llm_only=true")
    words = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    more = {INV_FREQ: torch.ones(8), "lm_head.weight": words.clone()}
    _change_weights(folder, lambda w: w.update(more))
    load_llm(model.llm, model.llm_config, model.prompt.vocabulary(), folder, tp_size=1, tp_rank=0)
    _change_weights(folder, lambda w: w.update({"lm_head.weight": words + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_llm(model.llm, model.llm_config, model.prompt.vocabulary(), folder, tp_size=1, tp_rank=0)


def test_keys_that_do_not_go_together_are_refused(llama_salm, nemo_file, trained, tmp_path):
    salm, new = llama_salm[0], tmp_path / "new"
    for words, message in [
        ([f"source={salm}", f"target={salm}"], "exists already"),
        ([f"source={tmp_path / 'none'}", f"target={new}"], "source=.*does not exist"),
        ([f"source={trained}", f"speech={tmp_path / 'none'}", f"target={new}"], "speech=.*does not exist"),
        ([f"source={salm}", f"target={new}"], "of one kind"),
        ([f"source={nemo_file}", f"target={new}.nemo"], "of one kind"),
        ([f"source={nemo_file}", f"speech={salm}", f"target={new}"], "speech=.* is for source"),
        ([f"source={trained}", f"speech={salm}", f"target={new}", "llm_only=true"], "speech=.* is for source"),
        ([f"source={salm}", f"target={new}.nemo", "llm_only=true"], "llm_only=true writes"),
        ([f"source={trained}", f"target={new}.nemo"], "a language model alone"),
        ([f"source={trained}", f"target={new}", "llm_only=true"], "perception"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(*words)
        assert not new.exists()
