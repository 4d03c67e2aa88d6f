"""Everything that is to be seen on a GPU, in one go of at most eight minutes: `make gpu-check`.

    python -m benchmarks.gpu_check [--seconds 480] [--output DIR] [--wheels DIR] [--data FILE] [--only PART ...]

Nothing is downloaded: networks have random weights. Each part is a process with a time limit of its own, or what is
left of all the time; one that fails or is late does not end the others. As each ends, a line of JSON goes to standard
output and to `parts.jsonl` in `--output`, where its log and its results are too; in the end the tables for
docs/performance.md and docs/memory.md are printed and left in `tables.md`. Exit status 1 if a part failed or was late.

`--small` rehearses all of it on a CPU, on networks of a few thousand weights. `--wheels` is a folder of wheels, for a
machine without a network: they are installed in `installed` in `--output`, which the parts import from first. `--data`
is a file of pairs in the layout of Anthropic's HH, for the last part.
"""

import argparse
import importlib.machinery
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check_tables import tables


ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480
# Seconds that a part is given to end after it was asked to, and what is kept for the tables.
GRACE, KEPT = 5, 5
# A rehearsal may be on a busy machine.
PATIENCE = 6
NEEDED = ("torch", "transformers", "accelerate", "peft", "datasets", "trl")
OPTIONAL = ("bitsandbytes", "flash_attn", "triton", "vllm", "pytest", "hypothesis")
VERDICT = re.compile(r"^tests/\S+::(?P<test>.+?) (?P<verdict>PASSED|FAILED|SKIPPED|ERROR)", re.MULTILINE)
ENVIRONMENT = """
import json, sys, torch
on_gpu = torch.cuda.is_available()
found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
found["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
if on_gpu:
    found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
json.dump(found, open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Part:
    """One process of the check.

    Args:
        name: of its line, log and results.
        seconds: its time limit.
        command: what is run, after the interpreter.
        needs: modules beside `NEEDED` without which it is skipped.
        read: its results, from its log and its folder.
        all_gpus: whether it sees all GPUs, or the first alone.
        until_stopped: it goes on until its limit, and what it has done by then is its result.
        unless: why it is skipped, if it is.
        at_least: it is skipped where fewer seconds are left.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    read: Callable[[str, Path], Any]
    needs: tuple[str, ...] = ()
    all_gpus: bool = False
    until_stopped: bool = False
    unless: str = ""
    at_least: float = 2 * GRACE


def results_file(name: str) -> Callable[[str, Path], Any]:
    """Reads what a part has written as JSON up to its end, or None."""

    def read(log: str, folder: Path) -> Any:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() and path.stat().st_size else None

    return read


def verdicts(log: str, folder: Path) -> dict[str, Any]:
    """How many tests passed, and the names of the others; those that were done when time was up."""
    found = [match.groupdict() for match in VERDICT.finditer(log)]
    names: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "SKIPPED": [], "ERROR": []}
    for entry in found:
        names[entry["verdict"]].append(entry["test"])
    return {
        "passed": len(names["PASSED"]),
        "failed": names["FAILED"] + names["ERROR"],
        "skipped": names["SKIPPED"],
    }


def vocabulary_table(log: str, folder: Path) -> list[str]:
    """The lines of the table that `benchmarks.vocabulary` prints."""
    return [line for line in log.splitlines() if re.match(r"\s*(tokens|\d+) .*(in chunks|MiB)", line)]


def learning_curve(log: str, folder: Path) -> dict[str, Any] | None:
    """Iterations of the run on pairs, seconds of one, and reward and KL at both ends."""
    path = folder / "pairs" / "apa" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    if not rows:
        return None
    timed = rows[1:] or rows
    ends = {
        end: {"reward": row["apa/mean_scores"], "kl_nats": row["objective/kl_k3"]}
        for end, row in (("first", rows[0]), ("last", rows[-1]))
    }
    return {
        "iterations": len(rows),
        "seconds_per_iteration": sum(row["seconds"] for row in timed) / len(timed),
        **ends,
    }


