# SPDX-License-Identifier: Apache-2.0
import copy
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from nemo_rba.synthesis.teacher import HFTeacher, _sample
from nemo_rba.synthesis.teacher_folder import check_same_vocabulary
from nemo_rba.synthesis.unanswered import Refusals, Unanswered
from nemo_rba.types import SamplingParams

PROMPTS = ["what is one plus two", "say cat", "tell me the name a dog", "hello", "what is the color red blue"]
PARAMS = SamplingParams(max_new_tokens=40, temperature=1.0, top_p=1.0, seed=5)
END = 3  # id of <|im_end|>


def rendered(teacher, texts=PROMPTS):
    return [teacher.render([{"role": "user", "content": text}], open_turn="assistant") for text in texts]


def load(folder, **changes):
    return HFTeacher(**({"path": str(folder), "batch_size": 8, "device": "cpu", "dtype": "float32"} | changes))


def test_render_leaves_the_turn_open(teacher):
    assert teacher.render([], open_turn="user") == "<bos><|im_start|>user\n"
    said = [{"role": "user", "content": "hello"}]
    assert teacher.render(said, open_turn="assistant") == (
        "<bos><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = [*said, {"role": "assistant", "content": "cat"}]
    assert teacher.render(answered, open_turn="user").endswith("assistant\ncat<|im_end|>\n<|im_start|>user\n")
    with pytest.raises(ValueError, match="open_turn is 'system'"):
        teacher.render([], open_turn="system")


def test_a_template_that_can_think_is_told_not_to(teacher, monkeypatch):
    thinking = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    monkeypatch.setattr(teacher._tokenizer, "chat_template", teacher._tokenizer.chat_template + thinking)
    said = [{"role": "user", "content": "hello"}]
    assert "<think>" in teacher._tokenizer.apply_chat_template(said, tokenize=False)
    assert teacher.render(said, open_turn="assistant").endswith("<|im_start|>assistant\n")


def test_bos_is_not_added_twice(teacher):
    (row,) = teacher._encode(["<bos><|im_start|>user\nhello"], room=1)
    assert row == [1, 2, 4, teacher.vocabulary()["hello"]]


def greedy_by_hand(teacher, prompt, max_new_tokens):
    ids = torch.tensor(teacher._encode([prompt], room=0))
    written = []
    for _ in range(max_new_tokens):
        token = int(teacher._model(input_ids=ids).logits[0, -1].argmax())
        if token == END:
            return teacher._tokenizer.decode(written, skip_special_tokens=True)
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ""


@torch.no_grad()
def test_greedy_is_the_argmax_chain(teacher):
    prompts = rendered(teacher)
    expected = [greedy_by_hand(teacher, prompt, 12) for prompt in prompts]
    assert teacher.generate(prompts, replace(PARAMS, temperature=0, max_new_tokens=12)) == expected


def test_samples_depend_on_the_seed_and_not_on_the_batch_size(teacher, teacher_folder):
    prompts = rendered(teacher) * 4
    first = teacher.generate(prompts, PARAMS)
    assert teacher.generate(prompts, PARAMS) == first
    assert load(teacher_folder, batch_size=3).generate(prompts, PARAMS) == first
    assert teacher.generate(prompts, replace(PARAMS, seed=6)) != first
    assert len(set(first)) > 10


def test_an_answer_that_never_ends_is_empty(teacher):
    long = teacher.generate(rendered(teacher) * 4, PARAMS)
    short = teacher.generate(rendered(teacher) * 4, replace(PARAMS, max_new_tokens=3))
    assert all(len(text.split()) <= 2 for text in short)  # two words and the end
    assert "" in short
    assert any(len(text.split()) > 2 for text in long)
    assert "<|im_end|>" not in " ".join(long)


def test_a_prompt_that_is_too_long_is_counted_and_changes_no_other(teacher):
    prompts, long = rendered(teacher), rendered(teacher, ["cat " * 200])
    expected = teacher.generate(prompts, PARAMS)
    found = teacher.generate([*prompts[:2], *long, *prompts[3:]], PARAMS)
    assert (found[:2], found[3:]) == (expected[:2], expected[3:])
    assert type(found[2]) is Unanswered
    assert (found[2], found[2].reason) == ("", "the prompt is too long for the teacher")
    fresh = copy.copy(teacher)
    fresh._refusals = Refusals()
    assert fresh.generate(long, PARAMS) == [""], "one says nothing about the settings"
    with pytest.raises(ValueError, match=r"not answer any of 2 prompts.*do not fit the teacher's 128 tokens.*cat cat"):
        fresh.generate(rendered(teacher, ["cat " * 200, "dog " * 200]), PARAMS)


def test_no_text_opens_with_a_token_that_is_suppressed(teacher):
    asked = [teacher.render([], open_turn="user")] * 120
    params = replace(PARAMS, max_new_tokens=6)
    plain = teacher.generate(asked, params)
    opening = Counter(text.split()[0] for text in plain if text).most_common(2)
    frequent = [word for word, _ in opening] + ["<pad>", "<bos>", "<|im_start|>"]  # special tokens are not in the text
    kept = teacher.without_openings(frequent)
    texts = [text for text in kept.generate(asked, params) if text]
    assert len(texts) > 5
    assert not any(text.split()[0] in frequent for text in texts)
    assert any(word in text.split()[1:] for text in texts for word in frequent[:2]), "it may stand later"
    assert teacher.generate(asked[:9], params) != kept.generate(asked[:9], params), "the teacher itself is as it was"
    row = torch.tensor(teacher._encode(asked[:1], room=0))
    ids = [teacher.vocabulary()[word] for word in frequent]
    with torch.no_grad():
        logits = teacher._model(input_ids=row).logits[0, -1]
    logits[ids] = -torch.inf
    best = teacher._tokenizer.decode(int(logits.argmax()))
    greedy = kept.generate(asked[:1], replace(params, temperature=0, max_new_tokens=60))[0]
    assert greedy.startswith(best) or not greedy
    with pytest.raises(ValueError, match="suppressed_openings has '#', which is no token of the teacher"):
        teacher.without_openings(["cat", "#"])


def test_sampling_follows_the_distribution_and_its_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)[:, [2, 0, 3, 1]]  # tokens 1, 3, 0, 2 by size
    draws = (torch.arange(1000) + 0.5) / 1000

    def counts(**changes):
        return torch.bincount(_sample(logits, draws, replace(PARAMS, **changes)), minlength=4).tolist()

    assert counts() == [150, 500, 50, 300]
    assert counts(top_p=0.6) == [0, 625, 0, 375]  # 0.5 and 0.3 hold the first 0.6
    assert counts(top_p=0.4) == [0, 1000, 0, 0]
    assert counts(temperature=0) == [0, 1000, 0, 0]
    assert counts(temperature=0.5)[1] == pytest.approx(1000 * 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=1)


