"""Rows cut into forward passes by tokens, into equally many on all processes."""

import warnings
from collections.abc import Callable, Sequence

import torch

from trl_apa.distributed.processes import Processes
from trl_apa.rollout.batch import Layout, Rollouts
from trl_apa.rollout.passes import Pass, RowLengths, balanced_passes, fewest_passes


class TokenBudget:
    """What `tokens_per_micro_batch` makes of the rows of optimizer steps.

    Args:
        processes: of the run, which call the networks equally often.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self._has_warned = False

    def passes(
        self,
        rollouts: Rollouts,
        steps: Sequence[list[int]],
        budget: int,
        layout_for: Callable[..., Layout],
        groups: Sequence[int] | None = None,
    ) -> list[list[list[int]]]:
        """For each optimizer step the rows of its forward passes, of at most `budget` tokens each.

        To be called by all processes, with equally many steps. Each step has as many passes as the process with the
        most tokens needs; each process fills them with about as many tokens each.

        Args:
            rollouts: whose rows they are.
            steps: the rows of each step.
            budget: tokens that a network reads in a pass, pads included; 0: as many passes as possible.
            layout_for: tokens of the longest row, and whether rows `share` a prompt, to the layout of a pass.
            groups: a number for each row; rows with the same number are read together. By default none are.
        """
        lengths = RowLengths.of(rollouts, layout_for)
        atoms = [_together(rows, groups) for rows in steps]
        if budget:
            self._warn_of_long_rows(lengths, atoms, budget)
        needed = [len(fewest_passes(lengths, of_step, budget)) for of_step in atoms]
        counts = self._largest(needed, [len(of_step) for of_step in atoms])
        return [balanced_passes(lengths, of_step, budget, count) for of_step, count in zip(atoms, counts, strict=True)]

    def _largest(self, needed: list[int], possible: list[int]) -> list[int]:
        """The most passes that a process needs in each step, but no more than every process can make."""
        accelerator = self.processes.accelerator
        table = accelerator.gather(torch.tensor([[needed, possible]], device=accelerator.device)).cpu()
        largest: list[int] = torch.minimum(table[:, 0].amax(dim=0), table[:, 1].amin(dim=0)).tolist()
        return largest

    def _warn_of_long_rows(self, lengths: RowLengths, steps: list[list[list[int]]], budget: int) -> None:
        longest = max((Pass.of(lengths, [atom]).tokens, len(atom)) for atoms in steps for atom in atoms)
        if longest[0] <= budget or self._has_warned:
            return
        self._has_warned = True
        what = "a row has" if longest[1] == 1 else f"{longest[1]} rows that the loss compares have"
        text = f"tokens_per_micro_batch={budget}, but {what} {longest[0]} tokens: what is longer has a pass of its own"
        warnings.warn(text, UserWarning, stacklevel=2)


def _together(rows: list[int], groups: Sequence[int] | None) -> list[list[int]]:
    if groups is None:
        return [[row] for row in rows]
    of_group: dict[int, list[int]] = {}
    for row in rows:
        of_group.setdefault(groups[row], []).append(row)
    return list(of_group.values())