def parts(options: argparse.Namespace, has_bitsandbytes: bool, num_gpus: int) -> Iterator[Part]:
    """What is run, in order of worth."""
    folder, small = options.output, ("--small",) if options.small else ()
    pytest = ("-m", "pytest", "-v", "-W", "ignore", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py", "-k")
    chosen = "not two_ranks" + (" and not ppo and not awr and not gpt" if small else "")
    yield Part("tests", 120, (*pytest, chosen), verdicts, needs=("pytest", "hypothesis"))
    unless = "" if small or num_gpus > 1 else "one GPU: NCCL wants one for each rank"
    yield Part("two-ranks", 60, (*pytest, "two_ranks"), verdicts, ("pytest", "hypothesis"), True, unless=unless)
    precision = ("--device", "cpu") if small else ("--bf16", "true")
    lengths = ("--max_prompt_length", "64" if small else "256", "--max_completion_length", "8" if small else "64")
    command = ("-m", "benchmarks.check_shape", "--output", f"{folder}/check.json", *small, *precision, *lengths)
    command += ("--gradient_checkpointing", "true")
    yield Part("check", 90, command, results_file("check"))
    command = ("-m", "benchmarks.launches", "--output", f"{folder}/launches.json", *small)
    yield Part("launches", 45, command, results_file("launches"))
    yield from memory_parts(options, has_bitsandbytes)
    command = ("-m", "benchmarks.sampling", "--output", f"{folder}/sampling.json", *small)
    yield Part("sampling", 75, command, results_file("sampling"))
    command = ("-m", "benchmarks.vocabulary", "--tokens", "8" if small else "2048")
    yield Part("vocabulary", 60, command, vocabulary_table, needs=("psutil",))
    unless = "" if options.data else "no --data"
    yield Part(
        "pairs", SECONDS, pairs_command(options), learning_curve, until_stopped=True, unless=unless, at_least=90
    )


def memory_parts(options: argparse.Namespace, has_bitsandbytes: bool) -> Iterator[Part]:
    """`benchmarks.gpu` at each size: layouts of the networks and rows of a micro-batch."""
    in_8bit = ("one-base",) if has_bitsandbytes else ()
    sizes: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
        "160m": (45, ("full",), ("4",)),
        "1b": (90, ("full", *in_8bit, "one-base-bf16", "separate-bf16"), ("4",)),
        "7b": (130, (*in_8bit, "one-base-bf16", "separate-bf16"), ("4",)),
    }
    if options.small:
        sizes = {"tiny": (120, ("full", "one-base-bf16"), ("2",))}
    for scale, (seconds, layouts, rows) in sizes.items():
        command = ("-m", "benchmarks.gpu", "--scale", scale, "--repeats", "1", "--layouts", *layouts)
        command += ("--micro-batches", *rows, "--rollouts", "2" if options.small else "8")
        name = f"memory-{scale}"
        yield Part(name, seconds, (*command, "--output", f"{options.output}/{name}.json"), results_file(name))


def pairs_command(options: argparse.Namespace) -> tuple[str, ...]:
    """Figure 3's options on a network of the shape of its 125M model, trained from nothing on the file itself.

    It ends when time is up: there are more iterations than that.
    """
    sizes = {"hidden-size": 768, "num-layers": 12, "vocab-size": 32768, "max-prompt-length": 896}
    sizes |= {"max-target-length": 256}
    sizes |= {"max-new-tokens": 128, "batch-size": 128, "mini-batch-size": 8, "ppo-epochs": 2, "learning-rate": 8e-6}
    sizes |= {"sft-learning-rate": 5e-4, "sft-epochs": 1, "generation-batch-size": 128, "iterations": 20_000}
    if options.small:
        sizes |= {"hidden-size": 64, "num-layers": 1, "vocab-size": 300, "max-prompt-length": 24, "limit": 60}
        sizes |= {"max-target-length": 12, "max-new-tokens": 6, "batch-size": 8, "mini-batch-size": 4}
        sizes |= {"held-out": 0.25, "iterations": 2, "eval-prompts": 4}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    where = ("--dataset", str(options.data), "--output-dir", f"{options.output}/pairs", "--samples", "0")
    return ("examples/hh/run_hh.py", *where, "--kl-coef", "0.1", *given)


