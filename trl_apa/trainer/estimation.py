"""Token rewards to advantages and returns, by the estimator of the options and over the rows that it needs."""

import math
from collections import Counter
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_apa.algorithms.estimators import RewardedRows, check_estimates
from trl_apa.algorithms.masking import masked_whiten
from trl_apa.algorithms.normalizers import group_normalized_advantages
from trl_apa.distributed.processes import Processes
from trl_apa.rollout.batch import Rollouts
from trl_apa.rollout.shared_prompts import equal_queries, groups_of_equal_size, query_keys


# Characters of a prompt that a message shows.
SHOWN = 60


def estimate_advantages(
    rollouts: Rollouts, args: Any, processes: Processes, ref_rewards_BN: Tensor | None = None
) -> None:
    """Fill in advantages and, with a value model, returns.

    Args:
        rollouts: with token rewards, and values where the estimator needs them.
        args: the trainer's options.
        processes: of the run.
        ref_rewards_BN: rewards of pi_init's responses in the unit of the token rewards, where the estimator needs
            them.
    """
    prompts_B = query_keys(rollouts.queries).to(rollouts.device) if args.estimator.needs_groups else None
    rows = RewardedRows(rollouts.rewards_BR, rollouts.response_mask_BR, rollouts.values_BR, prompts_B, ref_rewards_BN)
    rollouts.advantages_BR, rollouts.returns_BR = advantages_and_returns(rows, args, processes)


def subtract_normalizer(rollouts: Rollouts, args: Any, processes: Processes) -> None:
    """With `normalizer="group"`, take from each prompt's advantages what its responses say of lambda log Z.

    Args:
        rollouts: with advantages, log pi_init, and log pi_old of the update or of sampling.
        args: the trainer's options.
        processes: of the run.
    """
    if not args.normalizes_groups:
        return
    mask_BR, prompts_B = rollouts.response_mask_BR, query_keys(rollouts.queries).to(rollouts.device)
    known_BR = rollouts.sampling_logprobs_BR if rollouts.old_logprobs_BR is None else rollouts.old_logprobs_BR
    assert known_BR is not None  # where nothing was noted, `_evaluate_rollouts` has read them
    advantages_BR, log_ratio_BR = rollouts.advantages_BR, known_BR - rollouts.ref_logprobs_BR
    accelerator, own = processes.accelerator, (slice(None), slice(None))
    if accelerator.num_processes > 1:
        own = _own_rows(mask_BR, accelerator)
        advantages_BR, log_ratio_BR = (_of_all_processes(x, accelerator) for x in (advantages_BR, log_ratio_BR))
        mask_BR, prompts_B = _mask_of_all_processes(mask_BR, accelerator), accelerator.gather(prompts_B)
    read = advantages_BR, log_ratio_BR, mask_BR, prompts_B
    of_responses = args.algorithm.of_responses
    rollouts.advantages_BR = group_normalized_advantages(*read, args.kl_coef, of_responses)[own]


def _own_rows(mask_BR: Tensor, accelerator: Accelerator) -> tuple[slice, slice]:
    """Where this process's rows are in `rows_of_all_processes`."""
    first = accelerator.process_index * len(mask_BR)
    return slice(first, first + len(mask_BR)), slice(mask_BR.shape[1])


def advantages_and_returns(rows: RewardedRows, args: Any, processes: Processes) -> tuple[Tensor, Tensor | None]:
    """What the estimator says, whitened over all processes if the options say so.

    Args:
        rows: of this process.
        args: the trainer's options.
        processes: of the run.

    Returns:
        Advantages (reward units, or whitened) and returns (reward units; None without a value model), `(B, R)`.

    Raises:
        ValueError: naming `advantage_estimator`, if it returns something else than it should.
    """
    accelerator, mask_BR = processes.accelerator, rows.response_mask_BR
    distributed = accelerator.num_processes > 1
    if args.whiten_rewards:
        rewards_BR = masked_whiten(rows.rewards_BR, mask_BR, shift_mean=False, distributed=distributed)
        rows = rows._replace(rewards_BR=rewards_BR)
    estimator, own = args.estimator, (slice(None), slice(None))
    if distributed and not estimator.row_by_row:
        own = _own_rows(mask_BR, accelerator)
        rows = rows_of_all_processes(rows, accelerator)

    def estimate() -> tuple[Tensor, Tensor | None]:
        estimates = estimator.estimate(rows, args)
        return check_estimates(args.advantage_estimator, estimator, estimates, rows.response_mask_BR)

    # Together: an estimator of the user's may fail on the rows of one process alone.
    advantages_BR, returns_BR = processes.together(estimate)
    advantages_BR = advantages_BR[own]
    if args.whiten_advantages:
        advantages_BR = masked_whiten(advantages_BR, mask_BR, distributed=distributed)
    return advantages_BR, None if returns_BR is None else returns_BR[own]


