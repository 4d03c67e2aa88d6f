"""A judge behind an OpenAI-compatible endpoint: OpenAI's own, or a server of your own (vLLM, llama.cpp, ...)."""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from trl_apa.redaction import without_secrets, without_secrets_in_error
from trl_apa.redaction.patterns import HIDDEN
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.parallel import as_they_come, loop_in_a_thread
from trl_apa.winrate.prompting import IN_WORDS, judging_text
from trl_apa.winrate.replies import NotACompletion, Reading, read_completion
from trl_apa.winrate.replies import read_verdict as read_verdict


OPENAI_URL = "https://api.openai.com/v1"
# Fields of the request that the judge sets, or of whose replies it would read one part; with the value they may have.
OWN_FIELDS = {"model": None, "messages": None, "stream": False, "n": 1}
# Codes of errors that are about the one question: another may get an answer.
ABOUT_THE_QUESTION = ("content_filter", "content_policy_violation", "context_length_exceeded")
EXCERPT = 300


class JudgeError(RuntimeError):
    """The endpoint gave no answer, retries included, or one that is no chat completion."""


class _Unreadable(Exception):
    """The endpoint's answer, which is no chat completion although its status is that of a success."""

    def __init__(self, response: Any, problem: str):
        super().__init__(problem)
        self.response = response


class ChatJudge:
    """Asks a chat model about many things, some at a time, and reads its replies.

    The `openai` package waits and asks again, longer each time, after time-outs, lost connections and the answers
    408, 409, 429 and 5xx.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, `http://127.0.0.1:8000/v1` say; OpenAI's by default.
        api_key_env: the environment variable that holds the key. It is read here and nowhere else; with a `base_url`
            of your own it may be unset.
        request: more fields of the request, over `{"temperature": 0}`; None leaves a field out.
        max_retries: how often a request is made again.
        timeout: seconds for one request, from connecting to the last byte of its answer. One that took longer is
            given up, and made again as `max_retries` says.
        workers: requests at a time.

    Raises:
        ImportError: without the `openai` package.
        ValueError: if the endpoint is OpenAI's and there is no key, or an option is out of range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        request: dict[str, Any] | None = None,
        max_retries: int = 6,
        timeout: float = 120.0,
        workers: int = 8,
    ):
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError("--judge openai needs the openai package: pip install 'trl-apa[judge]'") from error
        _check_options(base_url, request or {}, max_retries, timeout, workers)
        self._key = _read_key(api_key_env)
        if not self._key and base_url is None:
            raise ValueError(f"the environment variable {api_key_env} is not set: it should contain the key")
        self.model, self.workers = model, workers
        self.base_url, self.max_retries, self.timeout = base_url, max_retries, timeout
        fields = {"temperature": 0, **(request or {})}
        self.request = {name: value for name, value in fields.items() if value is not None}
        self.identity = {"judge": "openai", "model": model, "base_url": base_url, "request": self.request}

    def text_about(self, item: Any) -> str:
        """What the model is asked about an item."""
        raise NotImplementedError

    def read(self, body: bytes) -> Reading:
        """What a chat completion says.

        Raises:
            NotACompletion: if `body` is none.
        """
        raise NotImplementedError

    def readings(self, items: Sequence[Any]) -> Iterator[tuple[int, Reading]]:
        """Number of an item and what the reply says of it, as they come.

        Raises:
            JudgeError: after the replies that came, if an item got none that can be read. It says what the endpoint
                answered, and does not hold the key.
        """
        from openai import OpenAIError

        failed: Exception | None = None
        try:
            yield from self._readings(items)
        except (OpenAIError, _Unreadable) as error:
            failed = error
        # Raised out here it does not carry along the error in which the key may stand.
        if failed is not None:
            raise JudgeError(self._failure(failed))

    def _readings(self, items: Sequence[Any]) -> Iterator[tuple[int, Reading]]:
        from trl_apa.winrate.client import bounded_client

        with loop_in_a_thread() as loop:
            # The package refuses to start without a key, which many servers of one's own do not ask for.
            client = bounded_client(self._key or "none", self.base_url or OPENAI_URL, self.max_retries, self.timeout)
            try:
                yield from as_they_come(loop, partial(self._reading, client), items, self.workers)
            finally:
                asyncio.run_coroutine_threadsafe(client.close(), loop).result()

    async def _reading(self, client: Any, item: Any) -> Reading:
        from openai import BadRequestError

        messages = [{"role": "user", "content": self.text_about(item)}]
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, extra_body=self.request
            )
        except BadRequestError as error:
            if error.code not in ABOUT_THE_QUESTION:
                raise
            return Reading(None, f"refused by the endpoint ({error.code})")
        try:
            return self.read(raw.http_response.content)
        except NotACompletion as error:
            raise _Unreadable(raw.http_response, str(error)) from None

    def _failure(self, error: Exception) -> str:
        """What went wrong, for people. All that an endpoint says comes into a message here, and nowhere else."""
        from openai import APIConnectionError

        tries = f" (asked {self.max_retries + 1} times)" if isinstance(error, APIConnectionError) else ""
        return f"{self.model} gave no answer: " + _excerpt(self._without_secrets(_description(error))) + tries

    def _without_secrets(self, text: str) -> str:
        """Servers may repeat the key that they refuse."""
        text = text.replace(self._key, HIDDEN) if self._key else text
        return without_secrets_in_error(text, {"api_key": self._key}, self.identity)


class OpenAIJudge(ChatJudge):
    """Asks a chat model to compare two answers in words and to end with its verdict.

    Args:
        model, options: see [`ChatJudge`].

    Attributes:
        without_verdict: why replies had no verdict, and how many each.

    Raises:
        ImportError, ValueError: as [`ChatJudge`].
    """

    sees_order = True

    def __init__(self, model: str, *args: Any, **options: Any):
        super().__init__(model, *args, **options)
        self.without_verdict: Counter[str] = Counter()
        self.identity["text"] = self.text_about(Question("", "", "", ""))

    def text_about(self, item: Question) -> str:
        """The two answers, and what to do."""
        return judging_text(item, IN_WORDS)

    def read(self, body: bytes) -> Reading:
        """The verdict, see `replies.read_completion`."""
        return read_completion(body)

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Verdicts as they come; None where the reply has none.

        Raises:
            JudgeError: after the verdicts that came, see `readings`.
        """
        for number, reading in self.readings(questions):
            if reading.verdict is None:
                self.without_verdict[reading.reason] += 1
            yield number, reading.verdict


