"""Rows of data sets that name their columns otherwise, as rows with `prompt` and what belongs to it."""

from collections.abc import Callable
from typing import Any

from trl_apa.data.pairs import Demonstration, Preference
from trl_apa.data.sources import Row, text_column
from trl_apa.data.stack_exchange import pairs_of_row, prompt_of_row
from trl_apa.data.tldr import comparison_of_row, demonstration_of_row, tldr_prompt


def stack_exchange_rows(row: Row) -> list[Row]:
    """A question with its pairs of answers, one row a pair, or the question alone."""
    if row.fields.keys() & {"response_j", "answers"}:
        return [_as_row(row, pair, "question", "response_j", "response_k", "answers") for pair in pairs_of_row(row)]
    return [_with(row, {"prompt": prompt_of_row(row)}, "question")]


def tldr_rows(row: Row) -> list[Row]:
    """A post with its author's summary, with two summaries of which people preferred one, or alone."""
    if "label" in row.fields:
        return [_as_row(row, demonstration_of_row(row), "label")]
    if "chosen" in row.fields:
        return [_as_row(row, comparison_of_row(row))]
    return [_with(row, {"prompt": tldr_prompt(text_column(row, "prompt"))})]


LAYOUTS: dict[str, Callable[[Row], list[Row]]] = {"stack_exchange": stack_exchange_rows, "tldr": tldr_rows}


def rows_in_layout(row: Row, layout: str) -> list[Row]:
    """The rows that a row of `layout` (a key of `LAYOUTS`) stands for; a bad one keeps its number and says why."""
    if row.problem is not None:
        return [row]
    try:
        return LAYOUTS[layout](row)
    except ValueError as error:
        return [row._replace(fields={}, problem=str(error))]


def _as_row(row: Row, found: Preference | Demonstration, *replaced: str) -> Row:
    texts = {name: text for name, text in found._asdict().items() if name != "row"}
    return _with(row, texts, *replaced)


def _with(row: Row, texts: dict[str, Any], *replaced: str) -> Row:
    others = {name: value for name, value in row.fields.items() if name not in replaced}
    return row._replace(fields={**others, **texts})