class Runner:
    """Runs parts one after the other until time is up.

    Args:
        options: of the command line.
        path: folders in front of the path of the parts.
    """

    def __init__(self, options: argparse.Namespace, path: Sequence[Path]):
        self.options, self.path = options, path
        self.deadline = time.monotonic() + options.seconds
        self.lines: list[dict[str, Any]] = []

    def run(self, part: Part) -> dict[str, Any]:
        """Run a part, write its line, and return it."""
        left = self.deadline - KEPT - time.monotonic()
        missing = [name for name in part.needs if not self.has(name)]
        line: dict[str, Any] = {"part": part.name, "status": "skipped", "seconds": 0.0}
        line["limit"] = round(min(part.seconds * (PATIENCE if self.options.small else 1), left), 1)
        if part.unless or missing:
            line["why"] = part.unless or f"not installed: {', '.join(missing)}"
        elif left < part.at_least:
            line["why"] = f"{max(left, 0):.0f} seconds were left of the {part.at_least:.0f} that it needs"
        else:
            line |= self._carry_out(part, line["limit"])
        self.lines.append(line)
        with (self.options.output / "parts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    def has(self, module: str) -> bool:
        """Whether the parts can import a module."""
        places = [str(place) for place in (*self.path, *sys.path)]
        return importlib.machinery.PathFinder.find_spec(module, places) is not None

    def _carry_out(self, part: Part, limit: float) -> dict[str, Any]:
        log, scratch = self.options.output / f"{part.name}.log", self.options.output / "scratch"
        scratch.mkdir(exist_ok=True)
        start = time.monotonic()
        with log.open("w") as output:
            command = [sys.executable, *part.command]
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(part, scratch), start_new_session=True, **streams
            )
            try:
                status: int | None = process.wait(max(limit - GRACE, 1))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)
        shutil.rmtree(scratch, ignore_errors=True)  # what was stopped leaves its checkpoints behind
        outcome = {"seconds": round(time.monotonic() - start, 1), "log": str(log)}
        text = log.read_text(errors="replace")
        try:
            outcome["results"] = part.read(text, self.options.output)
        except (ValueError, KeyError) as error:
            outcome["results"], status = None, status or 1
            text += f"\nresults cannot be read: {error!r}"
        if status is None:
            outcome["status"] = "ok" if part.until_stopped and outcome["results"] else "late"
        else:
            outcome["status"] = "failed" if status else "ok"
        if outcome["status"] != "ok":
            outcome |= {"exit_status": status, "last_lines": text.splitlines()[-8:]}
        return outcome

    def _environment(self, part: Part, scratch: Path) -> dict[str, str]:
        given = os.environ
        path = os.pathsep.join([*map(str, self.path), *filter(None, [given.get("PYTHONPATH")])])
        environment = {**given, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if self.options.small:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRL_APA_GPU_TESTS_ON": "cpu"}
            environment["TRITON_INTERPRET"] = "1"
        elif not part.all_gpus:  # with several the Hugging Face Trainer would use them all
            environment["CUDA_VISIBLE_DEVICES"] = given.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return environment


def end_group(process: subprocess.Popen) -> None:
    """End a process and those that it started: asked first, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def install(wheels: Path, target: Path) -> None:
    """Unpack the wheels of a folder into another, without a network and without what they depend on.

    Raises:
        SystemExit: if there are none, or pip fails.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"--wheels {wheels} has no file that ends with .whl")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--upgrade", "--target"]
    if status := subprocess.run([*pip, str(target), *files], check=False).returncode:
        sys.exit(f"--wheels {wheels}: pip ended with status {status}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="rehearse on the CPU with tiny networks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the parts import from")
    parser.add_argument("--data", type=Path, help="a file of HH's pairs, for the last part")
    parser.add_argument("--only", nargs="+", help="these parts alone")
    options = parser.parse_args(argv)
    for name in ("wheels", "data"):
        if (given := getattr(options, name)) is not None and not given.exists():
            parser.error(f"--{name} {given} is not there")
        setattr(options, name, None if given is None else given.resolve())
    options.output = options.output.resolve()
    shutil.rmtree(options.output / "pairs", ignore_errors=True)  # or a finished stage would be used again
    options.output.mkdir(parents=True, exist_ok=True)
    for old in (*options.output.glob("*.json"), *options.output.glob("*.log"), options.output / "parts.jsonl"):
        old.unlink(missing_ok=True)
    runner = Runner(options, [ROOT])
    if options.wheels is not None:
        install(options.wheels, options.output / "installed")
        runner.path = [options.output / "installed", ROOT]
    return carry_out(runner)


def carry_out(runner: Runner) -> int:
    """All parts and the tables; returns the exit status."""
    options = runner.options
    if missing := [name for name in NEEDED if not runner.has(name)]:
        sys.exit(f"not installed: {', '.join(missing)}; --wheels takes a folder of their wheels")
    command = ("-c", ENVIRONMENT, str(options.output / "environment.json"))
    machine = runner.run(Part("environment", 60, command, results_file("environment")))
    gpus = (machine.get("results") or {}).get("gpus", [])
    if not gpus and not options.small:
        sys.exit("torch sees no GPU: --small rehearses on the CPU")
    planned = list(parts(options, runner.has("bitsandbytes"), len(gpus)))
    if unknown := set(options.only or ()) - {part.name for part in planned}:
        sys.exit(f"--only {' '.join(sorted(unknown))}: parts are {', '.join(part.name for part in planned)}")
    for part in planned:
        if options.only is None or part.name in options.only:
            runner.run(part)
    optional = {name: runner.has(name) for name in OPTIONAL}
    text = tables(runner.lines, optional)
    (options.output / "tables.md").write_text(text)
    print(text)
    return int(any(line["status"] in ("failed", "late") for line in runner.lines))


if __name__ == "__main__":
    # Who ends this ends the part that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
