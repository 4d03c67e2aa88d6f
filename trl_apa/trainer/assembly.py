"""The trainer's networks, built from its arguments: policy, reference, value model, tokenizer."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model
from trl_apa.config.apa import APAConfig
from trl_apa.config.by_estimator import estimates_with_values
from trl_apa.models import (
    PolicyAndValue,
    ValueModel,
    build_policy,
    choose_reference,
    freeze_all_but,
    load_language_model,
    resolve_value_model,
    reward_adapter_of,
    select_adapter,
    value_head_of,
    without_value_head,
)
from trl_apa.models.adapter_kinds import check_adapters
from trl_apa.models.critic import Critic
from trl_apa.models.gguf import load_tokenizer
from trl_apa.models.network_checks import check_has_positions, check_reads
from trl_apa.models.network_parts import Network
from trl_apa.models.partitioned import is_partitioned, use_one_precision
from trl_apa.rollout.tokenizing import warn_again
from trl_apa.trainer.optimization import add_value_parameters, choose_learning_rate, freeze_what_is_left_out
from trl_apa.trainer.validation import check_networks_are_apart, check_precision, check_type


MODELS = (str, Path, PreTrainedModel, PeftModel)


class Networks(NamedTuple):
    """What a trainer works with.

    Args:
        module: policy and value model, if there is one.
        reference: pi_init, or None if it is inside the policy.
        tokenizer: the policy's.
    """

    module: PolicyAndValue
    reference: Network | None
    tokenizer: PreTrainedTokenizerBase


def assemble(
    args: APAConfig,
    model: Any,
    ref_model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    value_model: Any,
    peft_config: PeftConfig | None,
    num_shared_layers: int | None,
    optimizer: torch.optim.Optimizer | None,
) -> Networks:
    """The networks that the arguments of `APATrainer` mean, without randomness, frozen where they are not to learn.

    Args:
        args: names of adapters, layers to freeze, the value model's learning rate.
        optimizer: a caller's own, which gets the value model's parameters too.
        model, ref_model, tokenizer, value_model, peft_config, num_shared_layers: see `APATrainer`.

    Raises:
        ValueError: naming the argument that is of the wrong type or does not fit another.
    """
    if args.neftune_noise_alpha is not None:
        noise = f"neftune_noise_alpha={args.neftune_noise_alpha}"
        text = f"{noise} has no effect: it would add noise to the log-ratio to pi_init"
        warnings.warn(text, UserWarning, stacklevel=3)
    given, model, ref_model = model, without_value_head(model), without_value_head(ref_model)
    check_type("model", model, MODELS)
    check_type("ref_model", ref_model, MODELS, optional=True)
    check_type("num_shared_layers", num_shared_layers, int, optional=True)
    if isinstance(model, str | Path):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_language_model(str(model))
    if isinstance(ref_model, str | Path):
        ref_model = load_language_model(str(ref_model))
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase)
    warn_again(tokenizer)
    policy = build_policy(model, peft_config)
    select_adapter(policy, args.model_adapter_name)
    if is_peft_model(policy):
        check_adapters(policy)
    critic = _value_model(args, value_model, policy, given)
    if args.num_unfrozen_layers is not None:
        if num_shared_layers is not None:
            raise ValueError("num_unfrozen_layers and num_shared_layers set the same thing: pass one of them")
        num_frozen = freeze_all_but(args.num_unfrozen_layers, policy)
        num_shared_layers = num_frozen if ref_model is None else None
        if isinstance(critic, ValueModel) and not is_peft_model(critic.network):
            freeze_all_but(args.num_unfrozen_layers, critic.network, "value_model")
    others = {"value_model": getattr(critic, "network", None), "ref_model": ref_model}
    for argument, network in others.items():
        if network is not None:
            check_reads(argument, network, policy, tokenizer)
            check_has_positions(argument, network, policy, args.max_prompt_length, args.max_completion_length)
    module = PolicyAndValue(policy, critic, reward_adapter_of(given))
    if any(is_partitioned(parameter) for parameter in module.parameters()):
        use_one_precision(module)  # DeepSpeed has a float32 copy of the trained weights
    else:
        check_precision(module)
    check_networks_are_apart(module, ref_model)
    freeze_what_is_left_out(module, optimizer)
    if optimizer is None:
        choose_learning_rate(args, module)
    reference = choose_reference(policy, ref_model, num_shared_layers, args.ref_adapter_name)
    module.eval()  # what was added to it since it was made, pi_init's adapter say
    if critic is not None:
        add_value_parameters(optimizer, module.trainable_parameters()["value"], args.value_learning_rate)
    return Networks(module, reference, tokenizer)


def _value_model(args: Any, value_model: Any, policy: Network, given: Any) -> Critic | None:
    """The value model, if the estimator of the options needs one.

    Args:
        args, value_model: see `assemble`; the options are of online or of offline learning.
        policy: the language model that is aligned.
        given: what it was made of, a wrapper with a value head perhaps.
    """
    if estimates_with_values(args):
        return resolve_value_model(value_model, policy, value_head_of(given, policy))
    if value_model is not None:
        what = repr(value_model) if isinstance(value_model, str) else f"a {type(value_model).__name__}"
        reader = "advantage_estimator" if hasattr(args, "advantage_estimator") else "loss_type"
        text = f"value_model={what} has no effect with {reader}={getattr(args, reader)!r}"
        warnings.warn(f"{text}, which needs no values", UserWarning, stacklevel=4)
    return None