def rows_of_all_processes(rows: RewardedRows, accelerator: Accelerator) -> RewardedRows:
    """The rows of the first process, then those of the second, ..., as wide as the widest."""

    def gathered(tensor: Tensor | None, pad: float = 0) -> Tensor | None:
        return None if tensor is None else _of_all_processes(tensor, accelerator, pad)

    prompts_B = None if rows.prompts_B is None else accelerator.gather(rows.prompts_B)
    return RewardedRows(
        _of_all_processes(rows.rewards_BR, accelerator),
        _mask_of_all_processes(rows.response_mask_BR, accelerator),
        gathered(rows.values_BR),
        prompts_B,
        gathered(rows.ref_rewards_BN, pad=math.nan),
    )


def _of_all_processes(rows: Tensor, accelerator: Accelerator, pad: float = 0) -> Tensor:
    """Rows `(B, R)` of the first process, then those of the second, ..., with `pad` behind the narrower ones."""
    everywhere: Tensor = accelerator.gather(accelerator.pad_across_processes(rows, dim=1, pad_index=pad))
    return everywhere


def _mask_of_all_processes(mask_BR: Tensor, accelerator: Accelerator) -> Tensor:
    """Not sent as bool, which not every backend does."""
    return _of_all_processes(mask_BR.int(), accelerator).bool()


def check_compared_rows(queries: list[Tensor], args: Any) -> None:
    """Refuse an iteration of which no two responses to a prompt fit in a forward pass, if the loss compares them.

    Args:
        queries: of this process, 1-D token ids.
        args: the trainer's options.

    Raises:
        ValueError: naming `queries` and `mini_batch_size`.
    """
    if not args.algorithm.compares_responses:
        return
    prompts, micro_batch = equal_queries(queries), args.per_device_train_batch_size
    if groups_of_equal_size(prompts, micro_batch)[1] < 2:
        counts = sorted(set(Counter(prompts).values()))
        raise ValueError(
            f"queries has prompts in {' and '.join(map(str, counts))} rows on this process, and mini_batch_size="
            f"{micro_batch}, but loss_type={args.loss_type!r} compares responses to a prompt in a forward pass: give "
            "step each query as often, twice or more, and set mini_batch_size to a multiple of that"
        )


def check_groups(
    queries: list[Tensor], args: Any, tokenizer: PreTrainedTokenizerBase | None, accelerator: Accelerator
) -> None:
    """Refuse an iteration in which a prompt has one row, if the options compare a prompt's rows.

    To be called by all processes, with queries that `check_step_inputs` has accepted.

    Args:
        queries: of this process, 1-D token ids.
        args: the trainer's options.
        tokenizer: shows the prompt in the message.
        accelerator: of the run.

    Raises:
        ValueError: on all processes, naming `queries`, the first such row and its prompt.
    """
    if not args.needs_groups:
        return
    keys_B = query_keys(queries)
    _, index, counts = accelerator.gather(keys_B.to(accelerator.device)).unique(
        return_inverse=True, return_counts=True
    )
    alone = (counts[index] == 1).cpu()
    if not alone.any():
        return
    first = accelerator.process_index * len(queries)
    own = alone[first : first + len(queries)].nonzero().flatten().tolist()
    where = "of another process"
    if own:
        tokens = queries[own[0]].tolist()
        text = repr(tokens) if tokenizer is None else repr(tokenizer.decode(tokens))
        where = f"queries[{own[0]}], {text if len(text) <= SHOWN else f'{text[:SHOWN]}...'}"
    by_estimator = args.estimator.needs_groups
    advice = "set advantage_estimator='batch' or 'gae'" if by_estimator else "leave normalizer out"
    raise ValueError(
        f"queries has {len(counts)} different prompts in {len(alone)} rows, {int(alone.sum())} of them in one row "
        f"only (the first: {where}), but {args.compares_by} compares the responses to a prompt: give step each query "
        f"twice or more, or {advice}"
    )
