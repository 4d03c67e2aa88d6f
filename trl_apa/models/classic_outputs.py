"""What policy and reference answer to a script that calls them as it called classic's wrappers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.adapters import only_adapter
from trl_apa.models.logprobs import forward_parameters, last_hidden_states
from trl_apa.models.network_identity import HARMLESS_HOOKS
from trl_apa.models.network_parts import Network, inner_model, text_trunk
from trl_apa.models.own_critic import OwnValueModel
from trl_apa.models.value_adapter import VALUE_ADAPTER


class ClassicOutputs(NamedTuple):
    """What a classic wrapper returns.

    Args:
        logits: at every position (of the decoder, if there are two stacks), float32 `(B, T, V)`.
        loss: the language model's, nats a token; None without `labels`.
        values: reward units, float32 `(B, T)`; None without a critic.
    """

    logits: Tensor
    loss: Tensor | None
    values: Tensor | None


def classic_outputs(
    module: Any, past_key_values: Any = None, return_past_key_values: bool = False, **inputs: Any
) -> tuple[Any, ...]:
    """Logits and loss of the policy, and values of the critic in use, at every position.

    Args:
        module: a `PolicyAndValue`.
        past_key_values: the policy's cache; only a head on the policy has values then.
        return_past_key_values: append the policy's cache to the result.
        inputs: the policy's (`input_ids`, `attention_mask`, `decoder_input_ids`, `labels`, ...). A critic with a trunk
            gets those that its forward takes.

    Returns:
        `ClassicOutputs`, or with `return_past_key_values` a tuple of four. While layers are checkpointed, values of an
        adapter on the policy's base have no gradient: see `PolicyAndValue.passes`.

    Raises:
        ValueError: for `past_key_values` with a critic that has a trunk to itself.
    """
    inputs = _with_decoder_inputs(module.policy, {name: value for name, value in inputs.items() if value is not None})
    options: dict[str, Any] = {"return_dict": True}
    if module.value_is_a_head:
        options["output_hidden_states"] = True
    elif past_key_values is not None and module.value_model is not None:
        raise ValueError(
            "past_key_values holds what the policy has read, and the value model would have to read that too; give "
            "the complete input_ids, or train with value_model='head'"
        )
    if past_key_values is not None:
        options["past_key_values"] = past_key_values
    output = module.policy(**{**inputs, **options})
    values_BT: Tensor | None
    if module.value_model is None:
        values_BT = None
    elif isinstance(module.value_model, OwnValueModel):
        values_BT = module.value_model.everywhere(inputs["input_ids"], inputs.get("attention_mask"))
    elif module.value_is_a_head:
        values_BT = module.value_model(last_hidden_states(output))
    elif module.base_is_shared:
        recomputed = module.training and module.is_gradient_checkpointing
        with torch.no_grad() if recomputed else nullcontext(), only_adapter(module.policy, VALUE_ADAPTER):
            trunk = text_trunk(module.policy.get_base_model())
            values_BT = _values_everywhere(trunk, module.value_model.head, inputs)
    else:
        values_BT = _values_everywhere(module.value_model.trunk, module.value_model.head, inputs)
    outputs = ClassicOutputs(output.logits.float(), output.loss, values_BT)
    return (*outputs, output.past_key_values) if return_past_key_values else outputs


def _with_decoder_inputs(policy: Network, inputs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's tokens, which an encoder-decoder makes of `labels` for itself, for the critic to read too."""
    if not policy.config.is_encoder_decoder or "labels" not in inputs or "decoder_input_ids" in inputs:
        return inputs
    shifted = inner_model(policy).prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    return {**inputs, "decoder_input_ids": shifted}


def _values_everywhere(trunk: Any, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    known = forward_parameters(trunk) - {"labels", "return_dict", "output_hidden_states", "use_cache"}
    options = {} if trunk.get_output_embeddings() is None else {"output_hidden_states": True}
    output = trunk(**{name: value for name, value in inputs.items() if name in known}, use_cache=False, **options)
    return at_least_float32(head(last_hidden_states(output)))


_FOR_SCRIPTS = ContextVar("_FOR_SCRIPTS", default=True)


class ReferenceOutputs(tuple[Any, ...]):
    """`(float32 logits, loss, None)`, as scripts unpack it, with the names of what the network itself returned.

    Args:
        output: the network's.
    """

    output: ModelOutput

    def __new__(cls, output: ModelOutput) -> "ReferenceOutputs":
        made = super().__new__(cls, (output.logits.float(), getattr(output, "loss", None), None))
        made.output = output
        return made

    def __reduce__(self) -> tuple[type, tuple[ModelOutput]]:
        return ReferenceOutputs, (self.output,)

    def __getattr__(self, name: str) -> Any:
        if name == "output":
            raise AttributeError(name)  # otherwise it would look for itself
        return getattr(self.output, name)

    def __getitem__(self, key: Any) -> Any:
        return self.output[key] if isinstance(key, str) else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key in self.output if isinstance(key, str) else super().__contains__(key)


def answer_as_classic(reference: Network) -> None:
    """Let a script call the reference as it called classic's wrapper: see `ReferenceOutputs`.

    A hook changes what such a call returns, and nothing that is saved, moved or sharded. `generate`, which asks for
    `return_dict`, and the trainer itself get what the network returns.
    """
    if _unpackable not in reference._forward_hooks.values():
        reference.register_forward_hook(_unpackable, with_kwargs=True)
    # Not by setattr, which would make the network a part of itself.
    vars(reference).setdefault("pretrained_model", reference)


def _unpackable(network: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    wanted = _FOR_SCRIPTS.get() and kwargs.get("return_dict") is None
    return ReferenceOutputs(output) if wanted and isinstance(output, ModelOutput) and "logits" in output else output


HARMLESS_HOOKS.append(_unpackable)


@contextmanager
def outputs_as_they_are() -> Iterator[None]:
    """Inside, a reference returns what its network does."""
    token = _FOR_SCRIPTS.set(False)
    try:
        yield
    finally:
        _FOR_SCRIPTS.reset(token)
