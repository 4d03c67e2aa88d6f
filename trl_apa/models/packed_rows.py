"""Which keys the sequences of a packed row attend to, as kernels and masks say it: made once a micro-batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_apa.rollout.batch import send


class Bounds(NamedTuple):
    """The sequences of a row as a kernel for sequences of several lengths wants them.

    Args:
        query_ends, key_ends: 0, and how many queries, or keys, there are up to the end of each sequence, int32
            `(S + 1,)`.
        most_queries, most_keys: of a sequence.
        key_index: where in the row the keys of all sequences are, int64 `(K,)`: those of a shared prompt are there
            once for each response. None where every sequence attends to itself alone.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    key_index: Tensor | None


class PackedRow:
    """The sequences of a packed row, and what follows from their lengths, the same for all layers.

    Args:
        sequence_lengths: tokens of each sequence in the one row.
        prompt_lengths: of each sequence, how many tokens of the last one with a prompt it continues; 0 where it has
            its own. None where no prompt is shared.
    """

    def __init__(self, sequence_lengths: Sequence[int], prompt_lengths: Sequence[int] | None = None):
        self.sequence_lengths = tuple(sequence_lengths)
        self.prompt_lengths = tuple(prompt_lengths or (0,) * len(self.sequence_lengths))
        self.is_shared = any(self.prompt_lengths)
        self.key_lengths = tuple(map(sum, zip(self.sequence_lengths, self.prompt_lengths, strict=True)))
        self._bounds: dict[torch.device, Bounds] = {}
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}

    def window(self, tokens: int | None) -> int | None:
        """A window of so many tokens where it hides one of a sequence from another; else None."""
        return tokens if tokens is not None and max(self.key_lengths) > tokens else None

    def bounds(self, device: torch.device) -> Bounds:
        """The same on a device, made when the first layer asks; nothing waits for the device."""
        if device not in self._bounds:
            queries, keys = self.sequence_lengths, self.key_lengths
            index = send(self._key_index(), device) if self.is_shared else None
            ends = send(_ends(queries), device), send(_ends(keys), device)
            self._bounds[device] = Bounds(*ends, max(queries), max(keys), index)
        return self._bounds[device]

    def _key_index(self) -> Tensor:
        pieces, start, of_prompt = [], 0, 0
        for length, prompt in zip(self.sequence_lengths, self.prompt_lengths, strict=True):
            if prompt == 0:
                of_prompt = start
            pieces += [torch.arange(of_prompt, of_prompt + prompt), torch.arange(start, start + length)]
            start += length
        return torch.cat(pieces)

    def masks(self, window: int | None, like: Tensor) -> list[Tensor | None]:
        """What is added to the scores of each sequence, `(1, 1, queries, keys)`; None where it is plainly causal.

        All are views of one tensor in the type of `like`, so that SDPA makes no copies, and all layers keep the same
        one for the backward pass.

        Args:
            window: tokens that a token sees, itself included; None for all before it.
            like: queries.
        """
        pairs = list(zip(self.sequence_lengths, self.prompt_lengths, strict=True))
        needs = [prompt > 0 or (window is not None and length > window) for length, prompt in pairs]
        masked = [pair for pair, needed in zip(pairs, needs, strict=True) if needed]
        if not masked:
            return [None] * len(pairs)
        longest, before = (max(side) for side in zip(*masked, strict=True))
        key = window, like.dtype, like.device
        if key not in self._masks:
            self._masks[key] = causal_mask(before, longest, window, like)
        mask = self._masks[key]
        return [
            mask[:, :, :length, before - prompt : before + length] if needed else None
            for (length, prompt), needed in zip(pairs, needs, strict=True)
        ]


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def causal_mask(prompt_length: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where a response of `length` tokens sees a token of `prompt_length` before it and of itself, -inf where not.

    Rows without the last tokens, and columns without the first of the prompt, are the mask of a shorter one.

    Args:
        prompt_length, length: tokens.
        window: tokens that a token sees, itself included, as in transformers' masks; None for all before it.
        like: in whose type, and on whose device.

    Returns:
        `(1, 1, length, prompt_length + length)`.
    """
    hidden = like.new_full((length, prompt_length + length), -torch.inf)
    mask = hidden.triu(prompt_length + 1)
    if window is not None:
        mask = mask + hidden.tril(prompt_length - window)
    return mask[None, None]
