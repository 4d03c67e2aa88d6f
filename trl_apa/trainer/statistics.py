"""What `step` reports: a flat dict of floats and arrays, over counted response tokens only (`docs/statistics.md`)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_apa.algorithms.kl import kl_k1, kl_k3
from trl_apa.algorithms.losses import log_normalizer
from trl_apa.algorithms.masking import keep_counted, masked_mean, masked_sum, masked_var
from trl_apa.rollout.batch import Rollouts


@dataclass
class UpdateRecord:
    """What the forward and backward passes of one iteration leave behind for the statistics, as tensors on the device.

    Args:
        logprobs_BR, entropy_BR: nats, as each row's policy was when the row was first visited.
        observing: whether rows are visited for the first time.
        optimizer_steps: for each optimizer step, statistics that add up over its micro-batches and processes.
        grad_norms: for each optimizer step, the norms before clipping.
        skipped: whether the last optimizer step was left out.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor
    observing: bool = True
    optimizer_steps: list[dict[str, Tensor]] = field(default_factory=list)
    grad_norms: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: bool = False

    @classmethod
    def empty(cls, like_BR: Tensor) -> "UpdateRecord":
        zeros_BR = torch.zeros_like(like_BR, dtype=torch.float32)
        return cls(zeros_BR, zeros_BR.clone())

    def observe(self, rows: Tensor, outputs: dict[str, Tensor]) -> None:
        """Keep the policy's log-probs and entropies at `rows`."""
        width = outputs["logprobs"].shape[1]
        self.logprobs_BR[rows, :width] = outputs["logprobs"].detach().float()
        self.entropy_BR[rows, :width] = outputs["entropy"].float()

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add a micro-batch's share to the current optimizer step."""
        step = self.optimizer_steps[-1]
        for name, value in stats.items():
            step[name] = step[name] + value if name in step else value

    def mean_grad_norms(self) -> dict[str, float]:
        return _mean_of_steps(self.grad_norms)

    def mean_losses(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean over optimizer steps; `reduce_sum` adds a tensor up over the processes."""
        names = sorted(set(self.optimizer_steps[0]).intersection(*self.optimizer_steps))
        table = torch.stack([torch.stack([step[name].float() for name in names]) for step in self.optimizer_steps])
        means = reduce_sum(table.mean(dim=0)).tolist()
        return dict(zip(names, means, strict=True))


class StageTimer:
    """Wall-clock seconds of each stage of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds[stage] = time.perf_counter() - start

    def as_statistics(self, num_tokens: int) -> dict[str, float]:
        """`time/apa/<stage>` and the total in seconds; this process's query and response tokens a second."""
        total = time.perf_counter() - self.start
        stats = {f"time/apa/{stage}": seconds for stage, seconds in self.seconds.items()}
        return {**stats, "time/apa/total": total, "time/apa/tokens_per_second": num_tokens / total}


def gather_rollouts(
    rollouts: Rollouts, record: UpdateRecord, accelerator: Accelerator
) -> tuple[Rollouts, Tensor, Tensor]:
    """Everything measured per token, of all processes, in one collective.

    Returns:
        The rollouts without queries and responses, `logprobs_BR` and `entropy_BR`. Rows without a counted token are
        still among them: see `counted_rows`.
    """
    names = ["ref_logprobs_BR", "rewards_BR", "advantages_BR"]
    optional = ("values_BR", "returns_BR", "old_logprobs_BR", "sampling_logprobs_BR", "kl_penalty_BR")
    names += [name for name in (*optional, "non_score_rewards_BR") if getattr(rollouts, name) is not None]
    fields = [getattr(rollouts, name) for name in names] + [record.logprobs_BR, record.entropy_BR]
    stacked_BRF = torch.stack([rollouts.response_mask_BR.float(), *fields], dim=-1)
    stacked_BRF = accelerator.gather(accelerator.pad_across_processes(stacked_BRF, dim=1))
    mask_BR, *gathered = stacked_BRF.unbind(dim=-1)
    everywhere = Rollouts(
        queries=[],
        responses=[],
        response_mask_BR=mask_BR.bool(),
        scores_B=accelerator.gather(rollouts.scores_B),
        **dict(zip(names, gathered[: len(names)], strict=True)),
    )
    return everywhere, gathered[-2], gathered[-1]


def counted_rows(rollouts: Rollouts, *tensors: Tensor) -> list[Any]:
    """The arguments without the rows of which no token counts: responses that were left out have no statistics."""
    kept_B = rollouts.response_mask_BR.any(dim=1)
    fields: dict[str, Any] = {
        name: value[kept_B] for name, value in vars(rollouts).items() if isinstance(value, Tensor)
    }
    return [replace(rollouts, **fields), *(tensor[kept_B] for tensor in tensors)]


def rollout_statistics(
    rollouts: Rollouts,
    logprobs_BR: Tensor,
    entropy_BR: Tensor,
    query_lengths_B: Tensor,
    ended_B: Tensor,
    kl_coef: float | None,
) -> dict[str, float]:
    """Statistics of one iteration's rollouts, gathered from all processes.

    Args:
        rollouts: with scores, rewards, ref_logprobs, advantages, and with a value model values and returns; queries
            and responses are not read.
        logprobs_BR, entropy_BR: of the policy, nats.
        query_lengths_B: tokens.
        ended_B: bool, whether a response ended with EOS.
        kl_coef: lambda, in units of the advantages; None with PPO, whose coefficient is in units of the reward.
    """
    mask = rollouts.response_mask_BR
    lengths_B = mask.sum(dim=1).float()
    k1_BR = keep_counted(kl_k1(logprobs_BR, rollouts.ref_logprobs_BR), mask)
    k3_BR = keep_counted(kl_k3(logprobs_BR, rollouts.ref_logprobs_BR), mask)
    values, returns = rollouts.values_BR, rollouts.returns_BR
    stats = {
        "objective/kl": k1_BR.sum(dim=1).mean(),
        "objective/kl_per_token": masked_mean(k1_BR, mask),
        "objective/kl_k3": k3_BR.sum(dim=1).mean(),
        "objective/kl_k3_per_token": masked_mean(k3_BR, mask),
        "objective/entropy": -keep_counted(logprobs_BR, mask).sum(dim=1).mean(),
        "apa/policy/entropy": masked_mean(entropy_BR, mask),
        "apa/policy/advantages_mean": masked_mean(rollouts.advantages_BR, mask),
        "apa/mean_scores": rollouts.scores_B.mean(),
        "apa/std_scores": unbiased_std(rollouts.scores_B),
        "tokens/queries_len_mean": query_lengths_B.float().mean(),
        "tokens/queries_len_std": unbiased_std(query_lengths_B.float()),
        "tokens/responses_len_mean": lengths_B.mean(),
        "tokens/responses_len_std": unbiased_std(lengths_B),
        "tokens/eos_share": ended_B.float().mean(),
        "tokens/counted": masked_sum(torch.ones_like(k1_BR), mask),
    }
    for name, tensor_BR in (("returns", returns), ("val", values)):
        if tensor_BR is not None:
            stats[f"apa/{name}/mean"] = masked_mean(tensor_BR, mask)
            stats[f"apa/{name}/var"] = masked_var(tensor_BR, mask)
    if kl_coef is not None:
        stats["apa/policy/log_normalizer"] = log_normalizer(rollouts.advantages_BR, mask, kl_coef)
    # One wait for the device instead of one a statistic.
    table = torch.stack([value.to(mask.device).float() for value in stats.values()])
    return dict(zip(stats, table.tolist(), strict=True))


def equal_scores_share(scores_B: Tensor, prompts_B: Tensor) -> float:
    """Share of the prompts whose responses all have the same score, so that comparing them teaches nothing.

    Args:
        scores_B: one a response, reward units.
        prompts_B: integers, the same for responses to one prompt.
    """
    different, group_B = prompts_B.unique(return_inverse=True)
    highest_G, lowest_G = (
        scores_B.new_zeros(len(different)).scatter_reduce(0, group_B, scores_B, reduce, include_self=False)
        for reduce in ("amax", "amin")
    )
    return float((highest_G == lowest_G).float().mean())


def sampling_difference(
    rollouts: Rollouts, record: UpdateRecord, first_rows: list[int], accelerator: Accelerator
) -> dict[str, float]:
    """How far the log-probs noted during sampling are from those of the update's own passes, before any update.

    Rounding alone in float32; more in lower precision, or where the two passes differ in more than rounding.

    Args:
        rollouts: of this process.
        record: of the iteration, which has the log-probs of each row's first visit.
        first_rows: those of the first optimizer step, visited before the policy moved.
        accelerator: of the run.

    Returns:
        `sampling/logprob_difference_mean` and `_max` over the counted tokens of all processes, nats; nothing unless
        the log-probs were noted. Tokens of which an engine does not know it are left out.
    """
    if rollouts.sampling_logprobs_BR is None:
        return {}
    rows = slice(None) if rollouts.old_logprobs_BR is not None else first_rows
    passed_BR = record.logprobs_BR if rollouts.old_logprobs_BR is None else rollouts.old_logprobs_BR
    apart_BR = (passed_BR[rows] - rollouts.sampling_logprobs_BR[rows]).abs()
    known_BR = rollouts.response_mask_BR[rows] & ~apart_BR.isnan()
    apart_BR = keep_counted(apart_BR, known_BR)
    count = known_BR.sum().float()
    table = accelerator.gather(torch.stack([apart_BR.sum(), count, apart_BR.max()])[None])
    total, count, _ = table.sum(dim=0).tolist()
    return {
        "sampling/logprob_difference_mean": total / max(count, 1.0),
        "sampling/logprob_difference_max": float(table[:, 2].max()),
    }


def with_classic_names(stats: dict[str, Any], shaped_scores_B: Tensor) -> dict[str, Any]:
    """The statistics of a step, and once more under the names of TRL <= 0.11, where the two mean the same.

    Args:
        stats: under `apa/` and `time/apa/`; classic names among them, of an override of `record_step_stats`, stay.
        shaped_scores_B: of all processes; classic's scores are scaled and clipped.
    """
    classic = {name.replace("apa/", "ppo/"): value for name, value in stats.items() if "apa/" in name}
    classic["ppo/mean_scores"] = float(shaped_scores_B.mean())
    classic["ppo/std_scores"] = float(unbiased_std(shaped_scores_B))
    return {"ppo/policy/clipfrac": 0.0, **classic, **stats}


def rollout_arrays(rollouts: Rollouts, logprobs_BR: Tensor, query_lengths_B: Tensor) -> dict[str, Any]:
    """The values behind the means of `rollout_statistics`, as NumPy arrays that share no memory with the rollouts.

    Args:
        rollouts, logprobs_BR, query_lengths_B: as for `rollout_statistics`.

    Returns:
        `objective/kl_dist` `(B,)`, nats; `objective/logprobs` and `objective/ref_logprobs` `(B, R)`, nats, 0 where no
        token counts, so that sums along a row are those of the response; `apa/policy/advantages` `(N,)` of the counted
        tokens, row by row; `tokens/queries_dist` and `tokens/responses_dist` `(B,)`, tokens. Floats are float32.
    """
    mask = rollouts.response_mask_BR
    logprobs_BR = keep_counted(logprobs_BR, mask)
    ref_logprobs_BR = keep_counted(rollouts.ref_logprobs_BR, mask)
    arrays = {
        "objective/kl_dist": keep_counted(kl_k1(logprobs_BR, ref_logprobs_BR), mask).sum(dim=1),
        "objective/logprobs": logprobs_BR,
        "objective/ref_logprobs": ref_logprobs_BR,
        "apa/policy/advantages": rollouts.advantages_BR[mask],
        "tokens/queries_dist": query_lengths_B,
        "tokens/responses_dist": mask.sum(dim=1),
    }
    return {name: array.contiguous().cpu().numpy() for name, array in arrays.items()}


def unbiased_std(values: Tensor) -> Tensor:
    """Unbiased standard deviation, 0-D; 0 of a single value."""
    return values.std() if len(values) > 1 else torch.zeros(())


def mean_of_numbers(table: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each statistic that is a number, over those rows that have it."""
    names = {name for row in table for name, value in row.items() if isinstance(value, int | float)}
    columns = {name: [row[name] for row in table if name in row] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _mean_of_steps(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    names = sorted(steps[0]) if steps else []
    return {name: float(torch.stack([step[name].float() for step in steps]).mean()) for name in names}
