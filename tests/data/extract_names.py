"""Writes `classic_names.json` beside it: the public names of the modules of TRL 0.11.4 that PPO's users import from.

pip download --no-deps --only-binary :all: trl==0.11.4 -d WHEELS
python tests/data/extract_names.py WHEELS/trl-0.11.4-py3-none-any.whl
"""

import ast
import json
import sys
import zipfile
from pathlib import Path


MODULES = (
    "core",
    "env_utils",
    "environment.base_environment",
    "extras.best_of_n_sampler",
    "import_utils",
    "models.modeling_base",
    "models.modeling_value_head",
    "models.utils",
    "trainer.base",
    "trainer.ppo_config",
    "trainer.ppo_trainer",
    "trainer.utils",
)
PACKAGES = ("", "environment", "extras", "models", "trainer")


def defined(source: str) -> list[str]:
    """Public classes, functions and constants of a module."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return sorted({name for name in names if not name.startswith("_")})


def exported(source: str) -> list[str]:
    """Names in the `_import_structure` of a lazy package, those of its optional parts left out."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_import_structure":
            return sorted({name for names in ast.literal_eval(node.value).values() for name in names})
    raise ValueError("no _import_structure")


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {
            module: defined(archive.read(f"trl/{module.replace('.', '/')}.py").decode()) for module in MODULES
        } | {
            package: exported(archive.read(f"trl/{package}/__init__.py".replace("//", "/")).decode())
            for package in PACKAGES
        }
    file = Path(__file__).with_name("classic_names.json")
    file.write_text(json.dumps(dict(sorted(names.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
