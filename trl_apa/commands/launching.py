"""`--accelerate_config`: the same command again under `accelerate launch`."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_apa.commands.options import Part, did_you_mean, read_yaml
from trl_apa.commands.parsing import DEBUG
from trl_apa.config.fields import option


# Set for the processes that are started here, for which the option has had its effect.
LAUNCHED = "TRL_APA_LAUNCHED"


@dataclass
class LaunchArguments:
    """How many processes run the command; not needed under `torchrun` or `accelerate launch`."""

    accelerate_config: str | None = option(
        None,
        "Start this command with `accelerate launch` and this configuration: a file, or the name of one "
        "that comes with this package (single_gpu, ddp_8bit, two_nodes, fsdp2, zero2, zero3) or with TRL.",
    )
    num_processes: int | None = option(None, "With accelerate_config: processes, in place of the number that it says.")
    machine_rank: int | None = option(
        None, "With accelerate_config of several machines: which of them this is, from 0."
    )
    main_process_ip: str | None = option(None, "With accelerate_config of several machines: the address of machine 0.")


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
        SystemExit: with the status of the first process that failed, which has said why.
    """
    if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    given = {name: values[name] for name in LaunchArguments.__dataclass_fields__ if values[name] is not None}
    if "accelerate_config" not in given:
        for name, value in given.items():
            raise ValueError(f"{name}={value}: it is read only with accelerate_config")
        return False
    from accelerate.commands.launch import launch_command, launch_command_parser

    file = config_file(given.pop("accelerate_config"))
    read_yaml(str(file))
    options = ["--config_file", str(file)]
    for name, value in given.items():
        options += [f"--{name}", str(value)]
    with _ended_by_its_processes(command):
        launch_command(launch_command_parser().parse_args([*options, "--module", "trl_apa.cli", command, *argv]))
    return True


@contextmanager
def _ended_by_its_processes(command: str) -> Iterator[None]:
    """Inside, processes are started and waited for, whatever comes from the keyboard: how they end, this one ends."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if DEBUG not in os.environ:
        # It would say which process failed; that has said why.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda *_: None) if in_main_thread else None
    os.environ[LAUNCHED] = "1"
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise SystemExit(_status(command, 0, error.returncode)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(_status(command, rank, failure.exitcode)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    finally:
        del os.environ[LAUNCHED]
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _status(command: str, rank: int, exit_code: int) -> int:
    """The status to end with after a process has. One that a signal has ended could not say so itself."""
    if exit_code >= 0:
        return exit_code
    name = signal.Signals(-exit_code).name
    print(f"trl-apa {command}: process {rank} was ended by {name}", file=sys.stderr)
    return 128 - exit_code


def shipped_configs() -> dict[str, Path]:
    """Names and paths of accelerate configurations: this package's, and TRL's others."""
    folders = [Path(str(files(package))) / "accelerate_configs" for package in ("trl", "trl_apa")]
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def config_file(name: str) -> Path:
    """The path of a configuration of accelerate.

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
