"""Checks that networks fit their task: the ids and lengths that will occur, text only, causal."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model
from trl_apa.models.adapters import held_repeatable
from trl_apa.models.logprobs import head_width, is_sharded
from trl_apa.models.network_parts import Network, inner_model, max_positions, num_token_ids


@torch.no_grad()
def check_answers_text(policy: Network) -> None:
    """Refuse a policy that cannot answer text: one that waits for an image, or whose adapters do not compute.

    Two rows that differ only in their second token show whether a decoder looks ahead, as a masked language model and
    PaliGemma do: the log-probs of a response would then know the response.

    Args:
        policy: a language model, with or without PEFT adapters, whose weights this process holds.

    Raises:
        ValueError: if it does not predict each token from those before it, or can sample ids that it cannot read.
    """
    base = inner_model(policy)
    if base.config.is_encoder_decoder or is_sharded(base):
        return
    known, sampled = num_token_ids(base) or 1, head_width(base.get_output_embeddings())
    if sampled > known > 1:
        raise ValueError(
            f"model's vocabulary head can sample {sampled} token ids, but its embedding has only {known} rows; add "
            f"rows: resize_token_embeddings({sampled})"
        )
    name = type(base).__name__
    tokens = torch.tensor([[0, 0], [0, 1]], device=base.get_input_embeddings().weight.device) % known
    try:
        with held_repeatable(policy), _warning_of_adapters_without_effect(policy):
            logits_BV = policy(input_ids=tokens, use_cache=False).logits[:, 0].float()
    except Exception as error:
        what = "with its adapters " if is_peft_model(policy) else ""
        raise ValueError(f"model is a {name}, which {what}does not read text alone: {error}") from error
    exact = policy.dtype in (torch.float32, torch.float64) and not getattr(base, "is_quantized", False)
    exact = exact and not torch.is_autocast_enabled(logits_BV.device.type)
    allowed = (1e-4 if exact else 3e-2) * float(logits_BV.abs().max())
    if float((logits_BV[0] - logits_BV[1]).abs().max()) > allowed:
        raise ValueError(
            f"model is a {name} that looks at later tokens; a policy predicts each token from those before it "
            "(of some families with is_decoder=True in the config)"
        )


@contextmanager
def _warning_of_adapters_without_effect(policy: Network) -> Iterator[None]:
    """Inside, a pass is made; a warning then names layers whose adapters it did not call.

    State space models multiply by the weight of such a layer themselves. An adapter on it learns nothing, and merged
    it would have the effect that nobody has seen.
    """
    layers = {name: layer for name, layer in policy.named_modules() if isinstance(layer, BaseTunerLayer)}
    owners = {name: policy.get_submodule(name.rpartition(".")[0]) for name in layers}
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(module))
        for module in {*layers.values(), *owners.values()}
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    # Experts and towers that this text does not reach are not called by their owner, which is not called either.
    unused = {
        name.rpartition(".")[2] for name, layer in layers.items() if owners[name] in called and layer not in called
    }
    if unused:
        warnings.warn(
            f"adapters on {', '.join(sorted(unused))} have no effect: {type(inner_model(policy)).__name__} reads the "
            "weights of these layers without calling them; exclude them (exclude_modules, target_modules)",
            UserWarning,
            stacklevel=2,
        )


def check_reads(argument: str, network: Network, policy: Network, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a network does not know every id that it may be given.

    These are the tokenizer's and those that the policy can sample, as far as the policy's own embedding goes: a policy
    may have fewer rows than its tokenizer has ids (Gemma 3), or more (Pythia).

    Args:
        argument: what the caller knows the network by.
        network: reads what the policy reads and answers.
        policy: the language model that is aligned.
        tokenizer: the policy's.
    """
    known, of_policy = num_token_ids(network), num_token_ids(policy)
    if known is None or of_policy is None:
        return
    needed = min(of_policy, max(len(tokenizer), head_width(policy.get_output_embeddings())))
    if known < needed:
        raise ValueError(
            f"{argument} knows {known} token ids; the policy's tokenizer has {len(tokenizer)} and the policy knows "
            f"{of_policy}, so ids up to {needed - 1} can occur; add rows to {argument}: "
            f"resize_token_embeddings({needed})"
        )


def check_has_positions(
    argument: str, network: Network, policy: Network, max_prompt_length: int | None, max_completion_length: int
) -> None:
    """Raise ValueError if a network has fewer positions than the longest prompt and response that can occur.

    Args:
        argument, network, policy: see `check_reads`.
        max_prompt_length: tokens; None if it is not known.
        max_completion_length: tokens.
    """
    limit, of_policy = max_positions(network), max_positions(policy)
    needed = (1 if max_prompt_length is None else max_prompt_length) + max_completion_length
    needed = needed if of_policy is None else min(needed, of_policy)
    if limit is not None and limit < needed:
        raise ValueError(
            f"{argument} has {limit} positions; with max_prompt_length={max_prompt_length} and "
            f"max_completion_length={max_completion_length} a prompt and its response have up to {needed} tokens"
        )
