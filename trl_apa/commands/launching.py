"""`--accelerate_config`: the same command again under `accelerate launch`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from trl_apa.commands.options import Part


# Set for the processes that are started here, for which the option has had its effect.
LAUNCHED = "TRL_APA_LAUNCHED"


@dataclass
class LaunchArguments:
    """How many processes run the command; not needed under `torchrun` or `accelerate launch`."""

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start this command with `accelerate launch` and this configuration: a file, or the name of one "
            "that TRL ships (single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3)."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "With accelerate_config: processes, in place of the number that it says."}
    )


LAUNCH_PART = Part(LaunchArguments, lambda name: "launching")


def launch(command: str, argv: Sequence[str], accelerate_config: str | None, num_processes: int | None) -> bool:
    """Run the command in processes of their own if a configuration is given and this is none of them.

    Args:
        command: its name.
        argv: its arguments.
        accelerate_config: a file or the name of a shipped configuration.
        num_processes: in place of the number that the configuration says.

    Returns:
        Whether it was run.

    Raises:
        ValueError: if there is no such configuration, or a number of processes without one.
    """
    if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    if accelerate_config is None:
        if num_processes is not None:
            raise ValueError(f"num_processes={num_processes}: it is read only with accelerate_config")
        return False
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", str(config_file(accelerate_config))]
    if num_processes is not None:
        options += ["--num_processes", str(num_processes)]
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "trl_apa.cli", command, *argv]))
    finally:
        del os.environ[LAUNCHED]
    return True


def config_file(name: str) -> Path:
    """Where a configuration of accelerate lies.

    Raises:
        ValueError: naming those that are shipped, if it is none of them and no file.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in Path(str(files("trl"))).joinpath("accelerate_configs").glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    close = get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"accelerate_config={name!r} is no file and none of {', '.join(sorted(shipped))}{hint}")
