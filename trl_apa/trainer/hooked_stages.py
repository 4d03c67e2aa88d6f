"""Stages of `step` that a subclass overrides with a method of classic's, called as classic called it."""

from typing import Any

import torch
from torch import Tensor

from trl_apa.algorithms.kl import kl_k1
from trl_apa.algorithms.masking import keep_counted, masked_mean, masked_var
from trl_apa.classic.core import convert_to_scalar, flatten_dict, stats_to_np
from trl_apa.rollout.batch import Rollouts
from trl_apa.trainer.iteration import Iteration
from trl_apa.trainer.preparation import learned_scores, shaped_scores


# Statistics of the complete iteration, which those of micro-batches do not replace.
OF_ROLLOUTS = {"policy/advantages", "policy/advantages_mean", "returns/mean", "returns/var", "val/mean", "val/var"}


def rewards_by_override(
    trainer: Any, rollouts: Rollouts, ended_B: Tensor, full_logprobs: tuple[Tensor, Tensor] | None
) -> None:
    """Fill in the rewards, their part that is no score, and the KL, as `trainer.compute_rewards` says.

    Args:
        trainer: an `APATrainer`.
        rollouts: with scores and both log-probs.
        ended_B: bool, whether a response ended with EOS.
        full_logprobs: policy's and reference's of the whole vocabulary, `(B, R, V)`, which replace those of the
            sampled tokens.

    Raises:
        ValueError: if rewards were given token by token, or the override returns something else than it should.
    """
    if rollouts.given_rewards_BR is not None:
        raise ValueError(
            "compute_rewards or _kl_penalty is overridden, and a reward function gives rewards token by token: they "
            "get one score a response; let the reward function return one number a response"
        )
    learned_scores(rollouts, ended_B, trainer.args, trainer.run_state)
    scores_B = shaped_scores(rollouts, ended_B, trainer.args, trainer.run_state)
    logprobs = full_logprobs or (rollouts.old_logprobs_BR, rollouts.ref_logprobs_BR)

    def called(*tensors: Tensor) -> tuple[Tensor, ...]:
        if not len(tensors[0]):  # no response of this process was scored
            return (tensors[-1],) * 3
        returned = trainer.compute_rewards(*tensors)
        if isinstance(returned, tuple | list) and len(returned) == 2:  # before TRL 0.7 there was no KL among them
            returned = (*returned, torch.stack([trainer._kl_penalty(*row) for row in zip(*tensors[1:3], strict=True)]))
        return _checked("compute_rewards", returned, 3)

    results = _on_counted_rows(trainer, called, rollouts.response_mask_BR, scores_B, *logprobs)
    rollouts.rewards_BR, rollouts.non_score_rewards_BR, rollouts.kl_penalty_BR = results


