"""One module that holds policy and value model, so that one optimizer and one distributed engine serve both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.logprobs import TOKEN_FIELDS, response_entropy, response_logits, sampled_logprobs
from trl_apa.models.checkpointing import either_method
from trl_apa.models.loading import refuse_prompt_learning
from trl_apa.models.quantization import use_one_kernel
from trl_apa.models.reference import check_adapter_exists
from trl_apa.models.reward_adapter import RewardAdapter
from trl_apa.models.summary_head import PolicyValueHead
from trl_apa.models.value_model import ValueModel, load_network, save_network, state_of


VALUE_MODEL_FOLDER = "value_model"


class PolicyAndValue(nn.Module):
    """The policy and its value model side by side; no parameter belongs to both.

    To generation, saving and gradient checkpointing it presents itself as the policy.

    Args:
        policy: a language model, with or without PEFT adapters.
        value_model: a network of its own, or a head that reads the policy's hidden states.
        reward_adapter (*optional*): a reward model on the policy's base, for `compute_reward_score`.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_model: ValueModel | PolicyValueHead,
        reward_adapter: RewardAdapter | None = None,
    ):
        super().__init__()
        self.policy = use_one_kernel(policy)
        self.value_model = use_one_kernel(value_model)
        self.reward_adapter = reward_adapter

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
        with_logits: bool = False,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the update reads of a micro-batch at its response tokens.

        Args:
            input_ids, attention_mask, position_ids: `(B, T)`, see `rollouts.pad_tokens`.
            response_width: `R`, tokens.
            temperature: the sampling temperature.
            with_policy, with_value: which of the two networks to run.
            with_entropy: also the policy's entropy, without gradient.
            with_logits: also the policy's logits.
            encoder_input_ids, encoder_attention_mask: `(B, P)`, of an encoder-decoder.

        Returns:
            `logprobs` (nats), `values` (reward units), `entropy` (nats) `(B, R)` and `logits` `(B, R, V)`: float32,
            those that were asked for.
        """
        given = (input_ids, attention_mask, position_ids, encoder_input_ids, encoder_attention_mask)
        tokens = {name: tensor for name, tensor in zip(TOKEN_FIELDS, given, strict=True) if tensor is not None}
        outputs: dict[str, Tensor] = {}
        reads_policy = with_value and self.value_is_a_head
        hidden_BRH = None
        if with_policy or reads_policy:
            logits_BRV, hidden_BRH = response_logits(self.policy, tokens, response_width, temperature, reads_policy)
            outputs["logprobs"] = sampled_logprobs(logits_BRV, tokens)
            if with_entropy:
                outputs["entropy"] = response_entropy(logits_BRV)
            if with_logits:
                outputs["logits"] = logits_BRV
        if with_value:
            on_tokens = (hidden_BRH,) if self.value_is_a_head else (tokens, response_width)
            outputs["values"] = self.value_model(*on_tokens)
        return outputs

    @property
    def value_is_a_head(self) -> bool:
        """Whether the value model has no trunk of its own."""
        return isinstance(self.value_model, PolicyValueHead)

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Scores of the reward adapter after every token, `(B, T, labels)`: see `reward_scores`.

        What else a tokenizer returns (`token_type_ids`) is accepted and not read.

        Raises:
            ValueError: if the policy came without a reward adapter.
        """
        if self.reward_adapter is None:
            raise ValueError("there is no reward adapter; give a model from from_pretrained(..., reward_adapter=...)")
        return self.reward_adapter.scores(self.policy, input_ids, attention_mask)

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
            either_method(network, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                gradient_checkpointing_kwargs
            )

    def gradient_checkpointing_disable(self) -> None:
        for network in self._networks():
            either_method(network, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    # The names that newer transformers' Trainer looks for first.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _networks(self) -> Iterator[nn.Module]:
        yield self.policy
        if not self.value_is_a_head:
            yield self.value_model.network

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """The policy as a checkpoint that plain transformers (or peft) loads, and the value model.

        A value model of its own goes into a folder of its own, a head beside the policy: `path` then is what
        `AutoModelForCausalLMWithValueHead.from_pretrained` loads.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
            kwargs: passed on to the policy's `save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        save_network(self.policy, path, state_of(state_dict, "policy"), **kwargs)
        if kwargs.get("is_main_process", True):
            folder = Path(path) if self.value_is_a_head else Path(path) / VALUE_MODEL_FOLDER
            self.value_model.save_pretrained(folder, state_dict=state_of(state_dict, "value_model"))


def load_policy_and_value(module: PolicyAndValue, path: str | Path) -> None:
    """Put what `PolicyAndValue.save_pretrained` wrote into networks of the same shape.

    Raises:
        ValueError, RuntimeError: if they are another model's.
    """
    load_network(module.policy, path)
    module.value_model.load_weights(path if module.value_is_a_head else Path(path) / VALUE_MODEL_FOLDER)


def build_policy(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """`model`, with new adapters if `peft_config` says so.

    Raises:
        ValueError: for a model that cannot be trained as a policy: no language model, prompt learning (which changes
            the sequence), adapters upon adapters, a quantised model without adapters, or one that is frozen.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"model is a {type(model).__name__}; it should be a language model")
    if is_peft_model(model) and peft_config is not None:
        raise ValueError("model has adapters already; give peft_config or a PEFT model, not both")
    policy = model if peft_config is None else get_peft_model(model, peft_config)
    if is_peft_model(policy):
        refuse_prompt_learning(policy.active_peft_config)
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
