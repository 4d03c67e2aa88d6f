"""Requests to a vLLM server: a failure is kept for all processes, and one request may be sent ahead."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Thread
from typing import Any


Answer = dict[str, Any]


class ServerRequests:
    """Stands before `generate` of TRL's `VLLMClient`, in the one process that talks to the server.

    An error of the server becomes empty rows and `failure`: the other processes wait for an answer, and have to get
    one.

    Args:
        client: TRL's `VLLMClient`, whose `generate` becomes this one's.
    """

    def __init__(self, client: Any):
        self._ask, client.generate = client.generate, self.generate
        self._next: Callable[..., Answer] = self._now
        self._ahead: Future[Answer] | None = None
        self.failure: Exception | None = None
        # The answer that was read last of those to requests that were sent ahead.
        self.last: Answer | None = None

    def generate(self, prompts: list[list[int]], **options: Any) -> Answer:
        """As the client's: token ids of prompts and completions, and log-probs, in a dict."""
        self.failure = None
        try:
            return self._next(prompts, **options)
        except Exception as error:
            self.failure = error
            return without_answers(prompts)

    @contextmanager
    def sending_ahead(self) -> Iterator[None]:
        """Inside, `generate` starts a request in a thread of its own, and gives empty rows."""
        with self._doing(self._start):
            yield

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Inside, `generate` gives the answer to the request that was sent ahead, and waits for it."""
        with self._doing(self._read):
            yield

    def wait(self) -> None:
        """Until the server has answered what was sent ahead."""
        if self._ahead is not None:
            wait([self._ahead])

    def answer(self) -> Answer | None:
        """What the server has answered to the request that was sent ahead; waits for it. None if it failed."""
        self.wait()
        return None if self._ahead is None or self._ahead.exception() is not None else self._ahead.result()

    def hold(self, answer: Answer) -> None:
        """Take an answer from a checkpoint for that of the request that was sent ahead."""
        self._ahead = Future()
        self._ahead.set_result(answer)

    def forget(self) -> None:
        """Wait for what was sent ahead, and leave it unread."""
        self.wait()
        self._ahead = None

    @contextmanager
    def _doing(self, action: Callable[..., Answer]) -> Iterator[None]:
        self._next = action
        try:
            yield
        finally:
            self._next = self._now

    def _now(self, prompts: list[list[int]], **options: Any) -> Answer:
        self.wait()  # the client has one connection
        answer: Answer = self._ask(prompts, **options)
        return answer

    def _start(self, prompts: list[list[int]], **options: Any) -> Answer:
        self.forget()
        future: Future[Answer] = Future()
        self._ahead = future

        def work() -> None:
            try:
                future.set_result(self._ask(prompts, **options))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a server that hangs does not keep the process.
        Thread(target=work, name="vllm-ahead", daemon=True).start()
        return without_answers(prompts)

    def _read(self, prompts: list[list[int]], **options: Any) -> Answer:
        if self._ahead is None:
            raise RuntimeError("nothing was sent ahead")
        future, self._ahead, self.last = self._ahead, None, None
        self.last = future.result()
        return self.last


def without_answers(prompts: list[list[int]]) -> Answer:
    """Empty rows in the form of an answer."""
    return {"prompt_ids": prompts, "completion_ids": [[]] * len(prompts), "logprobs": None}
