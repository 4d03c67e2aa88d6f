"""Measures peak memory: on a GPU with torch's counters, on a CPU from its allocator's records."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(work: Callable[[], object], device: torch.device | None = None) -> int:
    """Most bytes that were held at once for `work`, beyond what was held before it.

    Args:
        work: is called once.
        device: where it computes; by default on the CPU.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent():
        profiled.start()
    try:
        work()
    finally:
        with _silent():
            profiled.stop()
    profiler: Any = profiled.profiler  # torch's own annotations lack the records of memory
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes past Python to stderr that it starts and stops."""
    if sys.stderr is not None:
        sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
