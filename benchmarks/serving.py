"""One side of the speed benchmark in a process of its own: it measures when it is told to. Imports neither TRL."""

import json
import resource
import sys
import time
from collections.abc import Callable


MIB = 2**20


def serve(actions: dict[str, Callable[[], None]]) -> None:
    """Carry out the actions named on standard input, a line each, and answer with what they cost as JSON.

    The answer has CPU seconds of this process, seconds, and the largest memory that it has ever had, MiB.
    """
    print(json.dumps({"ready": sorted(actions)}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        actions[line.strip()]()
        answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": peak_memory()}
        print(json.dumps(answer), flush=True)


def peak_memory() -> float:
    """The largest resident memory of this process up to now, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
