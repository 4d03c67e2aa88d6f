"""One module that holds policy and value model, so that one optimizer and one distributed engine serve both."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.logprobs import response_logprobs
from trl_apa.models.reference import check_adapter_exists
from trl_apa.models.value_model import ValueModel, save_network, state_of


VALUE_MODEL_FOLDER = "value_model"


class PolicyAndValue(nn.Module):
    """The policy and its standalone value model side by side; no parameter belongs to both.

    To generation, saving and gradient checkpointing it presents itself as the policy.

    Args:
        policy: a decoder language model, with or without PEFT adapters.
        value_model: see `ValueModel`.
    """

    def __init__(self, policy: nn.Module, value_model: ValueModel):
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        response_width: int,
        temperature: float = 1.0,
        with_policy: bool = True,
        with_value: bool = True,
        with_entropy: bool = False,
    ) -> dict[str, Tensor]:
        """What the update reads of a micro-batch at its response tokens.

        Args:
            input_ids, attention_mask, position_ids: `(B, T)`, see `rollouts.pad_tokens`.
            response_width: `R`, tokens.
            temperature: the sampling temperature.
            with_policy, with_value: which of the two networks to run.
            with_entropy: also the policy's entropy, without gradient.

        Returns:
            `logprobs` (nats), `values` (reward units), `entropy` (nats): float32 `(B, R)`, those that were asked for.
        """
        outputs: dict[str, Tensor] = {}
        tokens = (input_ids, attention_mask, position_ids, response_width)
        if with_policy:
            outputs["logprobs"], entropy = response_logprobs(self.policy, *tokens, temperature, with_entropy)
            if entropy is not None:
                outputs["entropy"] = entropy
        if with_value:
            outputs["values"] = self.value_model(*tokens)
        return outputs

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def generation_config(self) -> Any:
        return self.policy.generation_config

    @property
    def hf_device_map(self) -> Any:
        """Where the policy's layers are, if it was loaded with a device map; AttributeError otherwise."""
        return self.policy.hf_device_map

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.policy.modules())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the policy."""
        return self.policy.generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.policy.get_input_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        for network in self._networks():
            _either_method(network, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                gradient_checkpointing_kwargs
            )

    def gradient_checkpointing_disable(self) -> None:
        for network in self._networks():
            _either_method(network, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    # The names that newer transformers' Trainer looks for first.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        return self.policy, self.value_model.network

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """The policy as a checkpoint that plain transformers (or peft) loads, the value model in a folder beside it.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
            kwargs: passed on to the policy's `save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        save_network(self.policy, path, state_of(state_dict, "policy"), **kwargs)
        if kwargs.get("is_main_process", True):
            value_state = state_of(state_dict, "value_model")
            self.value_model.save_pretrained(Path(path) / VALUE_MODEL_FOLDER, state_dict=value_state)


def build_policy(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """`model`, with new adapters if `peft_config` says so.

    Raises:
        ValueError: for a model that cannot be trained as a policy: an encoder-decoder, prompt learning (which changes
            the sequence), adapters upon adapters, a quantised model without adapters, or one that is frozen.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"model={type(model).__name__} is an encoder-decoder; only decoder models can be trained")
    if is_peft_model(model) and peft_config is not None:
        raise ValueError("model has adapters already; give peft_config or a PEFT model, not both")
    policy = model if peft_config is None else get_peft_model(model, peft_config)
    if is_peft_model(policy) and policy.active_peft_config.is_prompt_learning:
        raise ValueError(f"{policy.active_peft_config.peft_type} adapters are not supported; use LoRA or another")
    if getattr(policy, "is_quantized", False) and not is_peft_model(policy):
        raise ValueError("model is quantised, so its weights cannot be trained; give peft_config for adapters on it")
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError("model has no trainable parameter; load a saved adapter with is_trainable=True")
    return policy


def select_adapter(policy: nn.Module, name: str | None) -> None:
    """Make the adapter of that name the one that is trained, unless it is None; its place is before the value model's.

    Raises:
        ValueError: if `policy` is no PEFT model, or has no such adapter.
    """
    if name is not None:
        check_adapter_exists("model_adapter_name", name, policy)
        policy.set_adapter(name)


def _either_method(network: nn.Module, new_name: str, old_name: str) -> Any:
    return getattr(network, new_name, None) or getattr(network, old_name)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to zero, layer drop included.

    The update compares log-probs across forward passes: dropout would put noise into the ratio to pi_init that APA
    squares. Rates are zeroed, those kept as plain numbers too, rather than the module held in eval mode, because
    gradient checkpointing works in train mode only.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
