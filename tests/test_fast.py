"""`make test-fast`: each file has its time, and a test that would start a process is skipped."""

import subprocess
import sys

import pytest

from tests.fast import Fast


pytest_plugins = ["pytester"]
BUSY = """
import time

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""


def outcomes(pytester, seconds, **files):
    pytester.makepyfile(**files)
    return pytester.inline_run("-p", "no:cacheprovider", plugins=[Fast(seconds)])


def names(result):
    passed, skipped, failed = result.listoutcomes()
    assert not failed
    return tuple([report.nodeid.rpartition("::")[2] for report in reports] for reports in (passed, skipped))


def test_the_tests_of_a_file_run_until_its_time_is_used_and_every_file_has_its_own(pytester):
    tests = "".join(f"def test_{number}():\n    burn(0.2)\n" for number in range(4))
    fixture = "import pytest\n@pytest.fixture\ndef slow():\n    burn(0.5)\n"
    fixture += "def test_f(slow):\n    pass\ndef test_g():\n    pass\n"
    result = outcomes(pytester, 0.3, test_a=BUSY + tests, test_b=BUSY + fixture, test_c="def test_c():\n    pass\n")
    passed, skipped = names(result)
    assert passed == ["test_0", "test_1", "test_f", "test_c"]
    assert skipped == ["test_2", "test_3", "test_g"]


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run([sys.executable, '--version'])",
        "subprocess.check_output([sys.executable, '--version'])",
        "multiprocessing.Process(target=print).start()",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
        "torch.multiprocessing.spawn(print, nprocs=1)",
        "concurrent.futures.ProcessPoolExecutor(1).submit(print)",
    ],
)
def test_a_test_that_starts_a_process_is_skipped_whatever_it_catches(pytester, start):
    head = "import concurrent.futures, multiprocessing, subprocess, sys, pytest, torch.multiprocessing\n"
    caught = f"def test_caught():\n    try:\n        {start}\n    except Exception:\n        pass\n"
    fixture = f"@pytest.fixture(scope='module')\ndef made():\n    {start}\ndef test_made(made):\n    pass\n"
    passed, skipped = names(outcomes(pytester, 60, test_a=f"{head}{caught}{fixture}def test_none():\n    pass\n"))
    assert passed == ["test_none"] and skipped == ["test_caught", "test_made"]


def test_processes_start_again_afterwards(pytester, request):
    before = subprocess.Popen.__init__
    names(outcomes(pytester, 60, test_a="def test_a():\n    pass\n"))
    assert subprocess.Popen.__init__ is before
    if not request.config.getoption("--fast"):
        assert subprocess.run([sys.executable, "-c", "pass"], check=True).returncode == 0
