"""The command line: `trl-apa --version`, `trl-apa <command> ...` and error reporting.

A command is a module with `main(argv: list[str]) -> int`, imported only when it is called for. It raises what goes
wrong; this module decides whether that is a user error, reported in a line or two, or a bug.
"""

import argparse
import errno
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import trl_apa
from trl_apa.commands.parsing import DEBUG, OneLineParser
from trl_apa.commands.quiet import without_known_warnings
from trl_apa.commands.streams import nobody_reads, streams_that_may_be_lost
from trl_apa.redaction import without_secrets_in_error


COMMANDS = {
    "demo": ("trl_apa.demo", "a complete RLHF pipeline with a small model on the CPU: SFT, reward model, APA"),
    "sft": ("trl_apa.commands.sft", "supervised fine-tuning with TRL's SFTTrainer"),
    "reward": ("trl_apa.commands.reward", "train a reward model on preferences with TRL's RewardTrainer"),
    "train": ("trl_apa.commands.train_options", "align a policy with APA, AWR, PPO, GRPO or another loss"),
    "offline": ("trl_apa.commands.offline", "train on fixed responses with APA, AWR, ILQL, QRPO or DRO"),
    "evaluate": (
        "trl_apa.commands.evaluate_options",
        "reward, KL, entropy, length of checkpoints on prompts, in one table",
    ),
    "generate": ("trl_apa.commands.generate_options", "responses of a model to prompts, as JSON lines"),
    "check": ("trl_apa.commands.check", "whether a model's numbers can be trusted on this machine"),
    "memory": ("trl_apa.commands.memory", "peak memory of a run on each GPU, from the config of its model"),
    "winrate": ("trl_apa.commands.winrate_options", "how often a judge prefers one model's answers to another's"),
    "merge": ("trl_apa.commands.merge", "merge an adapter into its base, as a plain checkpoint"),
    "paper": ("trl_apa.commands.paper", "run and plot the curves of a figure of the paper, from a clone"),
    "plot": ("trl_apa.commands.plot", "reward, KL, and reward against KL of runs, as PNG"),
    "env": ("trl_apa.commands.env", "versions and devices, for a bug report"),
}
# Where `--debug VALUE` is an option of the Trainer.
WITH_TRAINER = ("sft", "reward", "train", "offline")
# Their only output is stdout: without it there is no reason to continue.
PRINT_ALONE = ("generate", "check", "memory", "env")

