"""Calls of reward functions: on copies of their arguments, in limited time; the one that fails is named."""

import asyncio
import copy
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from trl_apa.rollout.event_loop import EVENT_LOOP
from trl_apa.values import described_error


# Values of these types cannot be edited in place.
ATOMS = frozenset({str, int, float, bool, bytes, type(None)})
# Seconds that functions with `limits_itself` get beyond the limit, which they keep by themselves, to say what failed.
GRACE = 2.0


class Shared(list[Any]):
    """A column of objects that reward functions get as they are, not as copies: connections, environments."""


class _Stopped(Exception):
    """Nothing more is to be called; why is kept elsewhere."""


class _Progress:
    """State shared by the thread that calls functions and the one that waits for it."""

    def __init__(self) -> None:
        self.at_work = "?"
        self.stopped = threading.Event()
        self.awaited: Future[None] | None = None


def failure(name: str, error: BaseException) -> BaseException:
    """What to raise in place of `error`, which a reward function has raised: an exception that names the function.

    Never an exception with a meaning of its own to loops, tasks or processes (`StopIteration`, `CancelledError`,
    `GeneratorExit`, `SystemExit`). Ctrl-C stays one, since it may be the user's.
    """
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"reward function {name} was interrupted")
    return RuntimeError(f"reward function {name} failed: {described_error(error)}")


def call(name: str, function: Callable[..., Any], arguments: Mapping[str, list[Any]]) -> Any:
    """What one function answers to copies of the arguments, which it may edit.

    Raises:
        RuntimeError, KeyboardInterrupt: naming the function, whatever it has raised.
    """
    try:
        return function(**{argument: _own(column) for argument, column in arguments.items()})
    except BaseException as error:
        raise failure(name, error) from error


def call_functions(
    functions: Sequence[tuple[str, Callable[..., Any]]],
    arguments: Mapping[str, list[Any]],
    timeout: float | None = None,
) -> list[Any]:
    """What each function answers; coroutine functions run together, after the others were called.

    In a separate thread if the time is limited, since Python cannot stop a call. A call that hangs is abandoned
    and ends with the process; it begins with no other function.

    Args:
        functions: names and functions.
        arguments: keywords; each function gets its own copies.
        timeout: seconds for all of them; no limit by default.

    Raises:
        RuntimeError, KeyboardInterrupt: naming the function that failed.
        TimeoutError: naming the function that was at work when the time was up.
    """
    progress = _Progress()
    if timeout is None:
        return _call_all(functions, arguments, progress)
    try:
        grace = GRACE if any(getattr(function, "limits_itself", False) for _, function in functions) else 0.0
        answers: list[Any] = _in_a_thread(lambda: _call_all(functions, arguments, progress), progress, timeout, grace)
    finally:
        if progress.awaited is not None and progress.awaited.cancel():
            EVENT_LOOP.leave_if_blocked()
    return answers


def _own(column: list[Any]) -> list[Any]:
    return column if isinstance(column, Shared) else [private_copy(value) for value in column]


def private_copy(value: Any) -> Any:
    """A copy that can be edited safely; objects that cannot be copied (such as a connection) are shared."""
    if type(value) in ATOMS:
        return value
    if type(value) is list and ATOMS.issuperset(map(type, value)):
        return list(value)  # token ids: one by one they would take long
    try:
        return copy.deepcopy(value)
    except Exception:
        pass
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: private_copy(element) for key, element in value.items()}
    if type(value) in (list, tuple):
        return type(value)([private_copy(element) for element in value])
    return value


def _call_all(
    functions: Sequence[tuple[str, Callable[..., Any]]], arguments: Mapping[str, list[Any]], progress: _Progress
) -> list[Any]:
    answers: list[Any] = []
    try:
        for name, function in functions:
            if progress.stopped.is_set():
                raise _Stopped
            progress.at_work = name
            answers.append(call(name, function, arguments))
        awaited = {number: answer for number, answer in enumerate(answers) if inspect.isawaitable(answer)}
        progress.at_work = ", ".join(functions[number][0] for number in awaited)
        if awaited and progress.stopped.is_set():
            raise _Stopped
    except BaseException:
        for answer in answers:
            if inspect.iscoroutine(answer):
                answer.close()  # Python warns of one that never began
        raise
    if awaited:
        for number, answer in _await_all(awaited, [name for name, _ in functions], progress).items():
            answers[number] = answer
    return answers


def _await_all(calls: Mapping[int, Awaitable[Any]], names: Sequence[str], progress: _Progress) -> dict[int, Any]:
    """The results of calls that run together, under their numbers; the first failure ends all."""
    answers: dict[int, Any] = {}
    failures: list[tuple[str, BaseException]] = []

    async def settle(number: int, pending: Awaitable[Any]) -> None:
        try:
            answers[number] = await pending
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # as a task, by another function perhaps
            failures.append((names[number], error))
            raise _Stopped from error  # what has a meaning to the event loop must not reach it

    async def settle_all() -> None:
        tasks = [asyncio.ensure_future(settle(number, pending)) for number, pending in calls.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    try:
        _run(settle_all(), progress)
    except BaseException as error:
        unanswered = ", ".join(names[number] for number in calls if number not in answers)
        name, cause = (unanswered, error) if isinstance(error, KeyboardInterrupt) or not failures else failures[0]
        raise failure(name, cause) from cause
    return answers


def _run(coroutine: Coroutine[Any, Any, None], progress: _Progress) -> None:
    """To its end, in the event loop that async tools share."""
    progress.awaited = EVENT_LOOP.submit(coroutine)
    try:
        progress.awaited.result()
    except BaseException:  # Ctrl-C, say
        progress.awaited.cancel()
        raise


def _in_a_thread(
    work: Callable[[], Any], progress: _Progress, seconds: float | None = None, grace: float = 0.0
) -> Any:
    """The result of `work` if it comes within `seconds`, or `grace` seconds later.

    `progress.stopped` tells what is left behind to begin with nothing more.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(None if seconds is None else min(seconds + grace, threading.TIMEOUT_MAX))
    finally:
        progress.stopped.set()
    if not outcome:
        raise TimeoutError(
            f"reward function {progress.at_work} gave no answer within reward_timeout={seconds} seconds"
        )
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
