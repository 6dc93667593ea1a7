# SPDX-License-Identifier: Apache-2.0
"""Answers compared with a baseline's by a judge behind a server on this machine; what it costs, told in the report."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nemo_rba.evaluation.judged import JudgedTask, RewardTask, WinRateTask
from nemo_rba.evaluation.measures import LENGTH_CONTROLLED, set_score
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import run
from nemo_rba.evaluation.tasks import as_rollout
from nemo_rba.rewards.judge import AnswerJudgeReward, JudgeReward, PairwiseJudgeReward
from nemo_rba.synthesis.teacher_openai import OpenAITeacher
from nemo_rba.types import Instruction, Rollout, SpeechBatch

NUM_ITEMS = 12
PRICES = {"prompt tokens": 2.0, "completion tokens": 8.0}
ROLES = Roles(systems={"teacher": "T", "start": "S0", "rba": "RBA"}, teacher="T", start="S0", arms=["RBA"])


class Handler(BaseHTTPRequestHandler):
    """Names the answer with more "good" in it; counts 100 tokens in and 1 out, but not for item 0."""

    def do_GET(self):
        self.reply({"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        first, second = asked.split("|")[1:]
        said = "2" if second.count("good") > first.count("good") else "1"
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        usage = {} if asked.startswith("item 0|") else {"usage": {"prompt_tokens": 100, "completion_tokens": 1}}
        self.reply({"choices": [choice]} | usage)

    def reply(self, payload):
        data = json.dumps(payload).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def batch() -> SpeechBatch:
    return SpeechBatch(
        instructions=tuple(
            Instruction(id=str(n), text=f"item {n}", response="good enough", task="t") for n in range(NUM_ITEMS)
        ),
        audio=torch.zeros(NUM_ITEMS, 8),
        audio_lens=torch.full((NUM_ITEMS,), 8),
        prompt_ids=torch.zeros(NUM_ITEMS, 2, dtype=torch.int64),
        prompt_lens=torch.full((NUM_ITEMS,), 2),
        response_ids=torch.zeros(NUM_ITEMS, 1, dtype=torch.int64),
        response_lens=torch.ones(NUM_ITEMS, dtype=torch.int64),
    )


class System:
    """Says something good about every ``of``-th item, and more words about it from item to item."""

    decoding: dict = {}  # noqa: RUF012

    def __init__(self, name: str, of: int):
        self.name, self.of = name, of

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=row, instruction=item, response=said(self.of, row), token_ids=torch.tensor([1]),
                logprobs=None, truncated=False,
            )
            for row, item in enumerate(batch.instructions)
        ]  # fmt: skip


def said(of: int, row: int) -> str:
    return ("good good" if row % of == 0 else "bad") + f" and {of}" * row


def make_task(url: str, memory: str = "", **changes) -> WinRateTask:
    judge = OpenAITeacher(
        section="evaluation.task.reward.judge", base_url=url, model="m", api_key_env="", pre_query="", stop="",
        num_parallel=2, timeout_seconds=5.0, max_retries=0, memory="",
    )  # fmt: skip
    reward = PairwiseJudgeReward(
        judge=judge, model="m", version="v-1", prompt="{instruction}|{first}|{second}", votes=1, max_new_tokens=4,
        temperature=0.0, seed=0, memory=memory,
    )  # fmt: skip
    return WinRateTask(**{"name": "alpaca", "batches": lambda: [batch()], "reward": reward, "kinds": {}}
                       | {"prices": PRICES} | changes)  # fmt: skip


def test_win_rates_their_intervals_and_what_they_cost_are_reported(url, tmp_path):
    task = make_task(url, memory=str(tmp_path / "comparisons.jsonl"))
    rates = {"teacher": 1, "start": 4, "rba": 2}
    predictions = [p for name, of in rates.items() for p in run(System(name, of), task, tmp_path)]
    account = task.account()
    paid = 3 * NUM_ITEMS - 2  # all answer item 0 alike
    assert account == {
        "answers judged": paid, "answers without grade": 0, "votes paid": paid, "votes remembered": 2,
        "votes without grade": 0, "requests": paid + 1, "replies remembered": 0, "prompt tokens": 100 * (paid - 1),
        "completion tokens": paid - 1, "replies without token counts": 1,
        "cost": pytest.approx((100 * 2 + 8) * (paid - 1) / 1e6),
    }  # fmt: skip
    results = write_report(
        folder=tmp_path, title="t", roles=ROLES, predictions=predictions, curves=None, budget={}, notes=[],
        held_out={}, num_samples=2, num_draws=20, seed=0, accounts={"alpaca": account},
    )  # fmt: skip
    (condition,) = results["conditions"]
    assert (condition["quantity"], list(condition["others"])) == ("win rate", [LENGTH_CONTROLLED])
    assert condition["signatures"]["win rate"] == "judge:m|prompt:v-1|votes:1|temperature:0"
    scores = condition["whole"]["scores"]
    assert {label: score["value"] for label, score in scores.items()} == {"T": 100.0, "S0": 25.0, "RBA": 50.0}
    items = np.array([[row % 2 == 0, len(said(2, row)) - len("good enough")] for row in range(NUM_ITEMS)], dtype=float)
    controlled = condition["others"][LENGTH_CONTROLLED]["scores"]["RBA"]
    assert controlled["value"] == pytest.approx(set_score(LENGTH_CONTROLLED, items))
    assert controlled["low"] <= controlled["value"] <= controlled["high"]
    assert json.loads((tmp_path / "results.json").read_text())["accounts"]["alpaca"]["votes paid"] == paid
    page = (tmp_path / "report.md").read_text()
    assert "What scoring has cost" in page
    assert f"| alpaca | {paid} | 0 | {paid} |" in page
    assert "3,300" in page

    again = make_task(url, memory=str(tmp_path / "comparisons.jsonl"))
    assert [p for name, of in rates.items() for p in run(System(name, of), again, tmp_path)] == predictions
    assert (again.account()["votes paid"], again.account()["votes remembered"]) == (0, 3 * NUM_ITEMS)
    assert again.account()["cost"] == 0.0


def test_one_call_scores_a_set(url):
    item = batch().instructions[0]
    rollouts = System("rba", 2).answer(batch())
    scores = make_task(url).score(rollouts)
    assert scores["score"] == scores["win rate"] == 50.0
    assert scores[LENGTH_CONTROLLED] > 0
    assert make_task(url).item(item, "good enough") == (50.0, 1.0), "the baseline's own words"


def test_nothing_is_told_where_nothing_is_paid_for():
    def reward(rollouts):
        return torch.ones(len(rollouts))

    settings = {"name": "a", "batches": list, "reward": reward, "kinds": {}}
    assert RewardTask(**settings, prices=None).account() == {}
    with pytest.raises(ValueError, match=r"task.prices has \['prompt tokens'\], but nothing is counted"):
        RewardTask(**settings, prices={"prompt tokens": 1.0})


class Says:
    """Says the answer that it is shown."""

    def render(self, messages, *, open_turn):
        return messages[0]["content"]

    def generate(self, prompts, params):
        return [prompt.split("|")[-1] for prompt in prompts]


HOW = {"judge": Says(), "model": "m", "version": "v-1", "votes": 1, "max_new_tokens": 4, "temperature": 0.0, "seed": 0,
       "memory": ""}  # fmt: skip


def test_a_judges_grades_are_measures_that_say_so(tmp_path):
    reward = JudgeReward(prompt="{instruction}|{response}", low=1, high=5, **HOW)
    task = JudgedTask(name="judged", batches=list, reward=reward, prices=None, kinds={})
    items = batch().instructions[:4]
    replies = ["2/5", "4", "5 out of 5", "15"]
    rollouts = [as_rollout(item, text) for item, text in zip(items, replies, strict=True)]
    scores = task.score(rollouts)
    assert scores == {"score": 50.0, "judge, 1-5 as 0-100": 50.0, "judge, mean grade 1-5": 3.0}, (
        "2, 4, 5, and no grade: 1"
    )
    assert task.account()["answers without grade"] == 1
    names = list(task.statistics(items[0], "2/5"))
    assert names[0] == "judge, 1-5 as 0-100|judge:m|prompt:v-1|votes:1|temperature:0"


def test_answers_that_a_judge_calls_right_are_a_share():
    reward = AnswerJudgeReward(prompt="{instruction}{reference}|{response}", **HOW)
    task = JudgedTask(name="qa", batches=list, reward=reward, prices=None, kinds={})
    item = batch().instructions[0]
    assert [task.item(item, text) for text in ("Yes.", "no", "maybe", "")] == [(100.0, 1.0)] + [(0.0, 1.0)] * 3
    assert next(iter(task.statistics(item, "no"))).startswith("judged right, by majority|judge:m|")


CONF = Path(__file__).parents[3] / "conf"


def test_each_shipped_judge_has_a_file_and_a_version_of_its_own():
    rewards = {
        path.stem: yaml.safe_load(path.read_text())["task"].get("reward") for path in CONF.glob("evaluation/*.yaml")
    }
    judges = [reward for reward in rewards.values() if reward and "judge" in reward]
    judges.append(yaml.safe_load((CONF / "reward" / "judge.yaml").read_text())["parts"]["judge"])
    assert len(judges) == 4
    for key in ("memory", "version", "prompt"):
        assert set(Counter(judge[key] for judge in judges).values()) == {1}, key
