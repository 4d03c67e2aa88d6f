"""Does a run survive being killed? Kills at random moments, of one process and of two, then equality of all bits.

    python -m benchmarks.chaos [--kills 40] [--seed 0]

A small run of `train()` that saves at every optimizer step is killed, resumed, killed again, and so on to its end. Its
last checkpoint must then hold the bits of a run that nobody killed. After each kill every folder with a checkpoint's
name must be complete, and the newest no older than the newest before. One process and two (one dies, or both),
with `save_total_limit` 1 and without, APA and PPO; by SIGKILL, SIGTERM and SIGINT.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback

from benchmarks.soak import share_of_fives
from tests.tiny import tiny_model, tiny_tokenizer
from trl_apa import APAConfig, APATrainer
from trl_apa.trainer.checkpoints import checkpoints_in, newest_checkpoint, problem_with, run_of


STEPS = 24
# A process whose peer has died ends by itself; longer than this it hangs.
PATIENCE_SECONDS = 120
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)
STATUS_OF_SIGNAL = {128 + signal.SIGTERM, 128 + signal.SIGINT}


class Broken(Exception):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Setup:
    processes: int
    loss_type: str
    save_total_limit: int | None

    def __str__(self) -> str:
        return f"{self.processes} process(es), {self.loss_type}, save_total_limit={self.save_total_limit}"


@dataclass
class Tally:
    """What has happened in one setup."""

    runs: int = 0
    signals: Counter = field(default_factory=Counter)
    # Kills between two optimizer steps, before the first, and while a checkpoint was written.
    moments: Counter = field(default_factory=Counter)


def train(setup: Setup, folder: str, resume: bool) -> None:
    config = APAConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        loss_type=setup.loss_type,
        batch_size=8,
        mini_batch_size=4,
        num_epochs_per_batch=2,
        max_completion_length=8,
        scale_rewards=True,
        max_steps=STEPS,
        logging_steps=5,
        save_steps=1,
        save_total_limit=setup.save_total_limit,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        disable_tqdm=True,
        ddp_timeout=60,
    )
    prompts = [f"w{2 + i % 29} w{2 + i % 17}" for i in range(64)]
    trainer = APATrainer(
        config, tiny_model(), tokenizer=tiny_tokenizer(), train_dataset=prompts, reward_funcs=share_of_fives
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def start(setup: Setup, folder: Path, resume: bool) -> list[int]:
    """The processes of one attempt, forked, so that the libraries are imported once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(setup, folder, resume, rank, port) for rank in range(setup.processes)]


