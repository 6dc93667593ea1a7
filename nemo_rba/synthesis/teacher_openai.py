# SPDX-License-Identifier: Apache-2.0
"""A teacher behind a server with OpenAI's protocol (vLLM, NIM, SGLang, TensorRT-LLM): it writes, but does not judge."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import requests

from nemo_rba.memory import Memory, fingerprint
from nemo_rba.types import SamplingParams

_WORTH_ANOTHER_TRY = (408, 409, 429)  # and everything from 500 on
_LONGEST_WAIT_SECONDS = 60.0


class OpenAITeacher:
    """Offers ``protocols.Teacher``, not likelihoods. Repeatable only as far as the server honours ``seed``.

    ``usage`` counts requests, tokens as the server counts them (``prompt_tokens``, ``completion_tokens``), replies in
    which it did not (``untold``), and answers that came from ``memory`` (``remembered``).

    Args:
        base_url: up to and with ``/v1``.
        model: name under which the server offers the model.
        api_key_env: environment variable that holds the key; "" for a server that asks for none.
        pre_query: the model's chat template up to the user's words, e.g. ``<|im_start|>user\\n``; "" if instructions
            are not sampled from it.
        stop: text that ends a user's turn, e.g. ``<|im_end|>``.
        num_parallel: requests under way at the same time.
        timeout_seconds: for one request.
        max_retries: further attempts when the server is busy, failing, away or answers nonsense: after the seconds it
            names (Retry-After), else after 1, 2, 4, ... seconds.
        memory: JSONL file of what was asked and answered, so that a restart pays nothing twice; "" for none.

    Raises:
        ValueError: no server, no such model, or a missing or wrong key; later: a request that keeps failing.
    """

    def __init__(self, *, base_url: str, model: str, api_key_env: str, pre_query: str, stop: str, num_parallel: int,
                 timeout_seconds: float, max_retries: int, memory: str):  # fmt: skip
        if num_parallel < 1 or max_retries < 0 or timeout_seconds <= 0:
            raise ValueError(f"teacher: num_parallel={num_parallel}, max_retries={max_retries}, timeout_seconds="
                             f"{timeout_seconds}; expected at least 1, at least 0, above 0")  # fmt: skip
        if api_key_env and api_key_env not in os.environ:
            raise ValueError(f"teacher.api_key_env names {api_key_env}, which is not set; export it, or give ''")
        self._headers = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
        self._url, self._model, self._pre_query, self._stop = base_url.rstrip("/"), model, pre_query, stop
        self._num_parallel, self._timeout, self._max_retries = num_parallel, timeout_seconds, max_retries
        self.usage: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._memory = Memory(path=memory, owner={"answers of": self._url}) if memory else None
        offered = self._request("GET", "/models", None, lambda reply: [entry["id"] for entry in reply["data"]])
        if model not in offered:
            raise ValueError(f"{base_url} offers {offered[:10]}, not {model!r}; change teacher.model")

    def render(self, messages: Sequence[dict[str, str]], *, open_turn: str) -> str:
        """The messages as JSON, as the server applies the chat template itself; or the pre-query template."""
        if open_turn == "assistant":
            return json.dumps(list(messages))
        if messages or not self._pre_query:
            raise ValueError("a hosted teacher opens the user's turn only without messages before it, and with "
                             f"teacher.pre_query, which is {self._pre_query!r}")  # fmt: skip
        return self._pre_query

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """One completion per rendered prompt; "" if the turn never ended."""
        with ThreadPoolExecutor(self._num_parallel) as pool:
            return list(pool.map(lambda i: self._complete(prompts[i], params, i), range(len(prompts))))

    def account(self) -> dict[str, float]:
        """What was asked and paid for in this process."""
        names = {"requests": "requests", "remembered": "replies remembered", "prompt_tokens": "prompt tokens",
                 "completion_tokens": "completion tokens", "untold": "replies without token counts"}  # fmt: skip
        return {label: self.usage[name] for name, label in names.items()}

    def _complete(self, prompt: str, params: SamplingParams, index: int) -> str:
        body = {
            "model": self._model,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": (params.seed + index) % 2**31,  # servers take 32 bits
        }
        if prompt == self._pre_query:
            path, body = "/completions", body | {"prompt": prompt, "stop": [self._stop]}
        else:
            path, body = "/chat/completions", body | {"messages": json.loads(prompt)}
        if self._memory is None:
            return self._request("POST", path, body, _read_choice)
        key = fingerprint(path, body)
        if key in self._memory:
            self._count({"remembered": 1})
        else:
            self._memory.keep({key: self._request("POST", path, body, _read_choice)})
        return self._memory[key]

    def _request(self, method: str, path: str, body: dict | None, read):
        """``read(reply)`` of the first reply that it can read."""
        problem, wait = "", 0.0
        for attempt in range(self._max_retries + 1):
            if attempt:
                time.sleep(min(wait or 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS))
            self._count({"requests": 1})
            try:
                reply = requests.request(
                    method, self._url + path, json=body, headers=self._headers, timeout=self._timeout
                )
                if reply.ok:
                    content = reply.json()
                    usage = content.get("usage")
                    self._count(usage if isinstance(usage, dict) else {"untold": method == "POST"})
                    return read(content)
            except (requests.RequestException, LookupError, TypeError, AttributeError) as error:  # away, or nonsense
                problem, wait = f"{type(error).__name__}: {error}", 0.0
                continue
            problem, wait = f"HTTP {reply.status_code}: {reply.text[:200]}", _retry_after(reply)
            if reply.status_code not in _WORTH_ANOTHER_TRY and reply.status_code < 500:
                break
        raise ValueError(f"the teacher's server {self._url}{path} did not answer ({problem}); check teacher.base_url, "
                         "teacher.model and the key in teacher.api_key_env, then run again")  # fmt: skip

    def _count(self, amounts: dict) -> None:
        with self._counting:
            self.usage.update({name: int(n) for name, n in amounts.items() if isinstance(n, int) and n})


def _read_choice(reply: dict) -> str:
    """Text of a reply; "" where it was cut off."""
    choice = reply["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text.strip() if choice["finish_reason"] == "stop" and text else ""


def _retry_after(reply: requests.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say, or names a date."""
    value = reply.headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdigit() else 0.0
