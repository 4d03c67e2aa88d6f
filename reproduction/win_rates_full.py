"""Win rates at full size: `trl-apa generate` for every policy, `trl-apa winrate` for every pair, a process each."""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from reproduction.win_rates import Comparison, WinRates, answers_file, sampling_seed, summarize, verdicts_file
from trl_apa.commands import generate_options, winrate_options
from trl_apa.commands.options import did_you_mean, read_yaml
from trl_apa.commands.row_file import record_of
from trl_apa.winrate import Judgement, Pair


# What `winrate` cannot be parsed without.
ANY_ANSWERS, ANY_JUDGE = ["A", "B"], ["--judge", "openai", "--judge_model", "any"]


class Options(NamedTuple):
    """What both commands are given beside what is different for each policy and pair.

    Args:
        generate, winrate: as on their command lines.
        judging: those of `winrate`, parsed.
    """

    generate: list[str]
    winrate: list[str]
    judging: argparse.Namespace


def options_of(comparison: Comparison, more: Sequence[str]) -> Options:
    """The options of the files, and over them `more`, each of which goes to the command, or commands, that have it.

    Raises:
        ValueError: for an option that neither command has, or that the file's does not.
        SystemExit: for a value of the wrong type.
    """
    parser = winrate_options.make_parser()
    of_winrate = vars(parser.parse_args([*ANY_ANSWERS, *ANY_JUDGE])).keys() - {"ours", "theirs"}
    of_generate = generate_options.make_parser().parse([]).keys()
    in_file = read_yaml(str(comparison.winrate))
    for name in in_file:
        _check_option(name, of_winrate, str(comparison.winrate))
    given = list(_grouped(more))
    for name, _ in given:
        _check_option(name, of_winrate | of_generate, "generate and winrate")
    to_generate = ["--config", str(comparison.generate), *_words(given, of_generate)]
    to_winrate = [word for name, value in in_file.items() for word in _as_words(name, value)]
    to_winrate += _words(given, of_winrate)
    generate_options.make_parser().parse(to_generate)
    return Options(to_generate, to_winrate, parser.parse_args([*ANY_ANSWERS, *to_winrate]))


def _check_option(name: str, known: Collection[str], where: str) -> None:
    if name not in known:
        raise ValueError(f"{where}: unknown option {name!r}{did_you_mean(name, known)}")


def _grouped(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option's name and its words."""
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    if words and starts[:1] != [0]:
        raise ValueError(f"unexpected argument {words[0]!r}: options should begin with --")
    for start, end in pairwise([*starts, len(words)]):
        name, equals, value = words[start][2:].partition("=")
        name = name.replace("-", "_")
        yield name, [f"--{name}{equals}{value}", *words[start + 1 : end]]


def _words(given: Iterable[tuple[str, list[str]]], names: Collection[str]) -> list[str]:
    return [word for name, words in given if name in names for word in words]


def _as_words(name: str, value: Any) -> list[str]:
    """An option of a file as on a command line that has flags."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def common_start(options: Iterable[Mapping[str, Any]]) -> str:
    """The model that runs with these options all start from.

    Raises:
        ValueError: if they start from several, or their files name none.
    """
    names = {given.get("model_name_or_path") for given in options}
    if len(names) != 1 or None in names:
        raise ValueError(f"the policies start from {', '.join(sorted(map(str, names)))}; it should be one model")
    return str(names.pop())


def compare_at_full_size(
    comparison: Comparison, policies: Mapping[int, Mapping[str, Path]], more: Sequence[str], folder: Path
) -> WinRates:
    """Make the answers and the verdicts that are not there yet.

    What is there stays if it was made with the same options, of policies and answers that are no newer than it.

    Args:
        comparison: what is compared.
        policies: seed of the runs to label to the policy's folder, or its hub name.
        more: see `options_of`.
        folder: of answers, verdicts, and the cache of verdicts.

    Raises:
        ValueError, SystemExit: as `options_of`.
        subprocess.CalledProcessError: if a process failed; what was made before is kept.
    """
    options = options_of(comparison, more)
    folder.mkdir(parents=True, exist_ok=True)
    judged: dict[tuple[str, str], dict[int, list[Judgement]]] = {pair: {} for pair in comparison.pairs}
    for seed, found in policies.items():
        for label, policy in found.items():
            of_policy = ["--model_name_or_path", str(policy), "--seed", str(sampling_seed(comparison, label, seed))]
            command = ["generate", *options.generate, *of_policy]
            _make(command, answers_file(folder, label, seed), [policy / "trainer_state.json"])
        for pair in comparison.pairs:
            answers = [answers_file(folder, label, seed) for label in pair]
            path = verdicts_file(folder, pair, seed)
            _make(["winrate", *map(str, answers), *options.winrate], path, answers)
            judged[pair][seed] = _read_judgements(path)
    return summarize(judged, options.judging.judge_model, options.judging.seed, options.judging.confidence)


def _make(command: Sequence[str], path: Path, sources: Iterable[Path]) -> None:
    """Run a command of `trl-apa` that writes one file, unless the file is there, by this command and these sources.

    The file bears its name only when it is complete. Beside it lies the command, with what its file of options says.
    What a process that was killed left of the file is kept for the same command, which may continue it, and for no
    other.
    """
    given = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in command else None
    record = json.dumps({"command": list(command), "config": given}, indent=1) + "\n"
    sources = [source for source in sources if source.is_file()]
    if _is_made(path, record, sources):
        return
    part = path.with_name(f"{path.name}.part")
    if not _is_made(part, record, sources):
        part.unlink(missing_ok=True)
        _made_by(part).write_text(record, encoding="utf-8")
    whole = [sys.executable, "-m", "trl_apa.cli", *command, "--output", str(part)]
    print(" ".join(whole[1:]), flush=True)
    subprocess.run(whole, check=True)
    _made_by(path).unlink(missing_ok=True)
    part.replace(path)
    _made_by(part).replace(_made_by(path))
    record_of(part).unlink(missing_ok=True)


def _made_by(path: Path) -> Path:
    return path.with_name(f"{path.name}.command")


def _is_made(path: Path, record: str, sources: Sequence[Path]) -> bool:
    """Whether a file was made, or begun, by the command of `record` when its sources were as they are."""
    made_by = _made_by(path)
    if not (path.is_file() and made_by.is_file() and made_by.read_text(encoding="utf-8") == record):
        return False
    return all(source.stat().st_mtime <= made_by.stat().st_mtime for source in sources)


def _read_judgements(path: Path) -> list[Judgement]:
    rows = json.loads(path.read_text(encoding="utf-8"))["judgements"]
    pairs = [Pair(**{name: row[name] for name in Pair._fields if name in row}) for row in rows]
    return [Judgement(pair, tuple(row["verdicts"])) for pair, row in zip(pairs, rows, strict=True)]
