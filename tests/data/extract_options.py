"""Writes the lists of options beside it: reads the source of older trainers as text, imports and runs none of it.

for version in 0.11.4 0.12.0 ... 1.12.0: pip download --no-deps --only-binary :all: trl==version -d WHEELS
git clone --branch v0.7.0 https://github.com/CarperAI/trlx TRLX
python tests/data/extract_options.py --wheels WHEELS --trlx TRLX
"""

import argparse
import ast
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path


HERE = Path(__file__).parent
CLASSIC = (0, 11, 4)
# Where the second generation's trainer was, newest first: it moved, and the old place kept a stub for a while.
SECOND_GENERATION = ("trl/experimental/ppo/", "trl/trainer/")
# Parents of its config that TRL declared, with the file that holds them.
PARENTS = {
    "OnPolicyConfig": "trl/trainer/utils.py",
    "BaseConfig": "trl/trainer/base_config.py",
    "_BaseConfig": "trl/trainer/base_config.py",
}


def class_of(source: str, name: str) -> ast.ClassDef:
    return next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)


def fields_of(node: ast.ClassDef) -> dict[str, str]:
    """Field -> its default as it is written there; empty if it has none."""
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    return {line.target.id: ast.unparse(default_of(line)) if line.value else "" for line in lines}


def default_of(line: ast.AnnAssign) -> ast.expr:
    if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) == "field":
        keywords = {keyword.arg: keyword.value for keyword in line.value.keywords}
        return keywords.get("default", keywords.get("default_factory"))
    return line.value


def arguments_of(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args if argument.arg != "self"]


def renamed_arguments(function: ast.FunctionDef) -> list[str]:
    """Old names that a `deprecate_kwarg` decorator still lets in."""
    calls = [call for call in function.decorator_list if isinstance(call, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "deprecate_kwarg"]


def options_of(archive: zipfile.ZipFile, path: str) -> dict[str, str]:
    """Fields of `PPOConfig` and of those parents that are TRL's own, with their defaults."""
    config = class_of(archive.read(path).decode(), "PPOConfig")
    options = fields_of(config)
    for base in map(ast.unparse, config.bases):
        if base in PARENTS:
            options = fields_of(class_of(archive.read(PARENTS[base]).decode(), base)) | options
    return options


def read_wheel(path: Path) -> tuple[dict[str, str], list[str], list[str]] | None:
    """Options, trainer arguments in order, and older names of these; None if there is no PPO in this version."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = next((folder for folder in SECOND_GENERATION if f"{folder}ppo_config.py" in names), None)
        if folder is None:
            return None
        trainer = class_of(archive.read(f"{folder}ppo_trainer.py").decode(), "PPOTrainer")
        init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        return options_of(archive, f"{folder}ppo_config.py"), arguments_of(init), renamed_arguments(init)


def spans(names_by_version: dict[str, Iterable[str]]) -> dict[str, list[str]]:
    """Name -> the first and the last version that has it."""
    found: dict[str, list[str]] = {}
    for version, names in names_by_version.items():
        for name in names:
            found[name] = [found.get(name, [version])[0], version]
    return found


def runs(arguments_by_version: dict[str, list[str]]) -> list[dict]:
    """Versions in a row with the same arguments, as one entry each."""
    found: list[dict] = []
    for version, arguments in arguments_by_version.items():
        if not found or found[-1]["arguments"] != arguments:
            found.append({"from": version, "to": version, "arguments": arguments})
        found[-1]["to"] = version
    return found


def statistics_of(path: Path) -> list[str]:
    """Names of the numbers that the trainer logs: what its `train` assigns to `metrics[...]`."""
    with zipfile.ZipFile(path) as archive:
        folder = next(folder for folder in SECOND_GENERATION if f"{folder}ppo_trainer.py" in archive.namelist())
        trainer = class_of(archive.read(f"{folder}ppo_trainer.py").decode(), "PPOTrainer")
    targets = [target for node in ast.walk(trainer) if isinstance(node, ast.Assign) for target in node.targets]
    found = [
        target for target in targets if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "metrics"
    ]
    return [ast.literal_eval(target.slice) for target in found]


def version_of(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"trl-([\d.]+)-", path.name)[1].split("."))


def extract_trl(folder: Path) -> None:
    wheels = {version_of(path): read_wheel(path) for path in sorted(folder.glob("trl-*.whl"), key=version_of)}
    options, arguments, _ = wheels.pop(CLASSIC)
    write("classic_options", {"source": "trl 0.11.4", "options": options, "trainer_arguments": arguments})
    found = {".".join(map(str, version)): facts for version, facts in wheels.items() if facts and version > CLASSIC}
    write(
        "second_generation_options",
        {
            "source": "every release of trl from 0.12.0 to 1.12.0",
            "versions": list(found),
            "options": spans({version: facts[0] for version, facts in found.items()}),
            "last_defaults": list(found.values())[-1][0],
            "last_statistics": statistics_of(folder / f"trl-{list(found)[-1]}-py3-none-any.whl"),
            "trainer_arguments": runs({version: facts[1] for version, facts in found.items()}),
            "older_names_of_arguments": spans({version: facts[2] for version, facts in found.items()}),
        },
    )


def extract_trlx(folder: Path) -> None:
    configs, ppo, train = (
        (folder / "trlx" / name).read_text() for name in ("data/configs.py", "models/modeling_ppo.py", "trlx.py")
    )
    sections = {"model": "ModelConfig", "tokenizer": "TokenizerConfig", "optimizer": "OptimizerConfig"}
    sections |= {"scheduler": "SchedulerConfig", "train": "TrainConfig"}
    options = {section: list(fields_of(class_of(configs, name))) for section, name in sections.items()}
    options["method"] = ["name", *fields_of(class_of(ppo, "PPOConfig"))]
    functions = [node for node in ast.parse(train).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    write("trlx_options", {"source": "trlx 0.7.0", "options": options, "train_arguments": arguments_of(functions[0])})


def write(name: str, facts: dict) -> None:
    text = json.dumps(facts, indent=2)
    # A list of names on one line reads better than on fifty.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--trlx", type=Path, required=True)
    folders = parser.parse_args()
    extract_trl(folders.wheels)
    extract_trlx(folders.trlx)
