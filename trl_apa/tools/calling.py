"""Calls of tools: many rollouts at once, in limited time; whatever a tool does comes back as a text."""

import asyncio
import copy
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl_apa.rollout.event_loop import EVENT_LOOP


# Rollouts whose tools run at the same time.
MOST_AT_ONCE = 32


class Call(NamedTuple):
    """A call that the policy asks for.

    Args:
        name: of the tool.
        function: the tool; None if there is none of that name.
        arguments: keywords, if the policy wrote them as such.
    """

    name: str
    function: Callable[..., Any] | None
    arguments: Any


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Args:
        text: what the policy is told.
        failed: whether there was no such tool, or it raised, or did not answer in time.
        timed_out: whether it did not answer in time. It may still be at work.
    """

    text: str
    failed: bool = False
    timed_out: bool = False


class ToolCaller:
    """Calls tools in threads of their own; coroutine functions share one event loop, which stays, with async rewards.

    Python cannot stop a call: one that exceeds its time is abandoned and ends with the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, lanes: Sequence[Sequence[Call]], timeout: float | None = None) -> list[list[Outcome]]:
        """The outcome of every call.

        Args:
            lanes: the calls of each rollout. Rollouts run in parallel; of one rollout the functions are called in
                order, each after the one before has answered, and then its coroutine functions together.
            timeout: seconds for each call; no limit by default.
        """
        outcomes: list[list[Outcome]] = [[] for _ in lanes]
        numbers = iter(range(len(lanes)))

        def work() -> None:
            while (number := self._next(numbers)) is not None:
                outcomes[number] = self._lane(lanes[number], timeout)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(MOST_AT_ONCE, len(lanes)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def _next(self, numbers: Iterator[int]) -> int | None:
        with self._lock:
            return next(numbers, None)

    def _lane(self, calls: Sequence[Call], timeout: float | None) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        begun: dict[int, Coroutine[Any, Any, Any]] = {}
        for number, call in enumerate(calls):
            if call.function is None:
                outcomes[number] = _failure(f"Tool {call.name} not found.")
            elif not isinstance(call.arguments, dict):
                outcomes[number] = _failure(f"the arguments of {call.name} are no JSON object")
            elif is_async(call.function):
                begun[number] = _outcome_of_coroutine(call)
            else:
                outcomes[number] = _in_a_thread(call, timeout)
        if begun:
            pending = {number: EVENT_LOOP.submit(coroutine) for number, coroutine in begun.items()}
            end = None if timeout is None else time.monotonic() + timeout
            for number, future in pending.items():
                outcomes[number] = self._awaited(calls[number].name, future, end, timeout)
        return [outcomes[number] for number in range(len(calls))]

    def _awaited(self, name: str, future: Future[Outcome], end: float | None, timeout: float | None) -> Outcome:
        try:
            left = None if end is None else min(max(end - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            return future.result(left)
        except (TimeoutError, CancelledError):
            if future.cancel():
                EVENT_LOOP.leave_if_blocked()
            return _too_late(name, timeout)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function)


def _in_a_thread(call: Call, timeout: float | None) -> Outcome:
    outcome: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome_of_call(call)), daemon=True)
    thread.start()
    thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
    return outcome[0] if outcome else _too_late(call.name, timeout)


def _outcome_of_call(call: Call) -> Outcome:
    assert call.function is not None
    try:
        return Outcome(as_text(call.function(**copy.deepcopy(call.arguments))))
    except BaseException as error:  # `sys.exit` of a tool, say, must not end its thread without an answer
        return _failure(_said(error))


async def _outcome_of_coroutine(call: Call) -> Outcome:
    assert call.function is not None
    try:
        return Outcome(as_text(await call.function(**copy.deepcopy(call.arguments))))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # what has a meaning to the event loop must not reach it
        return _failure(_said(error))


def as_text(result: Any) -> str:
    """What a tool returned, as the policy reads it: the text of a list of text blocks, otherwise what `str` says.

    Raises:
        ValueError: for blocks that are no text.
    """
    blocks = isinstance(result, list) and bool(result)
    if blocks and all(isinstance(block, dict) and "type" in block for block in result):
        if other := [str(block["type"]) for block in result if block["type"] != "text"]:
            raise ValueError(f"a block of type {other[0]!r}; only texts can be read")
        result = "".join(str(block.get("text", "")) for block in result)
    # A lone surrogate, half of a character, is no text that can be tokenised.
    return str(result).encode("utf-8", "backslashreplace").decode("utf-8")


def _said(error: BaseException) -> str:
    """The text of an exception, as TRL tells it; its type where there is none."""
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


def _failure(reason: str, timed_out: bool = False) -> Outcome:
    return Outcome(as_text({"error": reason}), failed=True, timed_out=timed_out)


def _too_late(name: str, timeout: float | None) -> Outcome:
    return _failure(f"{name} gave no answer within {timeout} seconds", timed_out=True)
