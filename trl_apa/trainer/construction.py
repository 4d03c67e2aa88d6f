"""What the constructors of the online and the offline trainer do alike, on networks that `assembly` has made."""

from collections.abc import Collection, Sequence
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from trl_apa.distributed.sharded import is_sharded, serve_sharded_weights
from trl_apa.models import PolicyAndValue
from trl_apa.models.network_checks import check_answers_text
from trl_apa.models.network_parts import Network
from trl_apa.rollout.scoring import RewardModel, Scorer, reward_functions
from trl_apa.rollout.served_rewards import ServedReward


def networks_that_read(module: PolicyAndValue, reference: Network | None) -> list[Network]:
    """Every network that reads queries and responses: those of `module`, and pi_init if it is one of its own."""
    return [*module.networks(), *([] if reference is None else [reference])]


def check_policy_answers(policy: Network, accelerator: Accelerator) -> None:
    """`network_checks.check_answers_text` in the precision of the run, where this process holds the weights."""
    if not is_sharded(accelerator):
        with accelerator.autocast():
            check_answers_text(policy)


def make_scorer(
    reward_funcs: Any,
    processing_classes: Any,
    tokenizer: PreTrainedTokenizerBase,
    module: PolicyAndValue,
    end_token_ids: Collection[int],
    accelerator: Accelerator,
    args: Any,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Scorer | None:
    """The reward functions of a trainer, None without them; reward models are on the device and fit the policy.

    Args:
        reward_funcs, processing_classes: as the trainer's caller gave them.
        tokenizer, end_token_ids: the policy's.
        module: the policy, whose base a reward adapter is on.
        accelerator: of the trainer.
        args: lengths of prompts and responses.
        weights: of the functions; those of `args` by default.
        options: more of `Scorer`.

    Raises:
        ValueError: for a function that cannot be one, or a reward model that cannot read the policy's sequences.
    """
    if reward_funcs is None:
        return None
    given = (reward_funcs, processing_classes, tokenizer, accelerator.device, module, end_token_ids)
    functions = reward_functions(*given)
    for function in functions:
        if isinstance(function, ServedReward) and args.reward_timeout is not None:
            function.timeout = args.reward_timeout
        if isinstance(function, RewardModel):
            function.check_fits(module.policy, args.max_prompt_length, args.max_completion_length)
            serve_sharded_weights(function.model, accelerator)
    return Scorer(functions, args.reward_weights if weights is None else weights, **options)
