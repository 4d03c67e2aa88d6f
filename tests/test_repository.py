"""What contributors and hosts read of the repository agrees with what it does."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
YAML_FILES = [
    ".pre-commit-config.yaml",
    "CITATION.cff",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob(".github/**/*.yml")),
]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", YAML_FILES)
def test_its_yaml_files_can_be_read(name):
    assert isinstance(load(name), dict)


def test_the_workflow_calls_the_make_targets_of_ci_and_no_other_commands():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    called = set()
    for job in jobs.values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands == ["make ${{ matrix.target }} PYTHON=python"]
        called |= set(job["strategy"]["matrix"]["target"])
    assert called <= TARGETS
    assert called >= set(re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(), re.M))


def test_pre_commit_runs_the_checks_of_make_check():
    (block,) = re.findall(r"^check: .*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    of_make = {line.strip().removesuffix(" .") for line in block.splitlines()}
    (local,) = load(".pre-commit-config.yaml")["repos"]
    assert {hook["entry"] for hook in local["hooks"]} == of_make


def test_mypy_checks_the_whole_package_strictly():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert config["files"] == ["trl_apa", "reproduction"] and config["strict"]
    modules = [module for part in config["overrides"] for module in part["module"]]
    assert not any(module.startswith(("trl_apa", "reproduction")) for module in modules)
    assert "ignore_errors" not in {name for part in [config, *config["overrides"]] for name in part}


def test_each_type_ignore_names_its_error_and_the_reason():
    lines = [line for path in (ROOT / "trl_apa").rglob("*.py") for line in path.read_text().splitlines()]
    ignored = [line for line in lines if "type: ignore" in line]
    assert ignored and all(re.search(r"  # type: ignore\[[a-z-]+\]  # \w", line) for line in ignored)


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = load("CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_make_lists_every_target_that_it_has():
    (phony,) = [" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)).split()]
    assert set(phony) == TARGETS