def _fork(setup: Setup, folder: Path, resume: bool, rank: int, port: int) -> int:
    if (pid := os.fork()) != 0:
        return pid
    status = 1
    try:
        log = os.open(f"{folder}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if setup.processes > 1:
            world = {"WORLD_SIZE": setup.processes, "LOCAL_WORLD_SIZE": setup.processes, "RANK": rank}
            world |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in world.items()})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(setup, str(folder), resume)
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pids: list[int], seconds: float) -> dict[int, int]:
    """Exit statuses (negative: the signal) of those processes that end within so many seconds, by process."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while True:
        for pid in pids:
            if pid not in statuses and (waited := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(waited[1])
        if len(statuses) == len(pids) or time.monotonic() >= deadline:
            return statuses
        time.sleep(0.002)


def attempt(setup: Setup, folder: Path, kill_after: float | None, chance: random.Random, tally: Tally) -> bool:
    """Run until the end or until killed after so many seconds; whether it ended by itself.

    Raises:
        Broken: if a process hangs, or ends with an error though nobody was killed.
    """
    pids = start(setup, folder, resume=bool(checkpoints_in(folder)))
    statuses = ended(pids, PATIENCE_SECONDS if kill_after is None else kill_after)
    number = None
    if kill_after is not None and len(statuses) < len(pids):
        number = chance.choice(SIGNALS)
        victims = pids if number != signal.SIGKILL else chance.choice([*[[pid] for pid in pids], pids])
        for pid in victims:
            if pid not in statuses:
                os.kill(pid, number)
        tally.signals[number.name] += 1
        tally.moments[_moment(folder)] += 1
        statuses |= ended([pid for pid in pids if pid not in statuses], PATIENCE_SECONDS)
    for pid in pids:
        if pid not in statuses:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Broken(f"process {pids.index(pid)} did not end: see {folder}.{pids.index(pid)}.log")
    if number is None and any(statuses.values()):
        raise Broken(f"exit statuses {list(statuses.values())} without a kill: see {folder}.*.log")
    return not any(statuses.values())


def _moment(folder: Path) -> str:
    if any(folder.glob("_incomplete-*")):
        return "while a checkpoint was written"
    return "between" if checkpoints_in(folder) else "before the first checkpoint"


def age_of_newest(folder: Path) -> tuple[int, int]:
    """Attempt and step of the newest complete checkpoint; (0, 0) without one.

    Raises:
        Broken: if a folder with a checkpoint's name is incomplete.
    """
    for checkpoint in checkpoints_in(folder):
        if (why := problem_with(checkpoint.path)) is not None:
            raise Broken(f"{checkpoint.path}: {why}")
    newest = newest_checkpoint(folder)
    return (0, 0) if newest is None else (run_of(newest).attempt, int(newest.name.rsplit("-", 1)[1]))


def contents(folder: Path, processes: int) -> dict[str, Any]:
    """All tensors and numbers of the last checkpoint, by name."""
    last = folder / f"checkpoint-{STEPS}"
    found: dict[str, Any] = {}
    for name in ("model.safetensors", "value_model/model.safetensors", "value_model/value_head.safetensors"):
        _flatten(load_file(last / name), name, found)
    for name in ("optimizer.pt", "scheduler.pt", *(f"apa_state_{rank}.pt" for rank in range(processes))):
        _flatten(torch.load(last / name, weights_only=True), name, found)
    # What the clock says is in the statistics that wait for the next log.
    return {name: value for name, value in found.items() if "time/" not in name}


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict | list | tuple):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(element, f"{name}/{key}", found)
    else:
        found[name] = value


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return a.equal(b) if isinstance(a, torch.Tensor) else a == b

    return sorted(name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name)))


def survive(setup: Setup, kills: int, folder: Path, chance: random.Random) -> Tally:
    """Kill runs of one setup until there were so many kills, and compare each with one that was left alone.

    Raises:
        Broken: naming what was not as promised.
    """
    tally = Tally()
    began = time.monotonic()
    attempt(setup, folder / "alone", None, chance, tally)
    duration = time.monotonic() - began
    expected = contents(folder / "alone", setup.processes)
    while sum(tally.signals.values()) < kills:
        run, newest, finished = folder / f"run-{tally.runs}", (0, 0), False
        run.mkdir()
        while not finished:
            left = kills - sum(tally.signals.values())
            finished = attempt(setup, run, chance.uniform(0, duration) if left > 0 else None, chance, tally)
            before, newest = newest, age_of_newest(run)
            if newest < before:
                raise Broken(f"{run}: attempt and step of the newest checkpoint were {before}, are {newest}")
        if names := differing(expected, contents(run, setup.processes)):
            raise Broken(
                f"{run}: {len(names)} values differ from those of a run that was not killed, {names[0]} first"
            )
        tally.runs += 1
    return tally


def setups(processes: list[int]) -> list[Setup]:
    return [
        Setup(count, loss_type, limit)
        for count in processes
        for loss_type, limit in (("apa", None), ("apa", 1), ("ppo", 1))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="of each of the six setups")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total: Counter = Counter()
    for setup in setups(options.processes):
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            try:
                tally = survive(setup, options.kills, Path(folder), random.Random(options.seed))
            except Broken as broken:
                for log in sorted(Path(folder).glob("*.log")):
                    print(f"---- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
                raise SystemExit(f"{setup}: {broken}") from broken
        total += tally.signals
        what = ", ".join(f"{count} {name}" for name, count in (tally.signals + tally.moments).items())
        print(f"{setup}: {tally.runs} runs with the same bits; {what}", flush=True)
    print(f"{sum(total.values())} kills survived: {dict(total)}")


if __name__ == "__main__":
    main()
