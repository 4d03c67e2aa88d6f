"""The event loop of a process: coroutine functions that are tools, environments or rewards run in one and the same."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar


Result = TypeVar("Result")
# Seconds in which an event loop that nothing blocks answers.
LOOP_ANSWERS_IN = 1.0


class SharedLoop:
    """An event loop in a thread of its own, which stays: sessions, locks and futures are of use from call to call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Begin with a coroutine; its result comes in the future, from any thread but the loop's own."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._serve, args=(self._loop,), name="event_loop", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def leave_if_blocked(self) -> None:
        """Take another loop for the next calls if a coroutine that never awaits holds this one."""
        with self._lock:
            loop = self._loop
        if loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(LOOP_ANSWERS_IN)
        except TimeoutError:
            with self._lock:
                if self._loop is loop:
                    self._loop = None

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until a coroutine stops the loop: what is pending is cancelled then, so that nobody waits for ever."""
        try:
            loop.run_forever()
        finally:
            with self._lock:
                if self._loop is loop:
                    self._loop = None
            loop.run_until_complete(asyncio.sleep(0))  # begins with what was submitted before
            while tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(tasks, timeout=LOOP_ANSWERS_IN))
            loop.close()

    def _forget(self) -> None:
        """In a forked process, which has no thread of the loop's."""
        self._loop, self._lock = None, threading.Lock()


EVENT_LOOP = SharedLoop()
