# SPDX-License-Identifier: Apache-2.0
"""The model against NeMo's own SALM, and the invariances everything else relies on."""

import subprocess
import sys

import pytest
import torch
from tiny_models import load_speech_lm, make_batch
from torch.nn.utils.rnn import pad_sequence

from nemo_rba.types import SamplingParams, SpeechBatch


def forced_logprobs(model, batch, rollouts, group_size):
    """Teacher-forced log-probabilities of the rollouts' tokens, one tensor each."""
    ids = pad_sequence([r.token_ids for r in rollouts], batch_first=True)
    mask = pad_sequence([torch.ones(len(r.token_ids), dtype=torch.bool) for r in rollouts], batch_first=True)
    logits = model(batch, model.encode(batch), ids, mask, group_size)
    picked = logits.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0]
    return picked.split([len(r.token_ids) for r in rollouts])


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["llama_salm", "qwen3_salm"])
def test_sampled_logprobs_equal_teacher_forced_ones(fixture, request):
    model = load_speech_lm(request.getfixturevalue(fixture)[0])
    batch = make_batch(model.prompt, [0.7, 1.3, 1.0], ["", "transcribe", "in french"], ["paris", "a b", "a"])
    params = SamplingParams(max_new_tokens=24, temperature=1.0, seed=3)
    rollouts = model.generate(batch, model.encode(batch), group_size=5, params=params)
    assert len(rollouts) == 15
    assert len({len(r.token_ids) for r in rollouts}) > 3, "answers of one length would not test the dropping of rows"
    assert [r.prompt_index for r in rollouts] == [i // 5 for i in range(15)]
    for rollout, forced in zip(rollouts, forced_logprobs(model, batch, rollouts, 5), strict=True):
        torch.testing.assert_close(rollout.logprobs, forced, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fixture", ["llama_salm", "qwen3_salm"])
def test_greedy_answers_and_logits_equal_nemo_salm(fixture, request):
    folder, salm = request.getfixturevalue(fixture)
    model = load_speech_lm(folder)
    batch = make_batch(model.prompt, [0.7, 1.3], ["", "transcribe"], ["paris is the capital", "hello"])
    out = model.generate(
        batch, model.encode(batch), group_size=1, params=SamplingParams(max_new_tokens=12, temperature=0)
    )
    prompts = [[{"role": "user", "slots": {"message": f"{i.context} <|audio|>".strip()}}] for i in batch.instructions]
    banned = model._banned_ids().tolist()
    expected = salm.generate(
        prompts=prompts, audios=batch.audio, audio_lens=batch.audio_lens, max_new_tokens=12, suppress_tokens=banned
    )
    for rollout, row in zip(out, expected.tolist(), strict=True):
        assert rollout.token_ids.tolist() == row[: len(rollout.token_ids)]
    forced = forced_logprobs(model, batch, out, 1)
    for i, rollout in enumerate(out):  # NeMo's logits of the same tokens, one unpadded prompt at a time
        prompt = batch.prompt_ids[i, : batch.prompt_lens[i]]
        at = prompt.tolist().index(model.prompt.audio_locator_id)
        frames, lens = salm.perception(
            input_signal=batch.audio[i : i + 1, : batch.audio_lens[i]], input_signal_length=batch.audio_lens[i : i + 1]
        )
        words = salm.embed_tokens(torch.cat((prompt, rollout.token_ids)))
        spliced = torch.cat((words[:at], frames[0, : int(lens)], words[at + 1 :]))
        logits = salm(spliced[None, :-1])["logits"][0, -len(rollout.token_ids) :].log_softmax(-1)
        torch.testing.assert_close(logits.gather(1, rollout.token_ids[:, None])[:, 0], forced[i], atol=2e-5, rtol=0)


@torch.no_grad()
def test_answers_do_not_depend_on_batch_or_padding(speech_lm, batch):
    params = SamplingParams(max_new_tokens=16, seed=5)
    together = speech_lm.generate(batch, speech_lm.encode(batch), group_size=3, params=params)
    for i in range(len(batch)):
        row = slice(i, i + 1)
        alone = SpeechBatch(
            instructions=batch.instructions[row],
            audio=torch.nn.functional.pad(batch.audio[row], (0, 5000)),
            audio_lens=batch.audio_lens[row],
            prompt_ids=torch.nn.functional.pad(batch.prompt_ids[row], (0, 3)),
            prompt_lens=batch.prompt_lens[row],
            response_ids=batch.response_ids[row],
            response_lens=batch.response_lens[row],
        )
        out = speech_lm.generate(alone, speech_lm.encode(alone), group_size=3, params=params)
        for one, many in zip(out, together[3 * i : 3 * i + 3], strict=True):
            assert one.token_ids.tolist() == many.token_ids.tolist()
            torch.testing.assert_close(one.logprobs, many.logprobs, atol=5e-5, rtol=0)  # other rotary positions


@torch.no_grad()
def test_group_of_one_per_copy_equals_group(speech_lm, batch):
    """A shared prefix gives what separate prompts give: gradients of 3 answers at once and one by one."""
    rollouts = speech_lm.generate(
        batch, speech_lm.encode(batch), group_size=3, params=SamplingParams(max_new_tokens=10, seed=1)
    )
    grouped = forced_logprobs(speech_lm, batch, rollouts, 3)
    for member in range(3):
        alone = forced_logprobs(speech_lm, batch, rollouts[member::3], 1)
        for a, b in zip(alone, grouped[member::3], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_nemo_file_round_trip(speech_lm, batch, tmp_path):
    path = tmp_path / "model.nemo"
    speech_lm.save_to(str(path))
    params = SamplingParams(max_new_tokens=8, temperature=0)
    greedy = [
        r.token_ids.tolist() for r in speech_lm.generate(batch, speech_lm.encode(batch), group_size=1, params=params)
    ]
    torch.save({"batch": batch, "params": params, "greedy": greedy}, tmp_path / "expected.pt")
    script = f"""
import torch, nemo_rba
from nemo.core import ModelPT
from nemo_rba.models.rba_speech_lm import RBASpeechLM
case = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
for cls in (RBASpeechLM, ModelPT):
    model = cls.restore_from({str(path)!r}, map_location="cpu")
    assert type(model) is RBASpeechLM
    out = model.generate(case["batch"], model.encode(case["batch"]), group_size=1, params=case["params"])
    assert [r.token_ids.tolist() for r in out] == case["greedy"]
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("identical"), done.stderr[-2000:]
