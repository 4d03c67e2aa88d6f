"""Settings that every test runs under: no network, quiet libraries, one thread."""

import gc
import os


# Before any Hugging Face library is imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import torch

from tests.fast import Fast


# The order of float additions then never depends on the machine; tiny models are faster this way too.
torch.set_num_threads(1)

# A busy machine must not fail an example for being slow.
hypothesis.settings.register_profile("trl_apa", deadline=None)
hypothesis.settings.load_profile("trl_apa")


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="a little of each file, and no test that starts a process")


def pytest_configure(config):
    if config.getoption("--fast"):
        config.pluginmanager.register(Fast())


def pytest_collection_finish():
    """Accelerate collects garbage after each run: it need not look through the imported libraries each time."""
    gc.collect()
    gc.freeze()
