# SPDX-License-Identifier: Apache-2.0
"""A language model behind a server with OpenAI's protocol (vLLM, NIM, SGLang, TensorRT-LLM): it writes, but does not
judge tokens. It is a teacher, or the judge that grades answers."""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import requests
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from nemo_rba.memory import Memory, fingerprint
from nemo_rba.synthesis.unanswered import Refusals, Unanswered, shown
from nemo_rba.types import SamplingParams

_WORTH_ANOTHER_TRY = (408, 409, 429)  # and everything from 500 on
_ABOUT_THE_PROMPT = (400, 413, 422)  # content policy, too long
_LONGEST_WAIT_SECONDS = 60.0
_HALF = re.compile("[\\ud800-\\udfff]")  # of a character beyond the first 65,536; cannot be written as UTF-8
_WRONG_ADDRESS = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema)


class OpenAITeacher:
    """Offers ``protocols.Teacher``, not likelihoods. Repeatable only as far as the server honours ``seed``.

    ``usage`` counts requests, tokens as the server counts them (``prompt_tokens``, ``completion_tokens``), replies in
    which it did not (``untold``), and answers that came from ``memory`` (``remembered``). What was paid for belongs to
    the model's name, the decoding and the prompt: the address of the server may change.

    Args:
        section: where these settings stand in the config, e.g. "teacher", as messages name the key to change.
        base_url: up to and with ``/v1``.
        model: name under which the server offers the model.
        api_key_env: environment variable that holds the key; "" for a server that asks for none.
        pre_query: the model's chat template up to the user's words, e.g. ``<|im_start|>user\\n``; "" if instructions
            are not sampled from it. It is a Jinja template like the model's own, of ``system``, the text of a system
            turn or "": ``{% if system %}<|im_start|>system\\n{{ system }}<|im_end|>\\n{% endif %}`` may stand first.
        stop: text that ends a user's turn, e.g. ``<|im_end|>``.
        num_parallel: requests under way at the same time.
        timeout_seconds: for one request.
        max_retries: further attempts when the server is busy, failing, away or answers nonsense: after the seconds it
            names (Retry-After), else after 1, 2, 4, ... seconds.
        memory: JSONL file of what was asked and answered, so that a restart pays nothing twice; "" for none.

    Raises:
        ValueError: no server, no such model, a missing or wrong key, a ``pre_query`` that is no template or has no
            ``stop``; later: a request that keeps failing, or a server that refuses every prompt.
    """

    FREE_KEYS = (  # see HFTeacher
        "section", "base_url", "api_key_env", "num_parallel", "timeout_seconds", "max_retries", "memory"
    )  # fmt: skip

    def __init__(
        self, *, section: str, base_url: str, model: str, api_key_env: str, pre_query: str, stop: str,
        num_parallel: int, timeout_seconds: float, max_retries: int, memory: str,
    ):  # fmt: skip
        if num_parallel < 1 or max_retries < 0 or timeout_seconds <= 0:
            raise ValueError(f"{section}: num_parallel={num_parallel}, max_retries={max_retries}, timeout_seconds="
                             f"{timeout_seconds}; expected at least 1, at least 0, above 0")  # fmt: skip
        if pre_query and not stop:
            raise ValueError(
                f"{section}.stop is '', but {section}.pre_query is not; expected what ends the user's turn"
            )
        self._section = section
        self._pre_query, self._template, self._stop = pre_query, _template(pre_query, section), stop
        self._key = _read_key(api_key_env, section)
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._url, self._model = base_url.rstrip("/"), model
        self._num_parallel, self._timeout, self._max_retries = num_parallel, timeout_seconds, max_retries
        self.usage: Counter[str] = Counter()
        self._counting, self._refusals = threading.Lock(), Refusals(section)
        self._memory = Memory(path=memory, owner={"holds": "answers of servers"}) if memory else None  # keys: the model
        offered = self._request("GET", "/models", None, lambda reply: [entry["id"] for entry in reply["data"]])
        if model not in offered:
            raise ValueError(self._hidden(f"{base_url} offers {offered[:10]}, not {model!r}; change {section}.model"))

    def render(self, messages: Sequence[dict[str, str]], *, open_turn: str) -> str:
        """The messages as JSON, as the server applies the chat template itself; or the pre-query template."""
        if open_turn == "assistant":
            return json.dumps(list(messages))
        if not self._pre_query or [message["role"] for message in messages] not in ([], ["system"]):
            raise ValueError("a hosted model opens the user's turn after nothing or a system turn, and with "
                             f"{self._section}.pre_query, which is {self._pre_query!r}")  # fmt: skip
        system = messages[0]["content"] if messages else ""
        text = self._template.render(system=system)
        if system not in text:
            raise ValueError(
                f"{self._section}.pre_query is {self._pre_query!r}, which has no place for a system turn; put that of "
                "the model's chat template before it, as {% if system %}...{{ system }}...{% endif %}"
            )
        return text

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """One completion per rendered prompt; "" if the turn never ended.

        A prompt that the server refuses (HTTP 400, 413, 422) gets ``Unanswered``, which is "" too.

        Raises:
            ValueError: at the first failure that is known; requests that are under way are not waited for.
        """
        given_up = threading.Event()
        pool = ThreadPoolExecutor(self._num_parallel)
        try:
            asked = [
                pool.submit(self._complete, prompt, params, index, given_up) for index, prompt in enumerate(prompts)
            ]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            if failed := [future for future in asked if future in done and future.exception()]:
                raise failed[0].exception()
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
        completions = [future.result() for future in asked]
        if completions and all(isinstance(completion, Unanswered) for completion in completions):
            self._refusals.check_call([_said(prompt) for prompt in prompts])
        return completions

    def account(self) -> dict[str, float]:
        """What was asked and paid for in this process, and how many prompts were refused, if any."""
        names = {"requests": "requests", "remembered": "replies remembered", "prompt_tokens": "prompt tokens",
                 "completion_tokens": "completion tokens", "untold": "replies without token counts"}  # fmt: skip
        refused = {"prompts refused": self._refusals.count} if self._refusals.count else {}
        return {label: self.usage[name] for name, label in names.items()} | refused

    def _complete(self, prompt: str, params: SamplingParams, index: int, given_up: threading.Event) -> str:
        body = {
            "model": self._model,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": (params.seed + index) % 2**31,  # servers take 32 bits
        }
        if _is_chat(prompt):
            path, body = "/chat/completions", body | {"messages": json.loads(prompt)}
        else:
            path, body = "/completions", body | {"prompt": prompt, "stop": [self._stop]}
        key = fingerprint(path, body)
        if self._memory is not None and key in self._memory:
            self._count({"remembered": 1})
            self._refusals.answered()
            return self._memory[key]
        try:
            answer = self._ask(path, body, prompt, given_up)
        except BaseException:
            given_up.set()
            raise
        if self._memory is not None and not isinstance(answer, Unanswered):
            self._memory.keep({key: answer})
        return answer

    def _ask(self, path: str, body: dict, prompt: str, given_up: threading.Event) -> str:
        try:
            answer = self._request("POST", path, body, _read_choice, given_up)
        except _Refused as refusal:
            problem = str(refusal)
            if not _is_chat(prompt):  # the pre-query prompt is the same for all
                raise self._failure(path, f"{problem}, to the pre-query prompt {shown(prompt)}") from None
            self._refusals.check_row(_said(prompt), problem)
            reason = f"the server refuses the prompt (HTTP {refusal.status})"
            return self._refusals.refuse(_said(prompt), reason=reason, problem=problem)
        self._refusals.answered()
        return answer

    def _request(
        self, method: str, path: str, body: dict | None, read: Callable, given_up: threading.Event | None = None
    ):
        """``read(reply)`` of the first reply that it can read; nothing is asked once ``given_up`` is set."""
        problem, pause = "another request failed", 0.0
        for attempt in range(self._max_retries + 1):
            if attempt:
                time.sleep(min(pause or 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS))
            if given_up is not None and given_up.is_set():
                break
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
                problem, pause = f"{type(error).__name__}: {error}", 0.0
                if isinstance(error, _WRONG_ADDRESS):
                    break
                continue
            problem, pause = f"HTTP {reply.status_code}: {self._hidden(reply.text)[:200]}", _retry_after(reply)
            if method == "POST" and reply.status_code in _ABOUT_THE_PROMPT:
                raise _Refused(problem, reply.status_code)
            if reply.status_code not in _WORTH_ANOTHER_TRY and reply.status_code < 500:
                break
        raise self._failure(path, problem)

    def _failure(self, path: str, problem: str) -> ValueError:
        section = self._section
        check = [f"{section}.base_url", f"{section}.model", f"the key in {section}.api_key_env"]
        check += [f"{section}.timeout_seconds ({self._timeout:g})"] if "Timeout" in problem else []
        return ValueError(self._hidden(
            f"{section}: the server {self._url}{path} did not answer ({problem}); check {', '.join(check)}, then run "
            "again"
        ))  # fmt: skip

    def _hidden(self, text: str) -> str:
        """A message without the key, which some servers repeat."""
        quoted = json.dumps(self._key)[1:-1]  # as it stands in JSON
        for secret in {self._key, quoted, quoted.replace("/", "\\/")} - {""}:
            text = text.replace(secret, "<the key>")
        return text

    def _count(self, amounts: dict) -> None:
        with self._counting:
            self.usage.update({name: int(n) for name, n in amounts.items() if isinstance(n, int) and n})