@torch.no_grad()
def test_logprobs_are_those_of_a_plain_forward_pass(teacher, teacher_folder):
    prompts = rendered(teacher)
    responses = [torch.tensor(ids).long() for ids in ([6, 7, END], [8], [9, 10, 11, 12, END], [], [7, END])]
    for judge in (teacher, load(teacher_folder, batch_size=2)):
        found = judge.logprobs(prompts, responses)
        top = judge.topk_logprobs(prompts, responses, 4)
        for prompt, ids, logprobs, (top_ids, top_logprobs) in zip(prompts, responses, found, top, strict=True):
            row = torch.tensor(teacher._encode([prompt], room=0)[0])
            logits = teacher._model(input_ids=torch.cat([row, ids])[None]).logits[0, len(row) - 1 :]
            expected = logits[: len(ids)].log_softmax(-1)
            assert logprobs.shape == ids.shape
            assert logprobs.dtype == torch.float32
            torch.testing.assert_close(logprobs, expected.gather(-1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5)
            assert top_ids.shape == top_logprobs.shape == (len(ids), 4)
            torch.testing.assert_close(top_logprobs, expected.topk(4).values, atol=1e-5, rtol=1e-5)
            assert torch.equal(top_ids, expected.topk(4).indices)
    assert teacher.logprobs([], []) == []
    assert teacher.generate([], PARAMS) == []


def test_a_model_spread_over_all_devices_is_the_same_model(teacher, teacher_folder):
    spread = HFTeacher(path=str(teacher_folder), batch_size=8, device="auto", dtype="float32")
    prompts = [
        teacher.render([{"role": "user", "content": text}], open_turn="assistant") for text in ("one", "two cat")
    ]
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    assert spread.generate(prompts, params) == teacher.generate(prompts, params)
    responses = [torch.tensor([7, 9]), torch.tensor([8])]
    for ours, theirs in zip(spread.logprobs(prompts, responses), teacher.logprobs(prompts, responses), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_requests_are_explained(teacher):
    prompts = rendered(teacher)
    with pytest.raises(ValueError, match="token id 99, but the teacher has 26 tokens"):
        teacher.logprobs(prompts[:1], [torch.tensor([99])])
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        teacher.logprobs(prompts[:1], [torch.tensor([1])] * 2)
    with pytest.raises(ValueError, match="asked for the 27 likeliest of 26"):
        teacher.topk_logprobs(prompts[:1], [torch.tensor([1])], 27)
    with pytest.raises(ValueError, match="do not fit the teacher's 128 tokens"):
        teacher.generate(prompts, replace(PARAMS, max_new_tokens=128))
    with pytest.raises(ValueError, match="expected 0 < top_p"):
        teacher.generate(prompts, replace(PARAMS, top_p=0.0))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "no model in"),
        ("tokenizer.json", "no tokenizer in"),
        ("chat_template.jinja", "has no chat template"),
        ("model.safetensors", "no weights in"),
    ],
)
def test_an_incomplete_folder_is_refused(teacher_folder, tmp_path, lost, message):
    folder = tmp_path / "copy"
    shutil.copytree(teacher_folder, folder)
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_wrong_settings_are_refused(teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="no model in"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"teacher.dtype is 'int8'"):
        load(teacher_folder, dtype="int8")
    with pytest.raises(ValueError, match=r"teacher.batch_size is 0"):
        load(teacher_folder, batch_size=0)


