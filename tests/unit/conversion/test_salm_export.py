# SPDX-License-Identifier: Apache-2.0
"""SALM folders out: what NeMo reads back, and what is refused on the way in."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_speech_lm, make_batch

from nemo_rba.conversion.tokenizer_files import for_both_versions
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.types import SamplingParams


@pytest.mark.parametrize("fixture", ["llama_salm", "qwen3_salm"])
def test_salm_there_and_back_is_bit_equal(fixture, request, tmp_path, monkeypatch):
    from nemo.collections.speechlm2.models import SALM
    from nemo.collections.speechlm2.parts import hf_hub

    source, _ = request.getfixturevalue(fixture)
    model, target = load_speech_lm(source), tmp_path / "salm"
    model.save_salm(target)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(tmp_path) not in (target / "config.json").read_text()
    RBASpeechLM.check_salm(target)

    if not hasattr(hf_hub, "LLM_BACKBONE_DIR"):  # NeMo 2.7.3 looks for llm_backbone where it was started
        monkeypatch.chdir(target)
    salm = SALM.from_pretrained(str(target)).eval()
    names = set(salm.state_dict())
    if salm.llm.config.tie_word_embeddings:
        names.discard("llm.lm_head.weight")
    assert names == after.keys()
    batch = make_batch(model.prompt, [0.7, 1.3], ["", "transcribe"], ["paris", "hello"])
    params = SamplingParams(max_new_tokens=12, temperature=0)
    ours = model.generate(batch, model.encode(batch), group_size=1, params=params)
    prompts = [[{"role": "user", "slots": {"message": f"{i.context} <|audio|>".strip()}}] for i in batch.instructions]
    theirs = salm.generate(
        prompts=prompts, audios=batch.audio, audio_lens=batch.audio_lens, max_new_tokens=12,
        suppress_tokens=model._banned_ids().tolist(),
    )  # fmt: skip
    for rollout, row in zip(ours, theirs.tolist(), strict=True):
        assert rollout.token_ids.tolist() == row[: len(rollout.token_ids)]
    with pytest.raises(ValueError, match="exists already"):
        model.save_salm(target)


def test_vllm_plugin_reads_the_config(speech_lm, tmp_path, monkeypatch):
    if find_spec("nemo.collections.speechlm2.vllm") is None:
        pytest.skip("NeMo 2.7.3 has no nemo.collections.speechlm2.vllm")
    from nemo.collections.speechlm2.vllm.salm.config import NeMoSpeechLMConfig

    monkeypatch.setattr(speech_lm.llm_config, "architectures", None)  # as in a config.json written by hand
    speech_lm.save_salm(tmp_path / "salm")
    monkeypatch.chdir(tmp_path / "salm")
    config = NeMoSpeechLMConfig.from_pretrained(".")
    assert config.text_config.hidden_size == 64
    assert config.llm_architectures == ["LlamaForCausalLM"]
    assert not config.is_hybrid
    assert config.perception["output_dim"] == 64


def test_a_tokenizer_of_transformers_5_is_written_for_4_too():
    """Its class and its list of special tokens are new names, on which transformers 4 stops."""
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|audio|>"], "eos_token": "é"}
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": json.dumps(new).encode()}
    written = for_both_versions(files)
    assert json.loads(written.pop("tokenizer_config.json")) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|audio|>"], "eos_token": "é",
    }  # fmt: skip
    assert written == {"tokenizer.json": b"{}"}
    old = files | {"tokenizer_config.json": b'{"tokenizer_class":  "LlamaTokenizerFast", "extra_special_tokens": {}}'}
    assert for_both_versions(old) == old


def test_no_exported_tokenizer_has_names_that_transformers_4_does_not_know(speech_lm, tmp_path):
    speech_lm.save_salm(tmp_path / "salm")
    for folder in (tmp_path / "salm", tmp_path / "salm" / "llm_backbone"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "<|audio|>" in config["additional_special_tokens"]
        assert not isinstance(config.get("extra_special_tokens"), list), "4 wants a mapping there"


def _change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


LLM, SPEECH = "llm.model.layers.0.self_attn.q_proj.weight", "perception.proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _change_weights(f, lambda w: w.pop(LLM)), r"1 missing \['llm.model.layers.0.self_attn.q_proj"),
        (lambda f: _change_weights(f, lambda w: w.update({"llm.x": torch.ones(1)})), "unexpected \\['llm.x'"),
        (lambda f: _change_weights(f, lambda w: w.update({LLM: torch.ones(2, 64)})), r"q_proj.weight \(2, 64\)"),
        (lambda f: _change_weights(f, lambda w: w.pop(SPEECH)), "1 missing \\['proj.weight'"),
        (lambda f: _change_weights(f, lambda w: w.update({"perception.x": torch.ones(1)})), "unexpected \\['x'"),
        (lambda f: _change_weights(f, lambda w: w.update({SPEECH: torch.ones(2, 48)})), r"proj.weight \(2, 48\)"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "cannot read"),
        (lambda f: (f / "model.safetensors").unlink(), "neither"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: (f / "llm_backbone" / "config.json").unlink(), "no config.json"),
        (lambda f: _change_config(f, lora={"r": 4}), "LoRA"),
        (lambda f: _change_config(f, encoder_chunk_size_seconds=30.0), "encoder_chunk_size_seconds = 30.0"),
        (lambda f: _change_config(f, prompt_format="nonsense"), "prompt_format"),
        (lambda f: _change_config(f, audio_locator_tag="<|speech|>"), "audio_locator_tag"),
        (lambda f: _change_config(f, perception={"output_dim": 64, "encoder": {"_target_": "os.system"}}), "os.system"),
    ],
)
def test_check_salm_refuses(spoil, message, llama_salm, tmp_path):
    folder = shutil.copytree(llama_salm[0], tmp_path / "salm")
    RBASpeechLM.check_salm(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        RBASpeechLM.check_salm(folder)
