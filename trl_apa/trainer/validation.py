"""What a caller may hand to the trainer, checked before any forward pass and before any state changes."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl_apa.models.network_parts import Network, max_positions, num_token_ids, token_in_words
from trl_apa.models.policy_and_value import PolicyAndValue
from trl_apa.values import why_unreadable


# In the losses scores are squared, and squares are added up; float32 ends at 3.4e38.
LARGEST_SCORE = 1e18
# Integers that torch computes with. Of the other ones (uint16, ...) it takes neither the least nor the largest.
TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def one_of(name: str, value: Any, alias: str, alias_value: Any) -> Any:
    """The argument that was given under either of two names; ValueError if both were and differ."""
    if value is not None and alias_value is not None and value is not alias_value:
        raise ValueError(f"{name} and {alias} are the same argument: pass one of them")
    return alias_value if value is None else value


def check_type(name: str, value: Any, types: type | tuple[type, ...], optional: bool = False) -> None:
    """Raise ValueError, naming the argument, unless it is of one of the types (or None, if optional)."""
    if (value is None and optional) or isinstance(value, types):
        return
    wanted = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
    raise ValueError(f"{name} is a {type(value).__name__}; it should be a {wanted}")


def check_has(name: str, value: Any, *methods: str) -> None:
    """Raise ValueError, naming the argument, unless it is None or no text and has one of the methods."""
    if value is None or (not isinstance(value, str | bytes) and any(hasattr(value, method) for method in methods)):
        return
    raise ValueError(f"{name} is a {type(value).__name__}; it should have {' or '.join(methods)}")


def check_precision(module: nn.Module) -> None:
    """Refuse to train float16 weights, which overflow, and warn of bfloat16 ones.

    An update smaller than half of a weight's last digit (0.2% of a bfloat16 weight) is lost. Since transformers 5
    loads checkpoints in the precision that they were saved in, this happens without being asked for.
    """
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad}
    advice = "load it with dtype=torch.float32; bf16=True in the config computes in bfloat16 all the same"
    if torch.float16 in dtypes:
        raise ValueError(f"model has trainable weights in float16, which overflow: {advice}")
    if torch.bfloat16 in dtypes:
        text = f"model has trainable weights in bfloat16: small updates will be lost to rounding; {advice}"
        warnings.warn(text, UserWarning, stacklevel=3)


def check_fp16(args: Any, accelerator: Accelerator) -> None:
    """Raise ValueError if `fp16` is set and accelerate would silently compute in float32: on a CPU."""
    if args.fp16 and accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError("fp16=True: on a CPU accelerate would compute in float32; leave it out, or set bf16=True")


def check_networks_are_apart(module: PolicyAndValue, ref_model: Network | None) -> None:
    """Raise ValueError if a network would be frozen or trained because it shares weights with another."""
    policy, value_model = module.policy, module.value_model
    trained = {id(p) for p in module.trainable_parameters()["policy"]}
    if ref_model is not None and trained & {id(p) for p in ref_model.parameters()}:
        raise ValueError("ref_model shares trainable parameters with model; pass a copy, or leave it out")
    if value_model is not None and {id(p) for p in policy.parameters()} & {id(p) for p in value_model.parameters()}:
        raise ValueError("value_model shares parameters with model; it should be a network of its own")


def check_step_inputs(
    queries: Any,
    responses: Any,
    scores: Any,
    response_masks: Any,
    batch_size: int,
    policy: Network,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse what would train on nonsense or fail halfway; `tokenizer` names the tokens that are refused.

    Raises:
        ValueError: names the argument, its element, the value and what it should be.
    """
    named = {"queries": queries, "responses": responses, "scores": scores}
    if response_masks is not None:
        named["response_masks"] = response_masks
    for name, tensors in named.items():
        _check_list(name, tensors, batch_size)
    num_ids = num_token_ids(policy)
    for name in ("queries", "responses"):
        for row, tokens in enumerate(named[name]):
            check_tokens(f"{name}[{row}]", tokens, num_ids, tokenizer)
    for row, score in enumerate(scores):
        check_readable(f"scores[{row}]", score)
        if score.numel() != 1 or score.dim() > 1:
            raise ValueError(
                f"scores[{row}] has shape {tuple(score.shape)}; a response has one score: shape () or (1,)"
            )
        if not torch.isfinite(score.float()).all():
            raise ValueError(f"scores[{row}] is {score.item()}; scores should be finite in float32")
        if abs(score.item()) > LARGEST_SCORE:
            raise ValueError(
                f"scores[{row}] is {score.item()}; it should be at most {LARGEST_SCORE:g} in size: its square "
                "overflows float32"
            )
    for row, mask in enumerate(response_masks or []):
        _check_mask(f"response_masks[{row}]", mask, responses[row])
    check_positions(queries, [len(response) for response in responses], policy, "queries + responses")