class _Refused(Exception):
    """A server does not want to answer this prompt."""

    def __init__(self, problem: str, status: int):
        super().__init__(problem)
        self.status = status


def _is_chat(prompt: str) -> bool:
    """Whether ``render`` wrote messages and not an opened user's turn; no chat template begins like that."""
    return prompt.startswith('[{"')


def _said(prompt: str) -> str:
    """The last message of a prompt."""
    return json.loads(prompt)[-1]["content"]


def _read_key(name: str, section: str) -> str:
    """The key in an environment variable, which no message may show; "" if it has no name."""
    if not name:
        return ""
    if name not in os.environ:
        raise ValueError(f"{section}.api_key_env names {name}, which is not set; export it, or give ''")
    key = os.environ[name].strip()
    if not key:
        raise ValueError(f"{section}.api_key_env names {name}, which is empty; export the key, or give ''")
    wrong = [place for place, character in enumerate(key, start=1) if not "!" <= character <= "~"]
    if wrong:
        raise ValueError(
            f"the key in {name} ({section}.api_key_env) cannot be sent: number {wrong[0]} of its {len(key)} characters "
            "is a blank, a control character or no ASCII; copy it again"
        )
    return key


def _template(pre_query: str, section: str) -> Template:
    environment = SandboxedEnvironment(keep_trailing_newline=True, undefined=StrictUndefined)
    try:
        template = environment.from_string(pre_query)
        template.render(system="")
    except TemplateError as error:
        raise ValueError(f"{section}.pre_query is no template ({error}): {pre_query!r}; expected text, in which "
                         "{{ system }} may stand for a system turn") from error  # fmt: skip
    return template


def _read_choice(reply: dict) -> str:
    """Text of a reply, with U+FFFD for half a character (a lone surrogate); "" where it was cut off."""
    choice = reply["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return _HALF.sub("\ufffd", text).strip() if choice["finish_reason"] == "stop" and text else ""


def _retry_after(reply: requests.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say, or names a date."""
    value = reply.headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdecimal() else 0.0
