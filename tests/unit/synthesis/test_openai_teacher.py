# SPDX-License-Identifier: Apache-2.0
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nemo_rba.synthesis import teacher_openai
from nemo_rba.synthesis.teacher_openai import OpenAITeacher
from nemo_rba.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=2**40 + 5)


class Server:
    """Echoes; answers the first requests after ``failures`` were set with these codes."""

    def __init__(self):
        self.failures: list[int] = []
        self.headers: dict[str, str] = {}
        self.nonsense: list[bytes] = []  # what it says first
        self.seen: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"id": "m"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body | {"path": self.path})
                if "prompt" in body:
                    usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": None}
                    self.reply({"choices": [{"text": " hello ", "finish_reason": "stop"}], "usage": usage})
                    return
                said = body["messages"][-1]["content"]
                reason = "length" if said == "endless" else "stop"
                self.reply({"choices": [{"message": {"content": said.upper()}, "finish_reason": reason}]})

            def reply(self, payload):
                allowed = self.headers["Authorization"] in (None, "Bearer right")
                code = server.failures.pop(0) if server.failures else 200 if allowed else 401
                data = server.nonsense.pop(0) if server.nonsense else json.dumps(payload).encode()
                self.send_response(code)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    made = Server()
    made.waits = []
    monkeypatch.setattr(teacher_openai.time, "sleep", made.waits.append)
    yield made
    made.http.shutdown()
    made.http.server_close()


def connect(server, **changes) -> OpenAITeacher:
    settings = {"base_url": server.url, "model": "m", "api_key_env": "", "pre_query": "<user>", "stop": "<end>"}
    settings |= {"num_parallel": 2, "timeout_seconds": 5.0, "max_retries": 2, "memory": ""}
    return OpenAITeacher(**(settings | changes))


def test_instructions_and_answers(server):
    teacher = connect(server)
    assert teacher.generate([teacher.render([], open_turn="user")] * 2, PARAMS) == ["hello", "hello"]
    asked = server.seen[0]
    assert (asked["path"], asked["prompt"], asked["stop"]) == ("/v1/completions", "<user>", ["<end>"])
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"]) == (7, 0.5, 0.9)
    assert sorted(row["seed"] for row in server.seen) == [5, 6]
    prompts = [teacher.render([{"role": "user", "content": t}], open_turn="assistant") for t in ("a", "endless", "c")]
    assert teacher.generate(prompts, PARAMS) == ["A", "", "C"]


def test_a_busy_server_is_asked_again(server):
    teacher = connect(server)
    server.failures = [429, 503]
    assert teacher.generate(['[{"role": "user", "content": "a"}]'], PARAMS) == ["A"]
    server.failures = [500] * 3
    with pytest.raises(ValueError, match="HTTP 500"):
        teacher.generate(['[{"role": "user", "content": "a"}]'], PARAMS)
    assert len(server.seen) == 6
    assert server.waits == [1, 2, 1, 2]
    server.failures, server.headers = [429], {"Retry-After": "7.5"}
    teacher.generate(['[{"role": "user", "content": "a"}]'], PARAMS)
    assert server.waits[-1] == 7.5, "as it asked"


@pytest.mark.parametrize(
    "said", [b"<html>", b'{"error": "no"}', b'{"choices": []}', b"[]", b'{"choices": [{"text": 4}]}']
)
def test_nonsense_is_not_taken_for_an_answer(server, said):
    teacher = connect(server)
    prompts = [teacher.render([], open_turn="user")]
    server.nonsense = [said]
    assert teacher.generate(prompts, PARAMS) == ["hello"], "asked again"
    server.nonsense = [said] * 3
    with pytest.raises(ValueError, match=r"/v1/completions did not answer \([A-Za-z]+: "):
        teacher.generate(prompts, PARAMS)


def test_a_server_that_stalls_is_not_waited_for(server):
    stalled = threading.Event()
    teacher = connect(server, timeout_seconds=0.2, max_retries=0)
    server.http.RequestHandlerClass.do_POST = lambda handler: stalled.wait(3)
    with pytest.raises(ValueError, match=r"did not answer .*Timeout"):
        teacher.generate([teacher.render([], open_turn="user")], PARAMS)
    stalled.set()


def test_a_restart_pays_nothing_twice(server, tmp_path):
    memory = str(tmp_path / "teacher.jsonl")
    prompts = ["<user>", '[{"role": "user", "content": "a"}]', '[{"role": "user", "content": "endless"}]', "<user>"]
    teacher = connect(server, memory=memory)
    answers = teacher.generate(prompts, PARAMS)
    assert teacher.usage["completion_tokens"] == 2
    again = connect(server, memory=memory)
    assert again.generate(prompts, PARAMS) == answers == ["hello", "A", "", "hello"]
    assert len(server.seen) == 4
    assert teacher.account() == {
        "requests": 5, "replies remembered": 0, "prompt tokens": 6, "completion tokens": 2,
        "replies without token counts": 2,
    }  # fmt: skip
    assert again.usage == {"requests": 1, "remembered": 4}, "the list of models alone"
    assert again.generate(["<user>"], SamplingParams(max_new_tokens=8, seed=1)) == ["hello"]
    assert len(server.seen) == 5, "another question"
    connect(server, memory=memory, base_url=f"http://localhost:{server.http.server_port}/v1")
    with pytest.raises(ValueError, match="belongs to"):
        connect(server, memory=memory, base_url=f"http://localhost:{server.http.server_port}/v1").generate(
            prompts, PARAMS
        )


def test_what_cannot_get_better_stops_at_once(server, monkeypatch):
    with pytest.raises(ValueError, match=r"offers \['m'\], not 'x'"):
        connect(server, model="x")
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which is not set"):
        connect(server, api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("SOME_KEY", "wrong")
    with pytest.raises(ValueError, match=r"HTTP 401.*teacher.api_key_env"):
        connect(server, api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "right")
    teacher = connect(server, api_key_env="SOME_KEY")
    server.failures = [404, 200]
    with pytest.raises(ValueError, match="HTTP 404"):
        teacher.generate(['[{"role": "user", "content": "a"}]'], PARAMS)
    assert server.failures == [200]  # asked once
    with pytest.raises(ValueError, match="did not answer"):
        connect(server, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=r"teacher.pre_query, which is ''"):
        connect(server, pre_query="").render([], open_turn="user")
