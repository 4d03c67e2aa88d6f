"""Rows that have a prompt in common: which they are, and micro-batches in which they meet."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


# A prompt is read once for all of its rows if it has so many tokens, and at least this share of what the responses to
# it have on average: the scores of a response behind a shared prompt are masked, so that half of those among its own
# tokens are computed in vain, which a short prompt does not make up for.
SHORTEST, SMALLEST_SHARE = 16, 0.25


def token_keys(rows: Sequence[Tensor]) -> list[bytes]:
    """The token ids of each row as bytes, equal for equal rows; they reach the host in one transfer."""
    ids = torch.cat([row.long().to(rows[0].device) for row in rows]).cpu()
    return [part.numpy().tobytes() for part in ids.split([len(row) for row in rows])]


def equal_queries(queries: Sequence[Tensor]) -> list[int]:
    """A number for each query, counted from 0, the same for equal ones."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in token_keys(queries)]


def groups_of_equal_size(prompts: Sequence[int], micro_batch_size: int) -> tuple[list[int], int]:
    """Rows of one prompt in groups of one size: the largest that divides a micro-batch and the rows of each prompt.

    Args:
        prompts: a number for each row, the same for rows of one prompt.
        micro_batch_size: rows of a forward pass.

    Returns:
        A number for each row, counted from 0, the same for rows of one group; and the size.
    """
    size = math.gcd(micro_batch_size, *Counter(prompts).values())
    seen: Counter[int] = Counter()
    numbers: dict[tuple[int, int], int] = {}
    groups = []
    for prompt in prompts:
        groups.append(numbers.setdefault((prompt, seen[prompt] // size), len(numbers)))
        seen[prompt] += 1
    return groups, size


def query_keys(queries: Sequence[Tensor]) -> Tensor:
    """8 bytes of a hash of each query, int64 `(B,)` on the CPU: the same for equal queries on all processes."""
    digests = [hashlib.blake2b(key, digest_size=8).digest() for key in token_keys(queries)]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def pays_once(query_tokens: int, num_responses: int, response_tokens: int) -> bool:
    """Whether a prompt costs less if it is read once for all of its responses.

    Args:
        query_tokens: of the prompt.
        num_responses: of a micro-batch to it.
        response_tokens: of all of them.
    """
    return query_tokens >= SHORTEST and query_tokens * num_responses >= SMALLEST_SHARE * response_tokens


def prompts_worth_sharing(equal: Sequence[int], queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[int]:
    """A number for each row, the same for rows of a prompt that costs less if it is read once for all of them.

    Args:
        equal: a number for each row, the same for rows of one prompt: see `equal_queries`.
        queries, responses: of the rows of a micro-batch.
    """
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for number, response in zip(equal, responses, strict=True):
        lengths[number].append(len(response))

    first_own = max(equal) + 1
    return [
        number if pays_once(len(query), len(lengths[number]), sum(lengths[number])) else first_own + row
        for row, (number, query) in enumerate(zip(equal, queries, strict=True))
    ]


def have_common(numbers: Iterable[int]) -> bool:
    """Whether a number occurs twice."""
    numbers = list(numbers)
    return len(set(numbers)) < len(numbers)


def meeting(rows: Sequence[int], prompts: Sequence[int], size: int) -> list[int]:
    """`rows` in an order in which, cut into micro-batches of `size`, rows of one prompt meet as far as they fit.

    The largest groups are placed first, each in the fullest micro-batch that has room for all of it, or where there
    is none split between the emptiest ones. As they are if no prompt occurs twice.

    Args:
        rows: of one optimizer step, or of one iteration.
        prompts: a number for each row of the iteration, the same for rows of one prompt.
        size: rows of a micro-batch; the last has what remains.
    """
    if not have_common(prompts[row] for row in rows):
        return list(rows)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[prompts[row]].append(row)
    rooms = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
    cuts: list[list[int]] = [[] for _ in rooms]
    for group in sorted(groups.values(), key=len, reverse=True):
        while group:
            fitting = [number for number, room in enumerate(rooms) if room >= len(group)]
            if fitting:
                chosen = min(fitting, key=rooms.__getitem__)
            else:
                chosen = max(range(len(rooms)), key=rooms.__getitem__)
            placed, group = group[: rooms[chosen]], group[rooms[chosen] :]
            cuts[chosen] += placed
            rooms[chosen] -= len(placed)
    return [row for cut in cuts for row in cut]