MISTAKE, BUG, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141
LONGEST = 1000  # characters of a message
SHOW_TRACEBACK = "--debug shows the traceback"
# How libraries that raise no OSError speak of it.
FULL_DISK = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")
# Functions in which a command is past what its user has given: what a library refuses there is our fault.
RUNNING = {"_inner_training_loop", "held_out_metrics", "fit_value_model"}
# How the processes of a launch say that another one failed, which says why.
ECHO = "see their messages"
# Seconds that a process waits before it says what the first one probably has said: its launcher ends it meanwhile.
GRACE = 8.0


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; it leaves a command's own arguments untouched for that command."""
    lines = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = OneLineParser(
        prog="trl-apa",
        description="Align language models with Advantage-Induced Policy Alignment (APA).",
        epilog=f"commands:\n{lines}\n\n`trl-apa <command> --help` lists a command's options. Every command has "
        "--debug.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {trl_apa.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-apa` with `argv` (*optional*, defaults to the process's arguments).

    Returns:
        The exit status: 2 after a user's mistake, 1 after a bug, 130 after Ctrl-C.

    Raises:
        SystemExit: after `--help`, for an argument that cannot be read, and after a signal that a run has answered
            with a checkpoint.
    """
    try:
        return _run(argv)
    finally:
        # Python would try once more to write what is left, and complain.
        nobody_reads(sys.stdout)


def _run(argv: Sequence[str] | None) -> int:
    options = build_parser().parse_args(argv)
    arguments, debug = without_debug(options.command, options.arguments)
    debug = debug or hasattr(options, "debug") or DEBUG in os.environ
    program = f"trl-apa {options.command}"
    streams = nullcontext() if options.command in PRINT_ALONE else streams_that_may_be_lost(program)
    with streams, _told_to_children(debug), without_known_warnings():
        try:
            status: int = import_module(COMMANDS[options.command][0]).main(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except SystemExit as ended:
            if debug and isinstance(ended.__context__, Exception) and not ended.__suppress_context__:
                _show_traceback(ended.__context__)
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                _show_traceback(error)
            return _end(program, error)


def without_debug(command: str, arguments: Sequence[str]) -> tuple[list[str], bool]:
    """A command's own arguments, and whether `--debug` stands among them, up to a `--`.

    With a value it is another option, the Trainer's, where a command has that.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)

    def is_ours(place: int) -> bool:
        has_value = place + 1 < end and not arguments[place + 1].startswith("-")
        return arguments[place] == "--debug" and not (has_value and command in WITH_TRAINER)

    own = [arguments[place] for place in range(end) if not is_ours(place)]
    return [*own, *arguments[end:]], len(own) < end


@contextmanager
def _told_to_children(debug: bool) -> Iterator[None]:
    before = os.environ.get(DEBUG)
    if debug:
        os.environ[DEBUG] = "1"
    try:
        yield
    finally:
        if debug and before is None:
            del os.environ[DEBUG]


class Told(NamedTuple):
    """What is said of an error.

    Args:
        lines: the first stands behind the name of the command.
        status: of the process.
    """

    lines: list[str]
    status: int


def explain(error: Exception) -> Told:
    """What went wrong in a line or two: what the user has to change, or where it was that nothing should go wrong."""
    frames, causes = traceback.extract_tb(error.__traceback__), list(_causes(error))
    is_running = any(frame.name in RUNNING for frame in frames)
    if any(_is_out_of_memory(cause) for cause in causes):
        advice = (
            "  lower the batch sizes or lengths; `trl-apa memory` predicts the memory of a run and the largest savings"
        )
        return Told([f"out of memory: {_text(causes[-1])}", advice], MISTAKE)
    if not is_mistake(error, frames, is_running):
        place = _last_place(frames, lambda frame: not _is_of_a_library(frame))
        return Told([f"unexpected {type(error).__name__}: {_text(error)}", *place, f"  {SHOW_TRACEBACK}"], BUG)
    if isinstance(error, OSError):
        return Told([_text(error)], MISTAKE)
    of_the_user = [_last_place(traceback.extract_tb(cause.__traceback__), _is_the_users) for cause in causes]
    hint = next((place for place in reversed(of_the_user) if place), [])
    if not hint and not _is_refusal(error):
        hint = [f"  {SHOW_TRACEBACK}"]
    return Told([_text(error), *hint], MISTAKE)


def is_mistake(error: Exception, frames: Sequence[traceback.FrameSummary], is_running: bool) -> bool:
    """Whether it is for the user to change something: an argument, a file, the machine.

    Args:
        error: what was raised.
        frames: its traceback.
        is_running: whether the command was past reading and loading what it was given.
    """
    if isinstance(error, OSError | FloatingPointError) or any(text in str(error) for text in FULL_DISK):
        return True
    if frames and _is_ours(frames[-1]):
        return _is_refusal(error)
    is_loading = any(frame.name == "from_pretrained" for frame in frames)
    return (isinstance(error, ValueError | ImportError) or is_loading) and not is_running


def _is_refusal(error: BaseException) -> bool:
    """Whether our code raises it on purpose: what raises by itself there, `int("x")` say, is a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_ours(frames[-1]) and str(frames[-1].line).startswith("raise ")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in ("out of memory", "allocate memory"))


def _text(error: BaseException) -> str:
    """Its message on one line, not too long."""
    text = " ".join(without_secrets_in_error(str(error)).split()) or type(error).__name__
    # Where it is cut, the end stays, which says what to do.
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-300:]}"


def _last_place(
    frames: Sequence[traceback.FrameSummary], is_meant: Callable[[traceback.FrameSummary], bool]
) -> list[str]:
    """A line that says where it happened: the innermost of the frames that are meant; nothing if there is none."""
    meant = [frame for frame in frames if is_meant(frame)]
    if not meant:
        return []
    path = Path(meant[-1].filename)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return [f"  {path}:{meant[-1].lineno}, in {meant[-1].name}: {meant[-1].line}"]


def _is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether it is the package's code, or that of the paper's figures beside it."""
    figures = sys.modules.get("reproduction.command")
    files = [__file__, *([] if figures is None else [str(figures.__file__)])]
    return any(Path(frame.filename).is_relative_to(Path(file).parent) for file in files)


def _is_of_a_library(frame: traceback.FrameSummary) -> bool:
    """Whether it is neither ours nor the user's. The files that compiled code was made from are not there."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    path = Path(frame.filename)
    return not _is_ours(frame) and (not path.is_file() or any(path.is_relative_to(folder) for folder in folders))


def _is_the_users(frame: traceback.FrameSummary) -> bool:
    return not _is_ours(frame) and not _is_of_a_library(frame)


def _end(program: str, error: Exception | KeyboardInterrupt) -> int:
    """Say what went wrong; returns the exit status."""
    if nobody_reads(sys.stdout) and isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, KeyboardInterrupt):
        if local_rank == "0":
            _say(f"{program}: interrupted")
        return INTERRUPTED
    told = explain(error)
    if local_rank != "0":
        program = f"{program} (rank {os.environ.get('RANK', local_rank)})"
    with suppress(KeyboardInterrupt):
        time.sleep(2 * GRACE if ECHO in str(error) else GRACE if local_rank != "0" else 0)
    _say(f"{program}: " + "\n".join(told.lines))
    return told.status


def _show_traceback(error: BaseException) -> None:
    _say(without_secrets_in_error("".join(traceback.format_exception(error)).rstrip()))


def _say(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
