"""One module that holds policy and value model, so that one optimizer and one distributed engine serve both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from trl_apa._trl import is_peft_model
from trl_apa.models.adapter_kinds import refuse_unsupported, with_adapters
from trl_apa.models.adapters import adapter_parameters, only_adapter
from trl_apa.models.checkpointing import renamed_method
from trl_apa.models.classic_outputs import classic_outputs
from trl_apa.models.classic_value_head import HEAD_WEIGHTS, PolicyValueHead
from trl_apa.models.critic import Critic
from trl_apa.models.gguf import save_dense_base
from trl_apa.models.logprobs import TOKEN_FIELDS, policy_outputs
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_parts import Network, is_on_several_devices, parameters_beyond_text
from trl_apa.models.quantization import settle_quantization
from trl_apa.models.reference import check_adapter_exists
from trl_apa.models.reward_adapter import DEFAULT_NAME, RewardAdapter, load_reward_adapter
from trl_apa.models.value_adapter import VALUE_ADAPTER, AdapterValueModel
from trl_apa.models.value_model import ValueModel, load_network, save_network, state_of


VALUE_MODEL_FOLDER = "value_model"


class PolicyAndValue(nn.Module, PushToHubMixin):
    """The policy and its value model side by side; no trainable parameter belongs to both.

    To generation, saving and gradient checkpointing it presents itself as the policy, and to a script that calls it as
    the classic wrapper.

    Args:
        policy: a language model, with or without PEFT adapters.
        value_model: a network of its own, one whose adapter lies on the policy's base, a head that reads the policy's
            hidden states, or None: advantages that need no values.
        reward_adapter (*optional*): a reward model on the policy's base, for `compute_reward_score`.
    """

    # The Trainer would count the tokens of labels if it took the arguments of `forward` for those of a loss.
    accepts_loss_kwargs = False

    def __init__(
        self,
        policy: Network,
        value_model: Critic | None,
        reward_adapter: RewardAdapter | None = None,
    ):
        super().__init__()
        self.policy: Network = settle_quantization(policy)
        self.value_model = None if value_model is None else settle_quantization(value_model)
        self.reward_adapter = reward_adapter
        self.eval()

    def train(self, mode: bool = True) -> "PolicyAndValue":
        """Say that training begins, or ends: the networks compute the same in both, see `make_repeatable`."""
        self.training = mode
        for network in self.children():
            make_repeatable(network, checkpointing=mode)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        *,
        response_width: int | None = None,
        **inputs: Any,
    ) -> Any:
        """What the update reads of a micro-batch; without `response_width`, what a classic wrapper returns.

        Args:
            input_ids, attention_mask: int64 `(B, T)`.
            past_key_values, return_past_key_values: as in `classic_outputs`.
            response_width: `R`, tokens; the trainer's own calls have it.
            inputs: the other arguments of `response_outputs`, or of the language model.

        Returns:
            A dict, see `response_outputs`; or `(float32 logits, loss, values)` at every position, see
            `classic_outputs`.
        """
        if response_width is None:
            cache = (past_key_values, return_past_key_values)
            return classic_outputs(self, *cache, input_ids=input_ids, attention_mask=attention_mask, **inputs)
        tokens: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.response_outputs(response_width=response_width, **tokens, **inputs)

    def response_outputs(
        self,
        input_ids: Tensor,
        response_width: int,
        token_index: Tensor,
        predicting_index: Tensor,
        response_index: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        prompt_lengths: tuple[int, ...] | None = None,
        row_groups: tuple[tuple[int, int, int], ...] | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        with_policy: bool = True,
        with_value: bool = True,
        with_entropy: bool = False,
        with_logits: bool = False,
        with_hidden: bool = False,
    ) -> dict[str, Tensor]:
        """What the update reads of a micro-batch at its response tokens.

        Args:
            input_ids, token_index, predicting_index, response_index, position_ids: see `batch.lay_out`.
            attention_mask, sequence_lengths, prompt_lengths, row_groups: likewise.
            encoder_input_ids, encoder_attention_mask: likewise.
            response_width: `R`, tokens.
            temperature: the sampling temperature.
            with_policy, with_value: which of the two networks to run, as far as they are there. With gradient,
                networks on one base run in one pass each: see `passes`.
            with_entropy: also the policy's entropy, without gradient.
            with_logits: also the policy's logits; not of a packed layout.
            with_hidden: with `with_policy`, also the policy's last hidden states.

        Returns:
            `logprobs` (nats), `values` (reward units), `entropy` (nats) `(B, R)` and `logits` `(B, R, V)`: float32,
            those that were asked for; `hidden` `(B, R, H)` in the policy's own precision, of the state before each
            token.

        Raises:
            RuntimeError: if gradients are to come from one pass through two networks on one base.
        """
        if self.base_is_shared and with_policy and with_value and torch.is_grad_enabled():
            raise RuntimeError("policy and value model share a base: run them one after the other, see passes")
        given = (
            input_ids,
            position_ids,
            token_index,
            predicting_index,
            response_index,
            attention_mask,
            sequence_lengths,
            prompt_lengths,
            row_groups,
            encoder_input_ids,
            encoder_attention_mask,
        )
        tokens: dict[str, Any] = {
            name: field for name, field in zip(TOKEN_FIELDS, given, strict=True) if field is not None
        }
        outputs: dict[str, Tensor] = {}
        with_value = with_value and self.value_model is not None
        reads_policy = with_value and self.value_is_a_head
        hidden_BRH = None
        if with_policy or reads_policy:
            reading = (self.policy, tokens, response_width, temperature)
            reads_hidden = reads_policy or with_hidden
            of_policy = policy_outputs(*reading, with_entropy, with_hidden=reads_hidden, with_logits=with_logits)
            hidden_BRH = of_policy.hidden_BRH
            named = {
                "logprobs": of_policy.logprobs_BR,
                "entropy": of_policy.entropy_BR,
                "logits": of_policy.logits_BRV,
                "hidden": hidden_BRH if with_hidden else None,
            }
            outputs = {name: tensor for name, tensor in named.items() if tensor is not None}
        if with_value:
            outputs["values"] = self._values(tokens, response_width, hidden_BRH)
        return outputs

    def _values(self, tokens: dict[str, Any], response_width: int, hidden_BRH: Tensor | None) -> Tensor:
        value_model: Any = self.value_model
        values_BR: Tensor
        if self.value_is_a_head:
            values_BR = value_model(hidden_BRH)
        elif self.base_is_shared:
            values_BR = value_model(self.policy, tokens, response_width)
        else:
            values_BR = value_model(tokens, response_width)
        return values_BR

    @property
    def value_is_a_head(self) -> bool:
        """Whether the value model has no separate trunk."""
        return isinstance(self.value_model, PolicyValueHead)

    @property
    def parts_beside_policy(self) -> tuple[str, ...]:
        """Names of what `save_pretrained` writes beside the policy: a folder, or a head's file."""
        if self.value_model is None:
            return ()
        return (HEAD_WEIGHTS if self.value_is_a_head else VALUE_MODEL_FOLDER,)

    @property
    def base_is_shared(self) -> bool:
        """Whether the value model is an adapter on the policy's base."""
        return isinstance(self.value_model, AdapterValueModel)

    @property
    def passes(self) -> tuple[dict[str, bool], ...]:
        """Arguments of the forward calls, each with its backward, that a micro-batch needs.

        Networks on one base come one after the other: gradient checkpointing runs a layer a second time in the
        backward pass, with the adapter that is active then, and gives wrong gradients without a word if that is the
        other one's.
        """
        return ({"with_value": False}, {"with_policy": False}) if self.base_is_shared else ({},)

    @contextmanager
    def adapter_for(self, with_policy: bool = True, with_value: bool = True) -> Iterator[None]:
        """Around forward and backward of one of `passes`, so that both see the adapter of that network."""
        if self.base_is_shared and not with_policy:
            with only_adapter(self.policy, VALUE_ADAPTER):
                yield
        else:
            yield

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is trained of each network: `policy` and `value`, which is empty without a value model."""
        of_value = [] if self.value_model is None else list(self.value_model.parameters())
        if self.base_is_shared:
            of_value += adapter_parameters(self.policy, VALUE_ADAPTER).values()
        known = {id(parameter) for parameter in of_value}
        networks = {"policy": [p for p in self.policy.parameters() if id(p) not in known], "value": of_value}
        return {name: [p for p in parameters if p.requires_grad] for name, parameters in networks.items()}

    def add_reward_adapter(self, path: str) -> None:
        """Put a reward model's adapter on the policy's base, frozen: see `load_reward_adapter`.

        Raises:
            ValueError: if there is one already, or it does not fit.
        """
        if self.reward_adapter is not None:
            raise ValueError(f"the policy has a reward adapter already; {path!r} would be the second")
        argument = f"reward_funcs='adapter:{path}'"
        if is_peft_model(self.policy) and DEFAULT_NAME in self.policy.peft_config:
            raise ValueError(
                f"{argument}: the policy has an adapter {DEFAULT_NAME!r} already, of another trainer, say; load the "
                f"policy anew, or first call its delete_adapter({DEFAULT_NAME!r})"
            )
        score = load_reward_adapter(self.policy, path, DEFAULT_NAME, argument)
        self.reward_adapter = RewardAdapter(score, DEFAULT_NAME)

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
    def pretrained_model(self) -> Network:
        """The policy, under the name that a classic wrapper has for it."""
        return self.policy

    @property
    def v_head(self) -> nn.Module:
        """Classic's head on the policy; AttributeError where the value model is another one."""
        if not isinstance(self.value_model, PolicyValueHead):
            raise AttributeError("v_head")
        return self.value_model.head

    @property
    def supports_rm_adapter(self) -> bool:
        """Whether `compute_reward_score` has a reward adapter to ask."""
        return self.reward_adapter is not None

    @property
    def is_peft_model(self) -> bool:
        return is_peft_model(self.policy)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.policy.dtype
        return dtype

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
    def is_sequential_parallel(self) -> bool:
        """Whether the policy's layers are on several devices."""
        return is_on_several_devices(self.policy)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.policy.modules())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the policy."""
        return self.policy.generate(*args, **kwargs)

    def run_with_policy(self, function: Callable[[Network], Any]) -> Any:
        """`function(policy)`, in which the policy may be called by itself, any number of times.

        FSDP2 makes weights whole in the forward pass of what it wraps: this is a method that it takes for one.
        """
        return function(self.policy)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.policy.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.policy.get_output_embeddings()
        return head

    def tie_weights(self) -> None:
        """Again one weight where the policy's vocabulary has one, after an engine has replaced parameters."""
        self.policy.tie_weights()

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers of both networks, which FSDP2 shards one by one."""
        return sorted({name for network in self.networks() for name in network._no_split_modules or ()})

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Gradient checkpointing of both networks, under the name that newer transformers' Trainer looks for first."""
        for network in self.networks():
            renamed_method(network, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                activation_checkpointing_kwargs, **kwargs
            )
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        for network in self.networks():
            renamed_method(network, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        self.train(self.training)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def networks(self) -> Iterator[Network]:
        """The transformers: the policy, and the value model if it has a separate one."""
        yield self.policy
        if isinstance(self.value_model, ValueModel):
            yield self.value_model.network

    def save_pretrained(
        self,
        path: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        base_folder: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """The policy as a checkpoint that plain transformers (or peft) loads, and the value model.

        A value model goes into a folder of its own, a head on the policy beside it: `path` then is what
        `AutoModelForCausalLMWithValueHead.from_pretrained` loads.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
            base_folder: where a base from a GGUF file is written, see `gguf.save_dense_base`; by default `path`.
            kwargs: passed on to the policy's `save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        policy_state, value_state = state_of(state_dict, "policy"), state_of(state_dict, "value_model")
        if kwargs.get("is_main_process", True):
            save_dense_base(self.policy, base_folder or path, policy_state)
            if isinstance(self.value_model, ValueModel):
                save_dense_base(self.value_model.network, base_folder or path, state_of(value_state, "network"))
        save_network(self.policy, path, policy_state, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(path) / VALUE_MODEL_FOLDER
        if self.value_model is None:
            return
        if isinstance(self.value_model, PolicyValueHead):
            self.value_model.save_pretrained(path, value_state, for_classic=self.is_peft_model)
        elif isinstance(self.value_model, AdapterValueModel):
            self.value_model.save_pretrained(self.policy, folder, policy_state, state_of(value_state, "head"))
        else:
            self.value_model.save_pretrained(folder, state_dict=value_state)


def load_policy_and_value(module: PolicyAndValue, path: str | Path) -> None:
    """Put what `PolicyAndValue.save_pretrained` wrote into networks of the same shape.

    Raises:
        ValueError, RuntimeError: if they are another model's.
    """
    load_network(module.policy, path)
    if module.value_model is None:
        return
    folder = Path(path) if module.value_is_a_head else Path(path) / VALUE_MODEL_FOLDER
    if isinstance(module.value_model, AdapterValueModel):
        module.value_model.load_weights(module.policy, folder)
    else:
        module.value_model.load_weights(folder)


def build_policy(model: Network, peft_config: PeftConfig | None) -> Network:
    """`model`, with new adapters if `peft_config` says so.

    Raises:
        ValueError: for a model that cannot be trained as a policy: no language model, a kind of adapters that cannot
            be trained here, adapters upon adapters, a quantised model without adapters, or one that is frozen.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"model is a {type(model).__name__}; it should be a language model")
    model = settle_quantization(model)
    if is_peft_model(model) and peft_config is not None:
        raise ValueError("model has adapters already; give peft_config or a PEFT model, not both")
    if peft_config is not None:
        refuse_unsupported(peft_config)
    policy = model if peft_config is None else with_adapters(model, peft_config)
    if is_peft_model(policy):
        refuse_unsupported(policy.active_peft_config)
    for parameter in parameters_beyond_text(policy):
        parameter.requires_grad_(False)  # it has no gradient, for which engines of several processes would wait
    if getattr(policy, "is_quantized", False) and not is_peft_model(policy):
        raise ValueError("model is quantised, so its weights cannot be trained; give peft_config for adapters on it")
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError("model has no trainable parameter; load a saved adapter with is_trainable=True")
    return policy


def select_adapter(policy: Network, name: str | None) -> None:
    """Make the adapter of that name the one that is trained, unless it is None; its place is before the value model's.

    Raises:
        ValueError: if `policy` is no PEFT model, or has no such adapter.
    """
    if name is not None:
        check_adapter_exists("model_adapter_name", name, policy)
        policy.set_adapter(name)
