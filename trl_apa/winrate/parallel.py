"""Coroutines for many items, some at a time, in a thread of their own; results as they come."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar


T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in another thread than the caller's, which may have its own, as in a notebook.

    What still runs in it at the end is cancelled.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_the_rest(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_the_rest() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def as_they_come(
    loop: asyncio.AbstractEventLoop, work: Callable[[T], Coroutine[Any, Any, R]], items: Sequence[T], workers: int
) -> Iterator[tuple[int, R]]:
    """Number of an item and what `work` returns for it, in the order in which they are done.

    Args:
        loop: of `loop_in_a_thread`.
        work: called for each item.
        items: all of them.
        workers: how many are worked on at a time.

    Raises:
        Exception: the first that `work` raised. No other item is begun after it, but those that were are finished
            and yielded first.
    """
    waiting = iter(enumerate(items))
    running: dict[Future[R], int] = {}
    error: BaseException | None = None
    try:
        while True:
            if error is None:
                for number, item in islice(waiting, workers - len(running)):
                    running[asyncio.run_coroutine_threadsafe(work(item), loop)] = number
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(done)
                if (failed := done.exception()) is None:
                    yield number, done.result()
                else:
                    error = error or failed
    finally:
        for left in running:
            left.cancel()
    if error is not None:
        raise error
