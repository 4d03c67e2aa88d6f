"""What the Dockerfile says of the project is so; docs/releasing.md says when the image is built."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests._cli import run
from trl_apa.cli import COMMANDS


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
STATEMENTS = [line.split(None, 1) for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def of(keyword):
    return [rest.strip() for name, rest in STATEMENTS if name == keyword]


def is_ignored(path):
    """By .dockerignore: the last pattern that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        fits = any(fnmatch.fnmatch(parent, pattern) for parent in parents) or (
            pattern.startswith("**/") and pattern[3:] in Path(path).parts
        )
        if line and not line.startswith("#") and fits:
            ignored = not line.startswith("!")
    return ignored


def test_what_is_copied_is_there_and_is_all_that_the_wheel_is_built_from():
    copied = [name for rest in of("COPY") for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() and not is_ignored(name) for name in copied)
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "trl_apa"} <= set(copied)
    assert not is_ignored("trl_apa/cli.py")
    for name in (".git/config", ".venv/bin/python", "tests/test_cli.py", "runs/demo", "trl_apa/__pycache__/cli.pyc"):
        assert is_ignored(name)


def test_the_base_is_an_argument_and_has_a_python_that_the_package_admits():
    default = dict(rest.split("=", 1) for rest in of("ARG"))["BASE"]
    assert of("FROM") == ["${BASE}"]
    (version,) = re.findall(r"python:(\d+\.\d+)-slim$", default)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_it_installs_extras_that_there_are_at_pinned_versions_and_leaves_no_cache():
    (install,) = [rest for rest in of("RUN") if "pip install" in rest]
    (extras,) = re.findall(r"'\.\[(.*?)\]'", install)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys() and "demo" in extras
    (constraint,) = re.findall(r"--constraint (\S+)", install)
    assert (ROOT / constraint).is_file() and "--no-cache-dir" in install
    assert all("rm -rf /var/lib/apt/lists/*" in rest for rest in of("RUN") if "apt-get" in rest)


def test_it_runs_the_demo_as_a_user_without_rights_in_a_folder_that_stays(capsys):
    (user,), (volume,) = of("USER"), of("VOLUME")
    assert user != "root" and f"useradd --create-home {user}" in TEXT and f"chown {user}:{user} {volume}" in TEXT
    ((program,), (command, *options)) = (re.findall(r'"(.*?)"', of(name)[0]) for name in ("ENTRYPOINT", "CMD"))
    assert program in PROJECT["scripts"] and command in COMMANDS
    assert options[1].startswith(f"{volume}/")
    assert run(command, *options, "--help") == 0


@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_the_commands_of_the_page_name_arguments_that_there_are(page):
    lines = [
        line for line in (ROOT / page).read_text().splitlines() if line.startswith(("docker build", "docker run"))
    ]
    assert len(lines) >= 3
    names = {rest.partition("=")[0] for rest in of("ARG")}
    assert {name for line in lines for name in re.findall(r"--build-arg (\w+)", line)} == names
    (volume,) = of("VOLUME")
    assert all(f":{volume}" in line for line in lines if line.startswith("docker run"))


def test_an_image_for_gpus_gets_what_tritons_kernels_are_compiled_with():
    (step,) = [rest for rest in of("RUN") if "gcc" in rest]
    assert step.startswith('if [ -z "$TORCH_INDEX" ]') and "libc6-dev" in step and "python3-dev" in step
    assert [name for name, _ in STATEMENTS].index("USER") > STATEMENTS.index(["RUN", step])
