"""`make test-fast`: a part of every test file, chosen while it runs, so that no list of quick tests has to be kept.

A file has `SECONDS` of CPU time; its tests run in their order until these are used, and the others are skipped. A test
that starts a process is skipped: what takes long in this suite is to import the libraries anew.
"""

import multiprocessing.process
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest


SECONDS = 0.6


class Fast:
    """The plugin that `--fast` registers, in each process of pytest."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.used: Counter[Path] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Count the CPU time of the test and of the fixtures that it is the first to need."""
        start = time.process_time()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
            try:
                return (yield)
            finally:
                self.used[item.path] += time.process_time() - start

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip the test if its file has had its time."""
        if self.used[item.path] > self.seconds:
            pytest.skip(f"the tests of its file before it took {self.seconds:g} s of CPU time")


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of what starts a process."""
    pytest.skip("it starts a process")