def _check_options(
    base_url: str | None, request: dict[str, Any], max_retries: int, timeout: float, workers: int
) -> None:
    if base_url is not None and not _is_address(base_url):
        raise ValueError(f"base_url={without_secrets(base_url)!r}: it should be http://HOST... or https://HOST...")
    for name, allowed in OWN_FIELDS.items():
        if request.get(name) not in (None, allowed):
            raise ValueError(f"request has {name}={request[name]!r}, which the judge sets itself")
    try:
        json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"request={without_secrets(request)!r} cannot be sent as JSON: {error}") from error
    if workers < 1:
        raise ValueError(f"workers={workers}: it should be at least 1")
    if max_retries < 0:
        raise ValueError(f"max_retries={max_retries}: it should not be negative")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout={timeout}: it should be a number of seconds above 0")


def _is_address(text: str) -> bool:
    from trl_apa.winrate.client import httpx

    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        return False
    return url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 2**16


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {variable} should hold a key: it has characters that no key has")
    return key


def _description(error: Exception) -> str:
    """The error's kind, and what the endpoint said, all of it."""
    from openai import APIConnectionError, APIStatusError

    kind = type(error).__name__
    if isinstance(error, _Unreadable):
        status = error.response.status_code
        return (
            f"{_asked(error.response)} answered HTTP {status}, but no chat completion ({error}){_body(error.response)}"
        )
    if isinstance(error, APIStatusError):
        return f"{kind}: {_asked(error.response)} answered HTTP {error.response.status_code}{_body(error.response)}"
    if isinstance(error, APIConnectionError) and error.__cause__ is not None:
        return f"{kind}: {error.request.url}: {type(error.__cause__).__name__}: {error.__cause__}"
    return f"{kind}: {error}"


def _asked(response: Any) -> str:
    """The URL that answered, and the requested one if it differs."""
    first = response.history[0].url if response.history else response.url
    return f"{response.url}" + (f", to which {first} redirects," if first != response.url else "")


def _body(response: Any) -> str:
    text = response.content.decode("utf-8", "replace")
    return f": {text}" if text.strip() else ""


def _excerpt(text: str) -> str:
    """The beginning, in one line, without control characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}..."
