# SPDX-License-Identifier: Apache-2.0
import json
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_rba.synthesis import teacher_openai
from nemo_rba.synthesis.instructions import without_openings
from nemo_rba.synthesis.instructions_domains import MagpieDomains
from nemo_rba.synthesis.teacher_openai import OpenAITeacher
from nemo_rba.synthesis.unanswered import MOST_IN_A_ROW, Unanswered
from nemo_rba.types import SamplingParams

KEY = "sk-right/123"
PARAMS = SamplingParams(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=2**40 + 5)


class Server:
    """Echoes; answers the first requests after ``failures`` were set with these codes, and refuses bad words."""

    def __init__(self):
        self.failures: list[int] = []
        self.headers: dict[str, str] = {}
        self.nonsense: list[bytes] = []  # what it says first
        self.seen: list[dict] = []
        self.stalled = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({"data": [{"id": "m"}, {"id": "n"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body | {"path": self.path})
                if "prompt" in body:
                    usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": None}
                    self.reply({"choices": [{"text": " hello ", "finish_reason": "stop"}], "usage": usage})
                    return
                said = body["messages"][-1]["content"]
                if "slow" in said:
                    server.stalled.wait(20)
                if "bad" in said or "lost" in said:
                    server.failures.append(400 if "bad" in said else 404)
                reason = "length" if said == "endless" else "stop"
                self.reply({"choices": [{"message": {"content": said.upper()}, "finish_reason": reason}]})

            def reply(self, payload):
                allowed = self.headers["Authorization"] in (None, f"Bearer {KEY}")
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    made = Server()
    made.waits = []
    monkeypatch.setattr(teacher_openai.time, "sleep", made.waits.append)
    yield made
    made.stalled.set()
    made.http.shutdown()
    made.http.server_close()


def connect(server, **changes) -> OpenAITeacher:
    settings = {"base_url": server.url, "model": "m", "api_key_env": "", "pre_query": "<user>", "stop": "<end>"}
    settings |= {"section": "teacher", "num_parallel": 2, "timeout_seconds": 5.0, "max_retries": 2, "memory": ""}
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


def test_what_was_paid_for_outlives_the_server_s_address_but_not_its_model(server, tmp_path):
    memory, prompts = str(tmp_path / "teacher.jsonl"), chat("a")
    connect(server, memory=memory).generate(prompts, PARAMS)
    moved = connect(server, memory=memory, base_url=f"http://localhost:{server.http.server_port}/v1")
    assert moved.generate(prompts, PARAMS) == ["A"]
    assert len(server.seen) == 1, "a job of its own, another node, the same model"
    other = connect(server, memory=memory, model="n")
    assert other.generate(prompts, PARAMS) == ["A"]
    assert [row["model"] for row in server.seen] == ["m", "n"], "another model is asked"


def test_what_cannot_get_better_stops_at_once(server, monkeypatch):
    with pytest.raises(ValueError, match=r"offers \['m', 'n'\], not 'x'"):
        connect(server, model="x")
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which is not set"):
        connect(server, api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("SOME_KEY", "wrong")
    with pytest.raises(ValueError, match=r"HTTP 401.*teacher.api_key_env"):
        connect(server, api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", KEY + "\r\n")  # as `$(cat key.txt)` of a file written elsewhere leaves it
    teacher = connect(server, api_key_env="SOME_KEY")
    server.failures = [404, 200]
    with pytest.raises(ValueError, match="HTTP 404"):
        teacher.generate(['[{"role": "user", "content": "a"}]'], PARAMS)
    assert server.failures == [200]  # asked once
    with pytest.raises(ValueError, match="did not answer"):
        connect(server, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=r"teacher.pre_query, which is ''"):
        connect(server, pre_query="").render([], open_turn="user")
    server.waits.clear()
    with pytest.raises(ValueError, match=r"MissingSchema|InvalidSchema"):
        connect(server, base_url="localhost:8000/v1")
    assert server.waits == [], "such an address does not get better"
    with pytest.raises(ValueError, match=r"teacher.stop is ''"):
        connect(server, stop="")


@pytest.mark.parametrize("key", ["sk-SECRET\r123", "sk-SECRÉT–123", "sk-SECRET 123", "sk-SECRET\x00123"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(server, monkeypatch, key):
    if "\x00" in key:
        monkeypatch.setattr(teacher_openai.os, "environ", {"SOME_KEY": key})
    else:
        monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ValueError, match=r"the key in SOME_KEY .* copy it again") as refusal:
        connect(server, api_key_env="SOME_KEY")
    assert "SECR" not in "".join(traceback.format_exception(refusal.value))
    monkeypatch.setenv("EMPTY_KEY", " \n")
    with pytest.raises(ValueError, match="EMPTY_KEY, which is empty"):
        connect(server, api_key_env="EMPTY_KEY")


@pytest.mark.parametrize("code", [400, 401, 403, 500])
def test_a_key_that_the_server_repeats_is_not_shown(server, monkeypatch, caplog, code):
    monkeypatch.setenv("SOME_KEY", KEY)
    teacher = connect(server, api_key_env="SOME_KEY", max_retries=0)
    filler = "x" * 190  # so that the key is cut by the length of the message
    said = [f"Incorrect API key provided: {KEY}.", KEY.replace("/", "\\/"), f"{filler}{KEY}"]
    with caplog.at_level("DEBUG"):
        for words in said:
            server.failures, server.nonsense = [code], [f'{{"error": "{words}"}}'.encode()]
            try:
                teacher.generate(["<user>"], PARAMS)
            except ValueError as error:
                text = "".join(traceback.format_exception(error))
                assert f"HTTP {code}" in text
                assert "right" not in text
        server.failures, server.nonsense = [400], [f'"{KEY}"'.encode()]
        assert teacher.generate(chat("a"), PARAMS) == [""], "a warning tells it"
    assert "right" not in caplog.text


def chat(*texts: str) -> list[str]:
    return [json.dumps([{"role": "user", "content": text}]) for text in texts]


def test_one_prompt_of_six_that_is_refused_is_counted_and_the_others_are_answered(server, tmp_path):
    memory = str(tmp_path / "teacher.jsonl")
    for paid in (7, 2):  # the list of models, and what is not remembered: a refusal costs nothing
        teacher = connect(server, memory=memory)
        answers = teacher.generate(chat("a", "b", "so bad", "c", "d", "e"), PARAMS)
        assert answers == ["A", "B", "", "C", "D", "E"]
        assert [type(answer) is Unanswered for answer in answers] == [False, False, True, False, False, False]
        assert answers[2].reason == "the server refuses the prompt (HTTP 400)"
        assert teacher.account()["prompts refused"] == 1
        assert teacher.usage["requests"] == paid
    assert teacher.generate(chat("as bad", "too bad"), PARAMS) == ["", ""], "others were answered before"
    assert connect(server).generate(chat("as bad"), PARAMS) == [""], "one says nothing about the settings"


def test_a_server_that_refuses_every_prompt_stops_the_run_and_one_prompt_is_named(server):
    with pytest.raises(ValueError, match=r"not answer any of 3 prompts, so the settings are wrong.*HTTP 400.*'bad a'"):
        connect(server).generate(chat("bad a", "bad b", "bad c"), PARAMS)
    teacher = connect(server, num_parallel=1)
    texts = ["good", *(f"bad {number}" for number in range(300))]
    with pytest.raises(ValueError, match=rf"not answer {MOST_IN_A_ROW} prompts in a row.*HTTP 400.*The prompt: 'bad "):
        teacher.generate(chat(*texts), PARAMS)
    assert len(server.seen) < 3 + MOST_IN_A_ROW + 5
    server.failures = [400]
    with pytest.raises(ValueError, match=r"HTTP 400: .*to the pre-query prompt '<user>'"):
        teacher.generate(["<user>"], PARAMS)


def test_the_first_failure_that_is_known_stops_all_requests(server):
    teacher = connect(server, num_parallel=4)
    start = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 404"):
        teacher.generate(chat("slow", *(f"lost {number}" for number in range(300))), PARAMS)
    assert time.monotonic() - start < 10, "the slow one is not waited for"
    time.sleep(0.2)
    assert len(server.seen) < 15, "of 301"


def test_half_a_character_in_a_reply_is_replaced_and_a_line_separator_kept(server, tmp_path):
    reply = rb'{"choices": [{"message": {"content": "hi \ud83d there\u2028 \ud83d\ude00"}, "finish_reason": "stop"}]}'
    memory = str(tmp_path / "teacher.jsonl")
    teacher = connect(server, memory=memory)
    server.nonsense = [reply]
    assert teacher.generate(chat("a"), PARAMS) == ["hi \ufffd there\u2028 \U0001f600"]
    assert connect(server, memory=memory).generate(chat("a"), PARAMS) == ["hi \ufffd there\u2028 \U0001f600"]


SYSTEM = "{% if system %}<system>{{ system }}<end>{% endif %}<user>"


def test_a_pre_query_template_may_take_a_system_turn(server):
    teacher = connect(server, pre_query=SYSTEM)
    settings = {"batch_size": 8, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 1}
    settings |= {"domains": {"a": {"system": "Sing.", "weight": 1}, "b": {"system": "", "weight": 1}}}
    drafts = MagpieDomains(teacher=teacher, suppressed_openings=[], **settings).batch(0)
    assert {(draft.text, draft.task) for draft in drafts} == {("hello", "a"), ("hello", "b")}
    assert {(row["path"], row["prompt"]) for row in server.seen} == {
        ("/v1/completions", "<system>Sing.<end><user>"), ("/v1/completions", "<user>"),
    }  # fmt: skip
    assert connect(server, pre_query="<user>\n").render([], open_turn="user") == "<user>\n"
    with pytest.raises(ValueError, match=r"'<user>', which has no place for a system turn; put that of the model's"):
        connect(server).render([{"role": "system", "content": "Sing."}], open_turn="user")
    with pytest.raises(ValueError, match="after nothing or a system turn"):
        teacher.render([{"role": "user", "content": "a"}], open_turn="user")
    with pytest.raises(ValueError, match=r"teacher.pre_query is no template \('sytem' is undefined\)"):
        connect(server, pre_query="{{ sytem }}<user>")


def test_a_hosted_teacher_cannot_suppress_openings_and_says_what_can(server):
    with pytest.raises(ValueError, match=r"\['#'\], but OpenAITeacher cannot .* give \[\], and add .*MarkupFilter"):
        without_openings(connect(server), ["#"])
