"""Figure 1: policies that another figure's runs left, compared in pairs by a judge."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from reproduction.figures import Figure, file_name, of_the_right_types, read_entry, read_figure
from trl_apa.winrate.comparing import Judgement, win_rate


COMMAND = "winrate"
KEYS = {"title", "command", "seeds", "runs_of", "start", "policies", "generate", "winrate"}


@dataclass(frozen=True)
class Comparison:
    """A figure of win rates.

    Args:
        name: as in the index.
        title: what is compared.
        seeds: of the runs.
        trained: the figure whose runs the policies are, with their curves alone.
        start: what the policy that those runs start from is called.
        policies: the labels of these curves.
        generate: file of options of `trl-apa generate`, for the answers at full size.
        winrate: file of options of `trl-apa winrate`, for the verdicts at full size.
    """

    name: str
    title: str
    seeds: list[int]
    trained: Figure
    start: str
    policies: list[str]
    generate: Path
    winrate: Path

    @property
    def labels(self) -> list[str]:
        """All that are compared, the start first."""
        return [self.start, *self.policies]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each label against each that stands before it: the one whose win rate is asked for, and the other."""
        return [(ours, theirs) for place, ours in enumerate(self.labels) for theirs in self.labels[:place]]


# Of each pair of labels, the verdicts on the runs of each seed.
Judged = Mapping[tuple[str, str], Mapping[int, Sequence[Judgement]]]


def read_comparison(folder: str | Path, name: str) -> Comparison:
    """The figure of that name in the index of `folder`.

    Raises:
        OSError: if the index cannot be read.
        ValueError: if there is none, if it has no such figure, or if the entry lacks something or names what is not
            there.
    """
    path, entry = read_entry(folder, name)
    where = f"{path}: {name}"
    if missing := KEYS - entry.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if entry["command"] != COMMAND:
        raise ValueError(f"{where}: command is {entry['command']!r}; it should be {COMMAND}")
    with of_the_right_types(where):
        return _comparison(name, path, entry, read_figure(folder, entry["runs_of"]))


def _comparison(name: str, path: Path, entry: Mapping[str, Any], trained: Figure) -> Comparison:
    where = f"{path}: {name}"
    if len(trained.panels) != 1:
        raise ValueError(
            f"{where}: runs_of is {trained.name}, which has {len(trained.panels)} panels; it should have one"
        )
    (curves,) = trained.panels.values()
    policies = list(entry["policies"])
    if unknown := [label for label in policies if label not in curves]:
        raise ValueError(f"{where}: {trained.name} has {', '.join(curves)}, but not {', '.join(map(str, unknown))}")
    if not policies or len({entry["start"], *policies}) != len(policies) + 1:
        raise ValueError(f"{where}: start is {entry['start']!r} and policies {policies}; all should differ")
    trained = replace(
        trained, panels={panel: {label: curves[label] for label in policies} for panel in trained.panels}
    )
    files = {key: path.parent / entry[key] for key in ("generate", "winrate")}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"{where} names {file.name}, which is not there")
    seeds = [operator.index(seed) for seed in entry["seeds"]]
    return Comparison(name, entry["title"], seeds, trained, entry["start"], policies, **files)


class WinRates(NamedTuple):
    """Win rates of pairs of policies, as `trl_apa.winrate.win_rate` returns each.

    Args:
        judge: who gave the verdicts, for people.
        confidence: of the intervals.
        seeds: name of a pair to the seed of the runs to its win rate.
        overall: name of a pair to its win rate over all seeds. Answers to one prompt stay together in its interval,
            whatever run they are of; that another seed could give another policy is not in it.
    """

    judge: str
    confidence: float
    seeds: dict[str, dict[int, dict[str, float]]]
    overall: dict[str, dict[str, float]]


def summarize(judged: Judged, judge: str, bootstrap_seed: int = 0, confidence: float = 0.95) -> WinRates:
    """Win rates for each seed and over all.

    Raises:
        ValueError: if the judge gave no verdict on a pair of policies.
    """

    def rate(judgements: Sequence[Judgement]) -> dict[str, float]:
        return win_rate(judgements, bootstrap_seed, confidence=confidence)

    seeds, overall = {}, {}
    for (ours, theirs), by_seed in judged.items():
        name = f"{ours} vs {theirs}"
        seeds[name] = {seed: rate(judgements) for seed, judgements in by_seed.items()}
        overall[name] = rate([judgement for judgements in by_seed.values() for judgement in judgements])
    return WinRates(judge, confidence, seeds, overall)


def answers_file(folder: Path, label: str, seed: int) -> Path:
    """Where the answers of a policy are, as `trl-apa generate` writes them."""
    return folder / f"{file_name(label)}-seed{seed}.jsonl"


def verdicts_file(folder: Path, pair: tuple[str, str], seed: int) -> Path:
    """Where the verdicts on a pair of policies are, as `trl-apa winrate` writes them."""
    ours, theirs = map(file_name, pair)
    return folder / f"{ours}-vs-{theirs}-seed{seed}.json"


def sampling_seed(comparison: Comparison, label: str, seed: int) -> int:
    """Of a policy's answers. Policies that drew the same random numbers would win, tie and lose together."""
    return seed * len(comparison.labels) + comparison.labels.index(label)
