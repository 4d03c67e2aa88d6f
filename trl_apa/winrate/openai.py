"""A judge behind an OpenAI-compatible endpoint: OpenAI's own, or a server of your own (vLLM, llama.cpp, ...)."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from trl_apa.redaction import without_secrets_in_error
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.prompting import IN_WORDS, VERDICTS, judging_text


class JudgeError(RuntimeError):
    """The endpoint gave no answer, retries included."""


class OpenAIJudge:
    """Asks a chat model to compare the answers in words and to end with its verdict.

    The `openai` package waits and asks again, longer each time, after time-outs, lost connections and the answers
    408, 409, 429 and 5xx.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, `http://127.0.0.1:8000/v1` say; OpenAI's by default.
        api_key_env: the environment variable that holds the key. It is read here and nowhere else; with a `base_url`
            of your own it may be unset.
        request: more fields of the request, over `{"temperature": 0}`; None leaves a field out.
        max_retries: how often a request is made again.
        timeout: seconds for one request.
        workers: requests at a time.

    Raises:
        ImportError: without the `openai` package.
        ValueError: if the endpoint is OpenAI's and there is no key.
    """

    sees_order = True

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
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("--judge openai needs the openai package: pip install 'trl-apa[judge]'") from error
        if workers < 1:
            raise ValueError(f"workers={workers}: it should be at least 1")
        self._key = os.environ.get(api_key_env, "")
        if not self._key and base_url is None:
            raise ValueError(f"the environment variable {api_key_env} is not set: it should hold the key")
        self.model, self.workers = model, workers
        fields = {"temperature": 0, **(request or {})}
        self.request = {name: value for name, value in fields.items() if value is not None}
        text = judging_text(Question("", "", "", ""), IN_WORDS)
        self.identity = {
            "judge": "openai",
            "model": model,
            "base_url": base_url,
            "request": self.request,
            "text": text,
        }
        # The package refuses to start without a key, which many servers of one's own do not ask for.
        self._client = OpenAI(
            api_key=self._key or "none",
            base_url=base_url or "https://api.openai.com/v1",
            max_retries=max_retries,
            timeout=timeout,
        )

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Verdicts as they come; None where the reply has none.

        Raises:
            JudgeError: after the verdicts that came, if a question got no answer at all. It does not hold the key.
        """
        error: BaseException | None = None
        pool = ThreadPoolExecutor(self.workers)
        try:
            numbers = {pool.submit(self._verdict, question): number for number, question in enumerate(questions)}
            for future in as_completed(numbers):
                if future.cancelled():
                    continue
                if (failed := future.exception()) is None:
                    yield numbers[future], future.result()
                elif error is None:
                    error = failed
                    for waiting in numbers:
                        waiting.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if error is not None:
            raise JudgeError(self._without_key(f"{self.model} gave no answer: {type(error).__name__}: {error}"))

    def _verdict(self, question: Question) -> str | None:
        text = judging_text(question, IN_WORDS)
        reply = self._client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": text}], **self.request
        )
        return read_verdict(reply.choices[0].message.content or "")

    def _without_key(self, text: str) -> str:
        """Servers may repeat the key that they refuse, or a part of it."""
        return without_secrets_in_error(text, {"api_key": self._key}, self.identity)


def read_verdict(reply: str) -> str | None:
    """The last `[[A]]`, `[[B]]` or `[[C]]` of a reply, as a verdict; None if there is none."""
    letters = re.findall(r"\[\[([ABC])\]\]", reply)
    return VERDICTS[letters[-1]] if letters else None
