"""`--accelerate_config`: the same command again under `accelerate launch`."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_apa.commands.options import Part, did_you_mean


# Set for the processes that are started here, for which the option has had its effect.
LAUNCHED = "TRL_APA_LAUNCHED"


@dataclass
class LaunchArguments:
    """How many processes run the command; not needed under `torchrun` or `accelerate launch`."""

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start this command with `accelerate launch` and this configuration: a file, or the name of one "
            "that comes with this package (single_gpu, ddp_8bit, two_nodes, fsdp2, zero2, zero3) or with TRL."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "With accelerate_config: processes, in place of the number that it says."}
    )
    machine_rank: int | None = field(
        default=None, metadata={"help": "With accelerate_config of several machines: which of them this is, from 0."}
    )
    main_process_ip: str | None = field(
        default=None, metadata={"help": "With accelerate_config of several machines: the address of machine 0."}
    )


LAUNCH_PART = Part(LaunchArguments, lambda name: "launching")


def launch(command: str, argv: Sequence[str], values: Mapping[str, Any]) -> bool:
    """Run the command in processes of their own if a configuration is given and this is none of them.

    Args:
        command: its name.
        argv: its arguments.
        values: its options by name, those of `LaunchArguments` among them.

    Returns:
        Whether it was run.

    Raises:
        ValueError: if there is no such configuration, or an option of one without it.
        SystemExit: if the process ended with another status than 0, with that status.
    """
    if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    given = {name: values[name] for name in LaunchArguments.__dataclass_fields__ if values[name] is not None}
    if "accelerate_config" not in given:
        for name, value in given.items():
            raise ValueError(f"{name}={value}: it is read only with accelerate_config")
        return False
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", str(config_file(given.pop("accelerate_config")))]
    for name, value in given.items():
        options += [f"--{name}", str(value)]
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "trl_apa.cli", command, *argv]))
    except subprocess.CalledProcessError as error:
        # Its text is the whole command, keys included; the process itself has said what was wrong.
        raise SystemExit(error.returncode if error.returncode > 0 else 128 - error.returncode) from None
    finally:
        del os.environ[LAUNCHED]
    return True


def shipped_configs() -> dict[str, Path]:
    """Configurations of accelerate by name: this package's, and those of TRL's whose names it does not use."""
    folders = [Path(str(files(package))) / "accelerate_configs" for package in ("trl", "trl_apa")]
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def config_file(name: str) -> Path:
    """Where a configuration of accelerate lies.

    Raises:
        ValueError: naming those that are shipped, if it is none of them and no file.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped)
    raise ValueError(f"accelerate_config={name!r} is no file and none of {', '.join(sorted(shipped))}{hint}")
