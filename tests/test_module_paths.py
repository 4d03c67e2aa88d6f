"""Older paths of modules lead to the same modules, however they are imported."""

import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trl_apa
from trl_apa.module_paths import NEW_PATHS


ROOT = Path(trl_apa.__file__).resolve().parents[1]


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("old", sorted(NEW_PATHS))
def test_an_older_path_is_the_module_itself(old):
    module = import_module(f"trl_apa.{old}")
    assert module is import_module(f"trl_apa.{NEW_PATHS[old]}")
    assert module.__name__ == module.__spec__.name == f"trl_apa.{NEW_PATHS[old]}"
    parent, _, name = f"trl_apa.{old}".rpartition(".")
    assert getattr(import_module(parent), name) is module


@pytest.mark.parametrize("older_first", [pytest.param(first, marks=pytest.mark.slow) for first in (True, False)])
def test_both_paths_give_one_class_whichever_is_imported_first(older_first):
    lines = [
        "from trl_apa.core import PPODecorators as older",
        "from trl_apa.classic.core import PPODecorators as newer",
    ]
    code = "\n".join([*(lines if older_first else lines[::-1]), "print(older is newer)"])
    assert in_a_new_process(code) == "True"


@pytest.mark.slow
def test_every_way_to_import_works_in_a_new_process():
    code = """
import trl_apa.core as core
from trl_apa import losses
from trl_apa.trainer import APATrainer, PPOTrainer
from trl_apa.trainer.ppo_trainer import PPOTrainer as again
from trl_apa.models.modeling_value_head import AutoModelForCausalLMWithValueHead
from trl_apa.classic import LengthSampler
from trl_apa.evaluation import held_out_metrics
import importlib
assert PPOTrainer is again
assert importlib.reload(core) is core
print(core.__name__, losses.__name__)
"""
    assert in_a_new_process(code) == "trl_apa.classic.core trl_apa.algorithms.losses"


def test_options_pickled_under_their_older_path_load():
    # A checkpoint's `training_args.bin` names the module of its class.
    pickled = pickle.dumps(trl_apa.APAConfig, protocol=0).replace(b"trl_apa.config.apa", b"trl_apa.config")
    assert pickle.loads(pickled) is trl_apa.APAConfig


def test_a_path_that_never_was_is_still_an_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_module("trl_apa.no_such_module")
    with pytest.raises(ModuleNotFoundError):
        import_module("trl_apa.trainer.core")
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from trl_apa.config import no_such_name")


@pytest.mark.parametrize("path", ["trl_apa.paper", "trl_apa.paper.figures"])
def test_the_paths_of_the_paper_s_figures_say_where_they_are(path):
    with pytest.raises(ModuleNotFoundError, match="the paper's figures are in `reproduction`"):
        import_module(path)


def test_the_lazy_packages_load_nothing_heavy():
    code = """
import sys
import trl_apa, trl_apa.config, trl_apa.trainer, trl_apa.classic, trl_apa.evaluation, trl_apa.rollout
import trl_apa.distributed, trl_apa.module_paths
print([name for name in ("torch", "transformers", "trl") if name in sys.modules])
"""
    assert in_a_new_process(code) == "[]"