def _check_mask(name: str, mask: Tensor, response: Tensor) -> None:
    check_readable(name, mask)
    if mask.shape != response.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; its response has {tuple(response.shape)}")
    values = mask.float()  # some integer types cannot be compared
    neither = values[(values != 0) & (values != 1)]
    if len(neither):
        raise ValueError(f"{name} holds {neither[0].item():g}; it should be bool, or hold 0 and 1")
    if not values.any():
        raise ValueError(f"{name} drops every token of its response; at least one should count")


def check_readable(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor holds real numbers that can be read."""
    problem = why_unreadable(tensor)
    if problem is None and tensor.is_complex():
        problem = "complex"
    if problem is not None:
        raise ValueError(f"{name} is {problem}; it should be a dense tensor of numbers")


def check_score_inputs(
    queries: Any,
    responses: Any,
    prompts: Any,
    columns: Mapping[str, Any],
    policy: Network,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise ValueError, naming the argument, unless `score` can read queries and responses, and all are as many."""
    count = len(check_queries("queries", queries, policy, tokenizer))
    check_queries("responses", responses, policy, tokenizer)
    for name, column in {"responses": responses, "prompts": prompts, **columns}.items():
        if hasattr(column, "__len__") and len(column) != count:
            raise ValueError(f"{name} has {len(column)} elements; there are {count} queries")


def check_positions(
    queries: Sequence[Tensor],
    response_lengths: Sequence[int],
    model: Network,
    what: str,
    name: str = "the model",
) -> None:
    """Raise ValueError if a stack of the model would read more tokens than it has positions."""
    limit = max_positions(model)
    two_stacks = model.config.is_encoder_decoder
    for row, (query, response_length) in enumerate(zip(queries, response_lengths, strict=True)):
        length = max(len(query), 1 + response_length) if two_stacks else len(query) + response_length
        if limit is not None and length > limit:
            raise ValueError(
                f"{what}: row {row} has {length} tokens, but {name} has {limit} positions; "
                "shorten the query or the response"
            )


def _check_list(name: str, tensors: Any, batch_size: int) -> None:
    if not isinstance(tensors, list):
        raise ValueError(f"{name} is a {type(tensors).__name__}; it should be a list of tensors")
    for row, element in enumerate(tensors):
        if not isinstance(element, Tensor):
            raise ValueError(f"{name}[{row}] is a {type(element).__name__}; it should be a tensor")
    if len(tensors) != batch_size:
        raise ValueError(f"{name} has {len(tensors)} elements; it should have config.batch_size = {batch_size}")


def check_queries(
    name: str, queries: Any, model: Network, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Tensor]:
    """The queries, or responses, as a list; ValueError unless there is one and each is what `check_tokens` takes."""
    if isinstance(queries, str | bytes | Mapping) or not isinstance(queries, Iterable):
        raise ValueError(f"{name} is a {type(queries).__name__}; it should be a list of tensors")
    rows = list(queries)
    if not rows:
        raise ValueError(f"{name} is empty; it should hold at least one tensor of token ids")
    num_ids = num_token_ids(model)
    for row, tokens in enumerate(rows):
        check_tokens(f"{name}[{row}]", tokens, num_ids, tokenizer)
    return rows


def check_tokens(
    name: str, tokens: Any, num_ids: int | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise ValueError unless `tokens` is a dense 1-D tensor of at least one id that the model knows.

    Args:
        name: of the argument, for the message.
        tokens: what was given.
        num_ids: ids that the model knows, see `network_parts.num_token_ids`; None if it cannot be asked.
        tokenizer: names a token that has an id and no row in the model's embedding.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} is a {type(tokens).__name__}; it should be a tensor")
    check_readable(name, tokens)
    if tokens.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it should be 1-D")
    if len(tokens) == 0:
        raise ValueError(f"{name} is empty; it should have at least one token")
    if tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"{name} has dtype {tokens.dtype}; token ids should be integers, int64 say")
    least, largest = int(tokens.min()), int(tokens.max())
    if num_ids is not None and not (0 <= least and largest < num_ids):
        raise ValueError(
            f"{name} holds token ids from {least} to {token_in_words(largest, tokenizer)}; "
            f"the model knows 0 to {num_ids - 1}"
        )