def advantages_by_override(trainer: Any, rollouts: Rollouts) -> None:
    """Replace the values, and fill in advantages and returns, as `trainer.compute_advantages` says."""

    def called(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _checked("compute_advantages", trainer.compute_advantages(*tensors), 3)

    results = _on_counted_rows(trainer, called, rollouts.response_mask_BR, rollouts.values_BR, rollouts.rewards_BR)
    rollouts.values_BR, rollouts.advantages_BR, rollouts.returns_BR = results


def _on_counted_rows(trainer: Any, function: Any, mask_BR: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Three tensors `(B, R)` that `function` makes of the rows with a counted token, float32, 0 behind the mask.

    It gets 0 behind the mask, too. Work that fails on one process fails on all.
    """
    kept_B = mask_BR.any(dim=1)
    mask = mask_BR[kept_B]
    given = [_counted(tensor[kept_B], mask) for tensor in tensors]
    with torch.no_grad():
        found = trainer.processes.together(lambda: function(*given, mask.long()))
    results = []
    for tensor in found:
        if tensor.shape != mask.shape:
            raise ValueError(f"an override returned a tensor of shape {tuple(tensor.shape)}, not {tuple(mask.shape)}")
        result = torch.zeros_like(mask_BR, dtype=torch.float32)
        result[kept_B] = keep_counted(tensor.detach().float(), mask)
        results.append(result)
    return tuple(results)


def _counted(tensor: Tensor, mask_BR: Tensor) -> Tensor:
    """`(B, R)` or `(B, R, V)` with 0 behind the mask; `(B,)` as it is."""
    mask = mask_BR if tensor.dim() < 3 else mask_BR[..., None].expand_as(tensor)
    return tensor if tensor.dim() == 1 else keep_counted(tensor, mask)


def _checked(name: str, returned: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(returned, tuple | list) or len(returned) != count:
        what = f"{len(returned)} results" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise ValueError(f"{name} is overridden and returned {what}; it should return {count}, as in TRL 0.11")
    return tuple(returned)


def loss_by_override(
    trainer: Any, outputs: dict[str, Tensor], batch: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Policy loss, weighted value loss and statistics of a micro-batch, as `trainer.loss` says.

    The override returns means over the tokens of the micro-batch. Each counts by the micro-batch's share of the
    tokens of the optimizer step, so that micro-batches add up to the mean of the step.

    Args:
        trainer: an `APATrainer`.
        outputs: `logprobs`, `values`, `logits`, with gradient; without a value model the override gets None for values
            and returns.
        batch: of `Iteration.batch`.
    """
    mask_BR = batch["response_mask"]
    trainer._ref_logprobs_of_loss = batch["ref_logprobs"]
    share = mask_BR.sum() / batch["num_tokens"]
    if "num_responses" in batch:
        # What is divided by it is multiplied by the share of the tokens below.
        trainer._num_responses_of_loss = (share * batch["num_responses"]).clamp(min=1e-8)
    try:
        returned = trainer.loss(
            batch["old_logprobs"],
            batch.get("values"),
            outputs["logits"],
            outputs.get("values"),
            outputs["logprobs"],
            mask_BR.long(),
            batch["advantages"],
            batch.get("returns"),
        )
    finally:
        trainer._ref_logprobs_of_loss = trainer._num_responses_of_loss = None
    policy_term, value_term, stats = _checked("loss", returned, 3)
    numbers = {f"apa/{name}": share * number for name, number in _numbers(flatten_dict(stats), mask_BR).items()}
    return share * policy_term, share * value_term, numbers


def _numbers(stats: dict[str, Any], mask_BR: Tensor) -> dict[str, Tensor]:
    """One number of each statistic: of a tensor `(B, R)` the mean over the counted tokens."""
    numbers = {}
    for name, value in stats.items():
        if name in OF_ROLLOUTS:
            continue
        tensor = torch.as_tensor(value, device=mask_BR.device).detach().float()
        numbers[name] = masked_mean(tensor, mask_BR) if tensor.shape == mask_BR.shape else tensor.mean()
    return numbers


def statistics_by_override(trainer: Any, iteration: Iteration) -> dict[str, Any]:
    """What `trainer.record_step_stats` makes of this process's rollouts, its numbers averaged over the processes."""
    rollouts, record = iteration.rollouts, iteration.record
    kept_B = rollouts.response_mask_BR.any(dim=1)
    mask = rollouts.response_mask_BR[kept_B]
    logprobs = record.logprobs_BR if rollouts.old_logprobs_BR is None else rollouts.old_logprobs_BR
    kls = kl_k1(logprobs, rollouts.ref_logprobs_BR) if rollouts.kl_penalty_BR is None else rollouts.kl_penalty_BR
    kl_coef = trainer.kl_ctl.value
    non_score_rewards = rollouts.non_score_rewards_BR
    if non_score_rewards is None:
        non_score_rewards = -(kl_coef if trainer.args.kl_in_reward else 0.0) * kls
    rows = kept_B.nonzero().flatten().tolist()
    stats = trainer.record_step_stats(
        kl_coef=kl_coef,
        scores=shaped_scores(rollouts, iteration.ended_B, trainer.args, trainer.run_state)[kept_B],
        logprobs=_counted(logprobs[kept_B], mask),
        ref_logprobs=_counted(rollouts.ref_logprobs_BR[kept_B], mask),
        non_score_reward=non_score_rewards[kept_B],
        train_stats=_train_statistics(iteration, mask, kept_B),
        masks=mask.long(),
        queries=[rollouts.queries[row] for row in rows],
        responses=[rollouts.responses[row] for row in rows],
        kls=kls[kept_B],
    )
    if not isinstance(stats, dict):
        raise ValueError(f"record_step_stats is overridden and returned a {type(stats).__name__}; it should be a dict")
    if trainer.accelerator.num_processes > 1:
        scalars = {name: torch.as_tensor(value).float() for name, value in stats.items() if _is_number(value)}
        stats = trainer.gather_stats(scalars)
    return convert_to_scalar(stats_to_np(stats))


def _train_statistics(iteration: Iteration, mask: Tensor, kept_B: Tensor) -> dict[str, Tensor]:
    """For each statistic of the optimizer steps a column, `(optimizer steps, 1)`; the advantages in one row."""
    steps = iteration.record.optimizer_steps
    columns = {
        name.removeprefix("apa/"): torch.stack([step[name].float().reshape(1) for step in steps])
        for name in steps[0]
        if all(name in step for step in steps)
    }
    of_rollouts = {
        "policy/entropy": masked_mean(iteration.record.entropy_BR[kept_B], mask),
        "policy/advantages_mean": masked_mean(iteration.rollouts.advantages_BR[kept_B], mask),
    }
    for name, tensor_BR in (("returns", iteration.rollouts.returns_BR), ("val", iteration.rollouts.values_BR)):
        if tensor_BR is None:
            continue
        of_rollouts |= {f"{name}/mean": masked_mean(tensor_BR[kept_B], mask)}
        of_rollouts |= {f"{name}/var": masked_var(tensor_BR[kept_B], mask)}
    fixed = {name: value.expand(len(steps), 1) for name, value in of_rollouts.items()}
    return {**fixed, **columns, "policy/advantages": iteration.rollouts.advantages_BR[kept_B][mask][None]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
