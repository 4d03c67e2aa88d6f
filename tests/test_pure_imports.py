"""The mathematics depends on torch alone, so that it can be read, tested and used without a trainer."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


MATHEMATICS = (
    "masking",
    "kl",
    "advantages",
    "estimators",
    "named",
    "normalizers",
    "learned_normalizers",
    "reference_rewards",
    "rewards",
    "losses",
)
PURE = (*(f"algorithms.{name}" for name in MATHEMATICS), "values", "rollout.batch", "rollout.shared_prompts")
HEAVY = {"transformers", "trl", "accelerate", "peft", "datasets", "tokenizers"}

PROBE = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1].split(","):
    importlib.import_module("trl_apa." + name)
    loaded[name] = sorted({module.split(".")[0] for module in sys.modules})
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded_after():
    """Top-level modules that a fresh process holds after importing each pure module, one after the other."""
    command = [sys.executable, "-c", PROBE, ",".join(PURE)]
    root = Path(__file__).parent.parent
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


@pytest.mark.parametrize("name", PURE)
def test_importing_it_loads_no_hugging_face_library(loaded_after, name):
    assert "torch" in loaded_after[name]
    assert not HEAVY & set(loaded_after[name])


@pytest.mark.parametrize("name", PURE)
def test_it_imports_only_torch_and_the_standard_library(name):
    # also the imports inside functions, which importing the module does not run
    spec = importlib.util.find_spec(f"trl_apa.{name}")
    imported = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("trl_apa." + node.module if node.level else node.module)
    allowed = {f"trl_apa.{pure}" for pure in PURE}
    others = {module.split(".")[0] for module in imported - allowed}
    assert others <= {"torch", *sys.stdlib_module_names}
