# SPDX-License-Identifier: Apache-2.0
"""Judges as the shipped YAMLs build them, and a server that does not answer: the message names the judge's keys."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parents[3] / "conf"
KEY = "sk-right/123"
JUDGES = {
    "evaluation/judge": "evaluation.task.reward.judge",
    "evaluation/qa_judge": "evaluation.task.reward.judge",
    "evaluation/win_rate": "evaluation.task.reward.judge",
    "reward/judge": "reward.parts.judge.judge",
}


@pytest.fixture(scope="module")
def url():
    """A server with a model and a key."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/stalled"):
                released.wait(20)
            allowed = self.headers["Authorization"] == f"Bearer {KEY}"
            code = 404 if not self.path.startswith("/v1/") else 200 if allowed else 401
            data = json.dumps({"data": [{"id": "m"}]} if code == 200 else {"error": "no"}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    released.set()
    http.shutdown()
    http.server_close()


def clients(node: DictConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every client of a server in a config, with the keys that lead to it."""
    if str(node.get("_target_", "")).endswith(".OpenAITeacher"):
        yield path, node
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(child := node._get_node(key), DictConfig):
            yield from clients(child, f"{path}.{key}")


def shipped() -> dict[str, list[tuple[str, DictConfig]]]:
    files = {path.relative_to(CONF).with_suffix("").as_posix(): path for path in CONF.glob("**/*.yaml")}
    found = {name: list(clients(OmegaConf.load(path), name.split("/")[0])) for name, path in files.items()}
    return {name: nodes for name, nodes in found.items() if nodes}


def test_every_shipped_client_is_told_where_its_settings_stand():
    found = {name: [(path, node.section) for path, node in nodes] for name, nodes in shipped().items()}
    assert found == {name: [(path, path)] for name, path in {**JUDGES, "teacher/openai": "teacher"}.items()}


@pytest.fixture(params=JUDGES)
def build(request, monkeypatch):
    """(keys of a judge, what builds its client)."""
    ((path, node),) = shipped()[request.param]
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def make(**changes):
        return instantiate(node, **{"model": "m", "api_key_env": "JUDGE_KEY", "max_retries": 0} | changes)

    return path, make


def refusal(make, **changes) -> str:
    with pytest.raises(InstantiationException) as refused:
        make(**changes)
    return str(refused.value.__cause__)


def test_a_judge_that_cannot_be_asked_names_its_keys(build, url, monkeypatch):
    path, make = build
    make(base_url=f"{url}/v1")
    away = refusal(make, base_url="http://127.0.0.1:9/v1")
    elsewhere = refusal(make, base_url=f"{url}/api")
    slow = refusal(make, base_url=f"{url}/stalled/v1", timeout_seconds=0.2)
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    locked = refusal(make, base_url=f"{url}/v1")
    for message, problem in (
        (away, "ConnectionError"),
        (elsewhere, "HTTP 404"),
        (slow, "ReadTimeout"),
        (locked, "HTTP 401"),
    ):
        assert message.startswith(f"{path}: the server http://127.0.0.1:")
        assert f"did not answer ({problem}" in message
        assert f"check {path}.base_url, {path}.model, the key in {path}.api_key_env" in message
        assert (f"{path}.timeout_seconds (0.2)" in message) == (problem == "ReadTimeout")
        assert "teacher" not in message
    assert refusal(make, base_url=f"{url}/v1", api_key_env="NO_SUCH_KEY").startswith(
        f"{path}.api_key_env names NO_SUCH"
    )


def test_a_judge_that_is_not_offered_names_its_key(build, url):
    path, make = build
    assert refusal(make, base_url=f"{url}/v1", model="x").endswith(f"offers ['m'], not 'x'; change {path}.model")
