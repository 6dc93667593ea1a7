# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's protocol, which serves the tiny teacher on loopback, says what the teacher itself says."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from nemo_rba.synthesis.filters import DuplicateFilter, LengthFilter, ResponseFilter
from nemo_rba.synthesis.instructions import MagpieSampler, answer
from nemo_rba.synthesis.teacher import HFTeacher
from nemo_rba.synthesis.teacher_openai import OpenAITeacher
from nemo_rba.types import Instruction, SamplingParams

from .conftest import text_stage

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "teacher"
ASKED = [
    "what is one plus two",
    "say the word cat",
    "tell me about a dog",
    "what is the opposite of big",
    "count to five",
]
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)


@pytest.fixture(scope="module")
def local() -> HFTeacher:
    torch.set_num_threads(1)
    return HFTeacher(path=str(TINY), batch_size=16, device="cpu", dtype="float32")


def completed(teacher: HFTeacher, path: str, body: dict) -> dict:
    """The reply of ``/v1/completions`` or ``/v1/chat/completions``."""
    chat = path == "/v1/chat/completions"
    prompt = teacher.render(body["messages"], open_turn="assistant") if chat else body["prompt"]
    params = SamplingParams(
        max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], seed=body["seed"]
    )
    (text,) = teacher.generate([prompt], params)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    lengths = [len(teacher._tokenizer(part)["input_ids"]) for part in (prompt, text)]
    usage = dict(zip(("prompt_tokens", "completion_tokens"), lengths, strict=True))
    return {"choices": [said | {"index": 0, "finish_reason": "stop" if text else "length"}], "usage": usage}


@pytest.fixture(scope="module")
def server(local):
    """(url, how often each path was asked)"""
    asked, one_at_a_time = Counter(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with one_at_a_time:
                asked[self.path] += 1
                self.reply(completed(local, self.path, body))

        def reply(self, payload):
            data = json.dumps(payload).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()


def connect(server, memory: str = "") -> OpenAITeacher:
    return OpenAITeacher(
        section="teacher", base_url=server[0], model="tiny", api_key_env="", pre_query="<|im_start|>user\n",
        stop="<|im_end|>", num_parallel=4, timeout_seconds=60.0, max_retries=0, memory=memory,
    )  # fmt: skip


def test_a_hosted_teacher_answers_and_asks_as_it_does_here(server, local):
    hosted = connect(server)
    items = [Instruction(id=text, text=text, response="", task="") for text in ASKED]
    answers = answer(local, items, GREEDY)
    assert len(set(answers) - {""}) >= 4, "the comparison means something"
    assert answer(hosted, items, GREEDY) == answers
    opened = hosted.render([], open_turn="user")
    assert opened == local.render([], open_turn="user")
    asked = local.generate([opened], GREEDY)
    assert asked != [""]
    assert hosted.generate([opened], GREEDY) == asked
    short = SamplingParams(max_new_tokens=2, temperature=0.0)
    assert answer(hosted, items, short) == answer(local, items, short), "also what is cut off"
    assert hosted.usage["prompt_tokens"] > hosted.usage["completion_tokens"] > 0


def test_a_text_stage_runs_through_a_server_and_pays_nothing_twice(server, local, tmp_path):
    quotas = {("train", ""): 8, ("test", ""): 2}

    def run(folder: str, teacher):
        return text_stage(
            tmp_path / folder, teacher=teacher, response_params=GREEDY, context="",
            sampler=MagpieSampler(
                teacher=teacher, batch_size=10, temperature=1.0, top_p=1.0, max_new_tokens=32, seed=3
            ),
            instruction_filters=[LengthFilter(min_words=2, max_words=24, max_characters=160), DuplicateFilter()],
            speech_filters=[], response_filters=[ResponseFilter(max_words=40)],
            split_of=lambda text: "test" if len(text) % 3 == 0 else "train", task_of=lambda text: "any",
            kind_of=lambda text: "",
        ).run(quotas, max_batches=20)  # fmt: skip

    memory, (_, asked) = str(tmp_path / "teacher.jsonl"), server
    result = run("first", connect(server, memory))
    items = [*result.splits["train"], *result.splits["test"]]
    assert (len(result.splits["train"]), len(result.splits["test"]), result.missing) == (8, 2, {})
    assert [item.response for item in items] == answer(local, items, GREEDY)
    before = Counter(asked)
    assert before["/v1/completions"] >= result.num_sampled
    assert run("second", connect(server, memory)) == result, "the folder is lost, what was paid for is not"
    assert asked == before
