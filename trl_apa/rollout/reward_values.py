"""Results of reward functions as numbers; errors name the function if a value is no number or too large."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trl_apa.rollout.reward_calls import failure
from trl_apa.trainer.validation import LARGEST_SCORE
from trl_apa.values import shown, why_unreadable


LARGEST_FLOAT32 = torch.finfo(torch.float32).max
A_NUMBER = f"it should be a finite number in float32, which ends at {LARGEST_FLOAT32:.2g}"
# Their elements are no values, or come in no order.
NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, AbstractSet)
# Of one response: a number, or one a token.
Value = float | list[float]


def read_answer(name: str, answer: Any, lengths: Sequence[int], skip_unscored: bool) -> list[Value]:
    """The values of one reward function, reward units, a number or a list of numbers for each response.

    Args:
        name: the function's.
        answer: its result: a list, tensor, array or series of numbers, None or NaN, or of lists of these.
        lengths: tokens of each response.
        skip_unscored: a response with None or NaN gets NaN, instead of being refused.

    Raises:
        ValueError: naming the function, and the row and value that is no finite number in float32; if there is another
            number of values than responses or tokens.
    """
    try:
        values = [_as_list(value) for value in _rows(name, answer)]
    except ValueError:
        raise
    except BaseException as error:  # any error that a custom object raises when it is read
        raise failure(name, error) from error
    if len(values) != len(lengths):
        raise ValueError(f"reward function {name} gave {len(values)} values for {len(lengths)} responses")
    if len({isinstance(value, list) for value in values if value is not None and not _is_nan(value)}) > 1:
        raise ValueError(f"reward function {name} gave numbers for some rows and lists for others")
    return [
        _read_row(name, row, value, length, skip_unscored)
        for row, (value, length) in enumerate(zip(values, lengths, strict=True))
    ]


def check_sizes(names: Sequence[str], values: Sequence[Sequence[Value]], weights: Sequence[float]) -> None:
    """Refuse rewards that are finite, but too large to learn from as weighted.

    Args:
        names: of the functions.
        values: for each function what `read_answer` gave.
        weights: of the functions.

    Raises:
        ValueError: naming function, row and value.
    """
    for name, column, weight in zip(names, values, weights, strict=True):
        for row, value in enumerate(column):
            largest = max((total(value), *(value if isinstance(value, list) else ())), key=abs)
            if abs(weight * largest) > LARGEST_SCORE:
                raise ValueError(
                    f"reward function {name} gave {largest:g} for row {row}, {weight * largest:g} with its weight; it "
                    f"should be at most {LARGEST_SCORE:g} in size: its square overflows float32"
                )
    for row, of_row in enumerate(zip(*values, strict=True)):
        score = sum(weight * total(value) for weight, value in zip(weights, of_row, strict=True))
        if abs(score) > LARGEST_SCORE:
            raise ValueError(
                f"reward functions {', '.join(names)} gave {score:g} together, with their weights, for row {row}; it "
                f"should be at most {LARGEST_SCORE:g} in size: its square overflows float32"
            )


def total(value: Value) -> float:
    """The value of a response, that of its tokens added up, reward units."""
    return sum(value) if isinstance(value, list) else value


def as_float(value: Any) -> float | None:
    """A number of any type, as a float; NaN for None, and None if it is not a number or beyond float32."""
    if value is None:
        return math.nan
    if not isinstance(value, Real | Decimal):
        return None
    try:
        read = float(value)
    except Exception:  # an int of 400 digits, say
        return None
    return None if abs(read) > LARGEST_FLOAT32 else read


def _rows(name: str, answer: Any) -> list[Any]:
    rows, problem = None, why_unreadable(answer) if isinstance(answer, Tensor) else None
    try:
        if isinstance(answer, NO_LISTS) or problem is not None:
            pass
        elif hasattr(answer, "tolist"):
            rows = answer.tolist()
        elif hasattr(answer, "__len__") and len(getattr(answer, "shape", (0,))) == 1:  # no table
            rows = list(answer)
    except Exception as error:
        raise ValueError(
            f"reward function {name} gave a {type(answer).__name__} that cannot be read: {error}"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"reward function {name} gave {problem or shown(answer)}; it should give a list of numbers")
    return rows


def _as_list(value: Any) -> Any:
    """Tensors, arrays and the like as Python's numbers, in a list if there are several; anything else as it is."""
    try:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list | tuple | deque | range):
            if _are_plain(value):
                return list(value)
            return [element.tolist() if hasattr(element, "tolist") else element for element in value]
    except Exception:  # a tensor that cannot be read
        pass
    return value


def _read_row(name: str, row: int, value: Any, length: int, skip_unscored: bool) -> Value:
    if not isinstance(value, list):
        return _read_number(name, f"row {row}", value, skip_unscored)
    if len(value) != length:
        raise ValueError(f"reward function {name} gave {len(value)} values for the {length} tokens of row {row}")
    if _are_plain(value) and sum(map(abs, value)) <= LARGEST_FLOAT32:
        return list(map(float, value))  # one by one, thousands of tokens take long
    read = [
        _read_number(name, f"token {token} of row {row}", element, skip_unscored)
        for token, element in enumerate(value)
    ]
    if any(math.isnan(element) for element in read):
        return math.nan
    if abs(total(read)) > LARGEST_FLOAT32:
        raise ValueError(f"reward function {name} gave {total(read):g} for row {row}, added up; {A_NUMBER}")
    return read


def _read_number(name: str, where: str, value: Any, skip_unscored: bool) -> float:
    read = as_float(value)
    if read is None or (math.isnan(read) and not skip_unscored):
        raise ValueError(f"reward function {name} gave {shown(value)} for {where}; {A_NUMBER}")
    return read


def _are_plain(values: Iterable[Any]) -> bool:
    """Whether they are numbers of Python's own types, none of them an int beyond float64."""
    types = set(map(type, values))
    return types <= {float} or (types <= {float, int, bool} and max(values) < 2**63 and min(values) > -(2**63))


def _is_nan(value: Any) -> bool:
    read = as_float(value)
    return read is not None and math.isnan(read)
