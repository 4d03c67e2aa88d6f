"""What every data set is read into: preference pairs, or demonstrations; and the rows that TRL's trainers take."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trl_apa.data.sources import BadRow, Row, iter_rows, parse_rows, report


class Preference(NamedTuple):
    """A prompt and two responses to it, as text: `prompt + chosen` is the complete text.

    Args:
        prompt: everything before the response; in the HH layout it ends with the `Assistant:` marker.
        chosen: the response that people preferred, with the space that followed the marker.
        rejected: the other one.
        row: number of the row it came from, from 1.
    """

    prompt: str
    chosen: str
    rejected: str
    row: int


class Demonstration(NamedTuple):
    """A prompt and a response for training, as text: `prompt + completion` is the complete text.

    Args:
        prompt: everything before the response.
        completion: the response.
        row: number of the row it came from, from 1.
    """

    prompt: str
    completion: str
    row: int


@dataclass(frozen=True)
class Preferences:
    """What was read from one source.

    Args:
        source: the file or the data set.
        pairs: the preference pairs, in the order of their rows.
        bad_rows: the rows that hold none.
    """

    source: str
    pairs: list[Preference]
    bad_rows: list[BadRow]

    def report(self, examples: int = 3) -> str:
        """How many pairs were read, and for each kind of bad row how many there are and where the first ones stand."""
        return report(self.source, len(self.pairs), "preference pairs", self.bad_rows, examples)


@dataclass(frozen=True)
class Demonstrations:
    """What was read from one source.

    Args:
        source: the file or the data set.
        rows: the demonstrations, in the order of their rows.
        bad_rows: the rows that hold none.
    """

    source: str
    rows: list[Demonstration]
    bad_rows: list[BadRow]

    def report(self, examples: int = 3) -> str:
        """As [`Preferences.report`]."""
        return report(self.source, len(self.rows), "demonstrations", self.bad_rows, examples)


def read_pairs(
    source: str | Path,
    parse: Callable[[Row], Iterable[Preference]],
    *,
    name: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    limit: int | None = None,
    strict: bool = False,
) -> Preferences:
    """Read a local file or a hub data set, whose layout `parse` knows.

    Args:
        source, name, data_dir, split: see [`~trl_apa.data.sources.iter_rows`].
        parse: one row to its pairs; a ValueError is why it has none.
        limit: stop after this many rows.
        strict: raise at the first bad row instead of listing it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row holds a preference pair or, with `strict`, some row does not.
    """
    rows = iter_rows(source, name=name, data_dir=data_dir, split=split)
    preferences = Preferences(str(source), *parse_rows(rows, parse, str(source), limit, strict))
    if not preferences.pairs:
        raise ValueError(f"no preference pair found\n{preferences.report()}")
    return preferences


def checked_pair(prompt: str, chosen: str, rejected: str, row: int) -> Preference:
    """The pair, if it says anything.

    Raises:
        ValueError: a text is blank, or the responses are the same.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    for column, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise ValueError(f"the {column} response is empty")
    if chosen == rejected:
        raise ValueError("the two responses are the same")
    return Preference(prompt, chosen, rejected, row)


def prompts(rows: Iterable[Preference | Demonstration]) -> list[str]:
    """The different prompts, in order of first appearance."""
    return list(dict.fromkeys(row.prompt for row in rows))


def sft_rows(rows: Iterable[Preference | Demonstration]) -> list[dict[str, str]]:
    """TRL's prompt-completion layout, of pairs with the preferred responses, each (prompt, completion) once."""
    distinct = dict.fromkeys(
        (row.prompt, row.chosen if isinstance(row, Preference) else row.completion) for row in rows
    )
    return [{"prompt": prompt, "completion": completion} for prompt, completion in distinct]


def preference_rows(pairs: Iterable[Preference]) -> list[dict[str, str]]:
    """TRL's preference layout with an explicit prompt."""
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
