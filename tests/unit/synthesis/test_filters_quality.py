# SPDX-License-Identifier: Apache-2.0
import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForSequenceClassification

from nemo_rba.synthesis.filters import apply_filters
from nemo_rba.synthesis.filters_quality import AnswerEncoder, RewardFilter, TeacherScoreFilter
from nemo_rba.synthesis.teacher import HFTeacher
from nemo_rba.types import Instruction, SamplingParams

from .conftest import FakeTeacher, build_tokenizer

ROOT = Path(__file__).parents[3]


class Judge:
    """Finds every token exactly as likely as its id says: log p = -id / 10. Counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __deepcopy__(self, memo):
        raise AssertionError("a teacher was copied")

    def render(self, messages, *, open_turn):
        return f"{messages[0]['content']}<{open_turn}>"

    def encode_response(self, response):
        return [len(word) for word in response.split()] + [1]

    def logprobs(self, prompts, responses):
        self.asked.append(list(prompts))
        return [-ids.float() / 10 for ids in responses]


def instruction(response: str, text: str = "hello", context: str = "") -> Instruction:
    return Instruction(id="x", text=text, response=response, task="t", context=context)


def test_a_teacher_drops_unlikely_answers():
    judge = Judge()
    score = TeacherScoreFilter(teacher=judge, minimum=-0.35)
    items = [instruction("aaa aaaaa"), instruction("aaa aaaaaaaaa"), instruction(" "), instruction("a", context="Say:")]
    kept, counts, _ = apply_filters(items, [score])  # means of 3 5 1, 3 9 1 and 1 1 tenths
    assert kept == [items[0], items[3]]
    assert counts == {"teacher score: below -0.35 nats a token": 2}
    assert judge.asked == [["hello<assistant>", "hello<assistant>", "Say: hello<assistant>"]]
    assert score.reason(items[1]) == "below -0.35 nats a token"
    assert len(judge.asked) == 1  # known
    encoded = TeacherScoreFilter(teacher=judge, minimum=-0.35, encode=lambda response: [9])
    assert encoded.reason(items[0]) is not None


def test_a_real_teacher_scores_the_likelier_answer_higher(teacher):
    vocabulary = teacher.vocabulary()
    prompt = teacher.render([{"role": "user", "content": "what is one"}], open_turn="assistant")
    answers = ["red blue", "cat dog", "one two three"]

    def encode(text):
        return [vocabulary[word] for word in text.split()] + [vocabulary["<|im_end|>"]]

    means = [float(teacher.logprobs([prompt], [torch.tensor(encode(text))])[0].mean()) for text in answers]
    best, worst = max(means), min(means)
    middle = TeacherScoreFilter(teacher=teacher, minimum=(best + worst) / 2, encode=encode)
    kept, _, dropped = apply_filters([instruction(text, "what is one") for text in answers], [middle])
    assert answers[means.index(best)] in [item.response for item in kept]
    assert answers[means.index(worst)] in [item.response for item, _ in dropped]


def test_the_tiny_teacher_scores_answers_from_a_yaml_as_a_user_writes_it(tmp_path):
    folder = str(ROOT / "examples" / "tiny" / "teacher")
    teacher = HFTeacher(path=folder, batch_size=8, device="cpu", dtype="float32")
    chosen = OmegaConf.load(ROOT / "conf" / "filter" / "teacher_score.yaml")
    cfg = OmegaConf.create({"teacher": {"path": folder}, "output": str(tmp_path), "filter": chosen})
    score = copy.deepcopy(instantiate(cfg.filter)(teacher=teacher))  # as recipe.synthesize and SelfSynthesis do
    asked = ["spell cat", "repeat the word red"]
    prompts = [teacher.render([{"role": "user", "content": text}], open_turn="assistant") for text in asked]
    own = teacher.generate(prompts, SamplingParams(max_new_tokens=20, temperature=0.0))
    assert all(own)
    items = [instruction(own[0], asked[0]), instruction(own[1], asked[1]), instruction(own[0], asked[1])]
    reasons = score.reasons(items)
    assert reasons == [None, None, "below -2 nats a token"]
    assert len((tmp_path / "teacher_scores.jsonl").read_text().splitlines()) == 4  # whose they are, and three scores
    encode = AnswerEncoder(path=folder)
    ids = teacher._tokenizer(prompts[0] + own[0], add_special_tokens=False)["input_ids"]
    assert ids[-len(encode(own[0])) + 1 :] == encode(own[0])[:-1], "as the teacher reads them after the prompt"
    assert encode(own[0])[-1] in teacher._stop_ids
    before = torch.tensor(encode(own[0]))
    mean = float(teacher.logprobs([prompts[0]], [before])[0].mean())
    assert score._scores.look_up([items[0]], None) == [pytest.approx(mean)]


def test_a_reward_model_drops_answers_from_yaml(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=1, initializer_range=0.5,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    chosen = OmegaConf.load(ROOT / "conf" / "filter" / "reward_model.yaml")
    chosen.reward.path = str(tmp_path / "model")
    cfg = OmegaConf.create({"output": str(tmp_path), "filter": chosen})
    items = [instruction(text, "what is one") for text in ("red blue", "cat dog", "one two three", "hello")]
    scores = [json.loads(line)["value"] for line in _lines_after(instantiate(cfg.filter), items, tmp_path)]
    assert len(set(scores)) == 4
    cfg.filter.minimum = sorted(scores)[2]
    kept, counts, _ = apply_filters(items, [instantiate(cfg.filter)])
    assert [scores[items.index(item)] >= sorted(scores)[2] for item in kept] == [True, True]
    assert sum(counts.values()) == 2


def _lines_after(scored: RewardFilter, items: list[Instruction], folder: Path) -> list[str]:
    scored.reasons(items)
    return (folder / "rewards.jsonl").read_text().splitlines()[1:]


def test_answers_are_not_encoded_with_another_vocabulary(teacher, teacher_folder, tmp_path):
    other = AnswerEncoder(path=str(ROOT / "examples" / "tiny" / "teacher"))
    with pytest.raises(ValueError, match="teacher and student differ in"):
        TeacherScoreFilter(teacher=teacher, minimum=-1, encode=other)
    assert TeacherScoreFilter(teacher=teacher, minimum=-9, encode=AnswerEncoder(path=str(teacher_folder)))
    with pytest.raises(ValueError, match="no tokenizer in path"):
        AnswerEncoder(path=str(tmp_path))


def test_scores_are_remembered_over_an_interruption(tmp_path):
    memory, judge = tmp_path / "text" / "scores.jsonl", Judge()
    items = [instruction("aaa " * n + "a" * 12) for n in range(1, 30)]
    fresh = TeacherScoreFilter(teacher=judge, minimum=-0.4, memory=str(memory))
    whole = copy.deepcopy(fresh).reasons(items)
    assert None in whole
    assert len(set(whole)) == 2
    resumed, changed = copy.deepcopy(fresh), Judge()
    resumed._teacher = changed
    changed.logprobs = None  # must not be asked
    assert resumed.reasons(items) == whole
    data = memory.read_bytes()
    memory.write_bytes(data[:-20])  # killed while writing the last line
    again = copy.deepcopy(fresh)
    assert again.reasons(items) == whole
    assert judge.asked[1:] == [["hello<assistant>"]]
    assert memory.read_bytes() == data
    memory.write_text("{}\n" + data.decode())
    with pytest.raises(ValueError, match=r"scores\.jsonl line 1 is damaged; delete"):
        copy.deepcopy(fresh).reasons(items)


def test_a_reward_drops_answers_and_is_asked_once_for_each():
    seen = []

    def words(rollouts):
        seen.extend((r.prompt_index, r.instruction.text, r.response, len(r.token_ids), r.truncated) for r in rollouts)
        return torch.tensor([float(len(rollout.response.split())) for rollout in rollouts])

    items = [instruction("one"), instruction("one two"), instruction("one")]
    kept, counts, _ = apply_filters(items, [RewardFilter(reward=words, minimum=2)])
    assert kept == [items[1]]
    assert counts == {"reward: below 2": 2}
    assert seen == [(0, "hello", "one", 0, False), (1, "hello", "one two", 0, False)]
    encoded = copy.deepcopy(RewardFilter(reward=words, minimum=2, encode=lambda response: [1, 2, 3]))
    assert encoded.reason(items[1]) is None
    assert seen[-1][3] == 3


def test_settings_and_judges_are_checked(tmp_path):
    with pytest.raises(ValueError, match="minimum=0"):
        TeacherScoreFilter(teacher=Judge(), minimum=0)
    with pytest.raises(ValueError, match="teacher=FakeTeacher has no logprobs"):
        TeacherScoreFilter(teacher=FakeTeacher(), minimum=-1, encode=len)
    with pytest.raises(ValueError, match=r"has no encode_response, .*filters_quality\.AnswerEncoder, path: <the"):
        TeacherScoreFilter(teacher=type("Mute", (), {"logprobs": None})(), minimum=-1)
    with pytest.raises(ValueError, match="minimum=inf"):
        RewardFilter(reward=len, minimum=math.inf)
    memory = tmp_path / "m.jsonl"
    broken = RewardFilter(reward=lambda rollouts: torch.tensor([math.nan]), minimum=0, memory=str(memory))
    with pytest.raises(ValueError, match="the score of 'hello' is nan"):
        broken.reason(instruction("x"))
    assert not memory.exists()
    infinite = RewardFilter(reward=lambda rollouts: torch.tensor([-math.inf]), minimum=0, memory=str(memory))
    assert infinite.reason(instruction("x")) == "below 0"
    assert json.loads(memory.read_text().splitlines()[1])["value"] == -math.inf