def test_weights_that_lack_tensors_are_refused(teacher_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(teacher_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors \(model.norm.weight\)"):
        load(folder)


def test_a_template_without_an_end_of_turn_token_can_answer_but_not_ask(teacher_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(teacher_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}user {{ m['content'] }} assistant {% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    judge = load(folder)
    assert judge.render([{"role": "user", "content": "hello"}], open_turn="assistant") == "user hello assistant "
    with pytest.raises(ValueError, match="does not close the user's turn"):
        judge.render([], open_turn="user")


def test_same_vocabulary():
    mine = {"a": 0, "b": 1, "c": 2}
    check_same_vocabulary(mine, mine)
    check_same_vocabulary(mine, mine | {"<|audio|>": 3})
    with pytest.raises(ValueError, match=r"differ in 2 of 3 tokens: 'b' is 1 for the teacher, 2 for the student; 'c'"):
        check_same_vocabulary(mine, {"a": 0, "b": 2, "c": 1})
    with pytest.raises(ValueError, match="'c' is 2 for the teacher, absent for the student"):
        check_same_vocabulary(mine, {"a": 0, "b": 1})


def test_the_folder_s_generation_config_changes_nothing(teacher, teacher_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(teacher_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "repetition_penalty": 5.0}))
    prompts = rendered(teacher)
    assert load(folder).generate(prompts, PARAMS) == teacher.generate(prompts, PARAMS)
