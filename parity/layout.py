"""Arrays among the statistics, read at the counted response tokens, where the two libraries' layouts say the same.

Classic keeps whole sequences, padding and prompts included, and repeats the update's arrays for every micro-batch.
Ours have a column a response token, or are flat. Both become flat here, row by row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parity.case import Case, Rollouts


PER_TOKEN = ("objective/logprobs", "objective/ref_logprobs")
ADVANTAGES = "ppo/policy/advantages"
RATIO = "ppo/policy/ratio"


def classic_value(case: Case, rollouts: Rollouts, name: str, value: Any) -> Tensor:
    """What classic's `step` returned under `name`, as comparable to `our_value`."""
    array = torch.tensor(value, dtype=torch.float64)
    columns = classic_columns(case, rollouts)
    if name in PER_TOKEN:
        return torch.cat([array[row, columns[row]] for row in range(len(columns))])
    if name == ADVANTAGES:
        per_row = dict(first_visits(case, rollouts, array))
        return torch.cat([per_row[row] for row in range(len(columns))])
    if name == RATIO:
        return torch.stack([torch.cat(tokens).mean() for tokens in micro_batches(case, rollouts, array)]).mean()
    return array


def our_value(case: Case, rollouts: Rollouts, name: str, value: Any) -> Tensor:
    """What our `step` returned under `name`, at the counted tokens where it has a column for each token."""
    array = torch.tensor(value, dtype=torch.float64)
    if name in PER_TOKEN:
        shift = 1 if case.is_encoder_decoder else 0  # our columns leave out the decoder's start token
        tokens = counted_tokens(rollouts)
        return torch.cat([array[row, tokens[row] - shift] for row in range(len(tokens))])
    return array


def counted_tokens(rollouts: Rollouts) -> list[Tensor]:
    """Of each response the positions of the tokens that count."""
    masks = rollouts.masks or [[1] * len(response) for response in rollouts.responses]
    return [torch.tensor(mask).nonzero()[:, 0] for mask in masks]


def classic_columns(case: Case, rollouts: Rollouts) -> list[Tensor]:
    """Of each row the columns of the counted tokens; column i belongs to token i + 1 of the padded sequence."""
    tokens = counted_tokens(rollouts)
    if case.is_encoder_decoder:
        return [positions - 1 for positions in tokens]
    lengths = [
        len(query) + len(response) for query, response in zip(rollouts.queries, rollouts.responses, strict=True)
    ]
    columns = []
    for query, length, positions in zip(rollouts.queries, lengths, tokens, strict=True):
        padding = max(lengths) - length if case.padding_side == "left" else 0
        columns.append(padding + len(query) - 1 + positions)
    return columns


def micro_batches(case: Case, rollouts: Rollouts, array: Tensor) -> Iterator[list[Tensor]]:
    """The counted tokens of each row of each micro-batch of the update, in the order of the visits."""
    columns, size = classic_columns(case, rollouts), case.options["mini_batch_size"]
    visits = [row for order in rollouts.orders for row in order]
    width = max_width(case, rollouts)
    for start, values in zip(range(0, len(visits), size), array.flatten().split(size * width), strict=False):
        rows = visits[start : start + size]
        yield [values.view(size, width)[place, columns[row]] for place, row in enumerate(rows)]


def first_visits(case: Case, rollouts: Rollouts, array: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each row with its counted tokens in the first epoch."""
    values = (row for batch in micro_batches(case, rollouts, array) for row in batch)
    return zip(rollouts.orders[0], values, strict=False)


def max_width(case: Case, rollouts: Rollouts) -> int:
    """Columns of classic's arrays: one less than the tokens of the longest sequence."""
    prompts = [[] for _ in rollouts.queries] if case.is_encoder_decoder else rollouts.queries
    return max(len(prompt) + len(response) for prompt, response in zip(prompts, rollouts.responses, strict=True)) - 1
