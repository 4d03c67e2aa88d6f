"""The classic wrappers: a language model with a scalar head on its last hidden states.

APA does not use that head as its critic, which is a network of its own (section 3 of the paper). The wrappers are here
for scripts that make or load them, and for PPO as it was.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import PushToHubMixin, is_bitsandbytes_available

from trl_apa._trl import is_peft_model
from trl_apa.models.adapter_kinds import refuse_prompt_learning, with_adapters
from trl_apa.models.checkpointing import is_checkpointing, renamed_method
from trl_apa.models.classic_value_head import HEAD_PREFIX, SummaryHead, read_value_head, save_value_head
from trl_apa.models.gguf import save_dense_base
from trl_apa.models.loading import load_language_model, process_device
from trl_apa.models.logprobs import last_hidden_states
from trl_apa.models.network_parts import is_on_several_devices
from trl_apa.models.quantization import settle_quantization
from trl_apa.models.reward_adapter import RewardAdapter, load_reward_adapter, reward_scores
from trl_apa.models.value_model import output_width, save_network


MODEL_PREFIX = "pretrained_model."
SCORE_PREFIX = "score."
HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
DROPOUT = 0.1
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class ValueHeadWrapper(nn.Module, PushToHubMixin):
    """What the two wrappers share.

    Args:
        pretrained_model (`PreTrainedModel` or `PeftModel`): a language model.
        v_head_init_strategy, v_head_initializer_range: see `SummaryHead`.
        summary_dropout_prob (`float`, *optional*): the head's dropout; by default that of the model's config, or 0.1.

    Raises:
        ValueError: if `pretrained_model` is no language model of this wrapper's kind, its adapter works by prompt
            learning, or part of it is offloaded to the CPU or to disk.
    """

    # transformers' class that loads the language model; None: the one that the checkpoint's config names.
    transformers_parent_class: ClassVar[Any] = None
    # None: either kind.
    is_encoder_decoder: ClassVar[bool | None] = None
    # Arguments of `from_pretrained` that are the wrapper's and not the language model's. A subclass may name more.
    supported_args: ClassVar[Sequence[str]] = HEAD_ARGUMENTS
    supported_modules: ClassVar[tuple[str, ...]] = (HEAD_PREFIX.rstrip("."),)
    supported_rm_modules: ClassVar[tuple[str, ...]] = (SCORE_PREFIX.rstrip("."),)
    supported_pretrained_model_architectures: ClassVar[tuple[type, ...]] = (PreTrainedModel, PeftModel)
    # What families call their vocabulary's head; `get_output_embeddings` is what is asked here.
    lm_head_namings: ClassVar[Sequence[str]] = ("lm_head", "embed_out", "output_projection")

    def __init__(
        self,
        pretrained_model: PreTrainedModel | PeftModel,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float | None = None,
    ):
        super().__init__()
        _check_language_model(pretrained_model, self.is_encoder_decoder, type(self).__name__)
        self.pretrained_model: PreTrainedModel | PeftModel = settle_quantization(pretrained_model)
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(pretrained_model.config, "summary_dropout_prob", DROPOUT)
        self.v_head = SummaryHead(
            output_width(pretrained_model), summary_dropout_prob, v_head_init_strategy, v_head_initializer_range
        ).to(pretrained_model.get_output_embeddings().weight.device)
        self.score: nn.Linear | None = None
        self.rm_adapter_name: str | None = None
        self.register_state_dict_post_hook(_to_checkpoint_names)  # type: ignore[no-untyped-call]  # torch has no annotations
        self.register_load_state_dict_pre_hook(_from_checkpoint_names)  # type: ignore[no-untyped-call]  # torch has no annotations

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        *,
        peft_config: PeftConfig | None = None,
        reward_adapter: str | os.PathLike[str] | None = None,
        reward_adapter_name: str = "reward_adapter",
        is_trainable: bool = False,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        device_map: Any = None,
        torch_dtype: Any = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float | None = None,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "ValueHeadWrapper":
        """Wrap a model that is in memory, or load one, with its value head if the checkpoint has one.

        Args:
            pretrained_model_name_or_path: a model; or folder or hub name of a language model, of an adapter, or of
                what this class or classic TRL saved.
            peft_config (`PeftConfig`, *optional*): new adapters to put on it. Ignored, with a warning, if it has some.
            reward_adapter (`str`, *optional*): a reward model's adapter for `compute_reward_score`, see
                `load_reward_adapter`.
            reward_adapter_name (`str`, *optional*, defaults to `"reward_adapter"`): what to call it on the model.
            is_trainable (`bool`, *optional*, defaults to `False`): whether a loaded adapter is to be trained further.
            load_in_8bit, load_in_4bit (`bool`, *optional*, defaults to `False`): quantise with bitsandbytes while
                loading. `quantization_config` among `kwargs` says more.
            device_map (*optional*): as in transformers; quantised models go to this process's device. Where there is
                no GPU, a GPU's number means the CPU, so that `{"": Accelerator().local_process_index}` loads anywhere.
            torch_dtype (*optional*): also accepted as `dtype`. Defaults to float32, whatever the checkpoint holds, as
                under transformers 4 (`"auto"` keeps the checkpoint's); quantised models keep transformers' default.
            v_head_init_strategy, v_head_initializer_range, summary_dropout_prob: of a new head, see the class.
            use_gradient_checkpointing, gradient_checkpointing_kwargs: for a quantised model that gets new adapters,
                see peft's `prepare_model_for_kbit_training`.
            kwargs: those in `supported_args` go to the class itself, the others to transformers' `from_pretrained`;
                classic's `use_auth_token` as `token`.

        Raises:
            ValueError: naming the argument that is of the wrong type or does not fit another.
            ImportError: if a model is to be quantised and bitsandbytes is not installed.
            OSError: if there is no such checkpoint.
        """
        source = pretrained_model_name_or_path
        _check_arguments(source, peft_config, reward_adapter)
        _rename_token(kwargs)
        own = {name: kwargs.pop(name) for name in cls.supported_args or () if name in kwargs}
        own |= {"v_head_init_strategy": v_head_init_strategy, "v_head_initializer_range": v_head_initializer_range}
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        model: PreTrainedModel | PeftModel
        if isinstance(source, nn.Module):
            path, model = None, settle_quantization(source)
            _warn_of_loading_options(model, load_in_8bit, load_in_4bit)
        else:
            path = os.fspath(source)
            kwargs |= _loading_options(kwargs, load_in_8bit, load_in_4bit, device_map, torch_dtype)
            model = load_language_model(path, cls.transformers_parent_class, is_trainable, hub, **kwargs)
        if peft_config is not None and is_peft_model(model):
            warnings.warn("peft_config is ignored: the model has adapters already", UserWarning, stacklevel=2)
        elif peft_config is not None:
            model = _add_adapters(model, peft_config, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        wrapper = cls(model, **own, summary_dropout_prob=summary_dropout_prob)
        if path is not None and (head_state := read_value_head(path, **hub)):
            wrapper.v_head.load_state_dict(head_state)
        if reward_adapter is not None:
            wrapper.score = load_reward_adapter(
                model, os.fspath(reward_adapter), reward_adapter_name, **_only(hub, "cache_dir", "token")
            )
            wrapper.rm_adapter_name = reward_adapter_name
        return wrapper

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits, loss and values at every position (of the decoder, if there are two stacks).

        Args:
            input_ids (`Tensor` `(B, T)`), past_key_values, attention_mask (`Tensor` `(B, T)`), kwargs: the language
                model's inputs.
            return_past_key_values (`bool`, *optional*, defaults to `False`): append the cache to the result.

        Returns:
            float32 logits `(B, T, V)`; the language model's loss, nats per token, or None without `labels`; values
            `(B, T)`, reward units.
        """
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        result = output.logits.float(), output.loss, self.v_head(last_hidden_states(output)).squeeze(-1)
        return (*result, output.past_key_values) if return_past_key_values else result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the language model."""
        return self.pretrained_model.generate(*args, **kwargs)

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Scores of the reward adapter after every token, `(B, T, labels)`: see `reward_scores`.

        What else a tokenizer returns (`token_type_ids`) is accepted and not read.

        Raises:
            ValueError: if the model was loaded without `reward_adapter`.
        """
        if self.score is None or self.rm_adapter_name is None:
            raise ValueError(
                "there is no reward adapter; load the model with from_pretrained(..., reward_adapter=...)"
            )
        return reward_scores(self.pretrained_model, self.score, input_ids, attention_mask, self.rm_adapter_name)

    @property
    def config(self) -> Any:
        return self.pretrained_model.config

    @property
    def generation_config(self) -> Any:
        return self.pretrained_model.generation_config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pretrained_model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pretrained_model.dtype
        return dtype

    @property
    def is_peft_model(self) -> bool:
        return is_peft_model(self.pretrained_model)

    @property
    def supports_rm_adapter(self) -> bool:
        return self.score is not None

    @property
    def is_sequential_parallel(self) -> bool:
        """Whether the layers are on several devices."""
        return is_on_several_devices(self.pretrained_model)

    @property
    def is_loaded_in_8bit(self) -> bool:
        return getattr(self.pretrained_model, "is_loaded_in_8bit", False)

    @property
    def is_loaded_in_4bit(self) -> bool:
        return getattr(self.pretrained_model, "is_loaded_in_4bit", False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return is_checkpointing(self.pretrained_model)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        model = self.pretrained_model
        renamed_method(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        model = self.pretrained_model
        renamed_method(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    # Since transformers 5.20 these are the names that the Trainer looks for first.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def enable_input_require_grads(self) -> None:
        """Let gradients pass through a frozen embedding, as gradient checkpointing of a PEFT model needs."""
        self.pretrained_model.enable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.pretrained_model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.pretrained_model.get_output_embeddings()
        return head

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """The language model (or its active adapter) as plain transformers (or peft) loads it, and the head.

        Args:
            save_directory: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
            kwargs: passed on to the language model's `save_pretrained`. Weights are always written as safetensors; the
                head beside an adapter also as `save_value_head` does it for classic.
        """
        kwargs.pop("safe_serialization", None)
        state = self.state_dict() if state_dict is None else state_dict
        model_state = {name: t for name, t in state.items() if not name.startswith((HEAD_PREFIX, SCORE_PREFIX))}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        if kwargs.get("is_main_process", True):
            save_dense_base(self.pretrained_model, save_directory, model_state)
        save_network(self.pretrained_model, os.fspath(save_directory), model_state, **kwargs)
        if kwargs.get("is_main_process", True):
            save_value_head(save_directory, state, for_classic=self.is_peft_model)


def without_value_head(model: Any) -> Any:
    """The language model inside a classic wrapper; anything else as it is."""
    return model.pretrained_model if isinstance(model, ValueHeadWrapper) else model


def value_head_of(model: Any, language_model: PreTrainedModel | PeftModel) -> SummaryHead | None:
    """The classic head of `model`: a wrapper's, or one saved in the checkpoint of that name.

    Args:
        model: what the caller gave as policy.
        language_model: what it turned out to be.
    """
    if isinstance(model, ValueHeadWrapper):
        return model.v_head
    if not isinstance(model, str | os.PathLike) or not (state := read_value_head(os.fspath(model))):
        return None
    device = language_model.get_output_embeddings().weight.device
    head = SummaryHead(state["summary.weight"].shape[1]).to(device)
    head.load_state_dict(state)
    return head


def reward_adapter_of(model: Any) -> RewardAdapter | None:
    """The reward adapter of a classic wrapper, if it has one."""
    if not isinstance(model, ValueHeadWrapper) or model.score is None or model.rm_adapter_name is None:
        return None
    return RewardAdapter(model.score, model.rm_adapter_name)


class AutoModelForCausalLMWithValueHead(ValueHeadWrapper):
    """A decoder language model with a value head: `forward` returns `(logits, loss, values)`."""

    transformers_parent_class = AutoModelForCausalLM
    is_encoder_decoder = False
    lm_head_namings = ("lm_head", "embed_out")


class AutoModelForSeq2SeqLMWithValueHead(ValueHeadWrapper):
    """An encoder-decoder with a value head on its decoder: `forward` returns `(logits, loss, values)`."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)


def _check_arguments(source: Any, peft_config: Any, reward_adapter: Any) -> None:
    if not isinstance(source, str | os.PathLike | PreTrainedModel | PeftModel):
        raise ValueError(
            f"pretrained_model_name_or_path is a {type(source).__name__}; it should be a str, a PreTrainedModel or a "
            "PeftModel"
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; it should be a PeftConfig")
    if peft_config is not None:
        refuse_prompt_learning(peft_config)
    if reward_adapter is not None and not isinstance(reward_adapter, str | os.PathLike):
        raise ValueError(
            f"reward_adapter is a {type(reward_adapter).__name__}; it should be a str, the folder or hub name of an "
            "adapter"
        )


def _rename_token(kwargs: dict[str, Any]) -> None:
    """What classic scripts called `token`; transformers 5 does not know the old name any more."""
    given = kwargs.pop("use_auth_token", None)
    if given is not None and kwargs.setdefault("token", given) != given:
        raise ValueError("use_auth_token and token are two names of one argument, and differ: set token alone")


def _check_language_model(model: Any, is_encoder_decoder: bool | None, wrapper: str) -> None:
    if not isinstance(model, PreTrainedModel | PeftModel) or model.get_output_embeddings() is None:
        raise ValueError(f"pretrained_model is a {type(model).__name__}; it should be a language model")
    if is_encoder_decoder is not None and bool(model.config.is_encoder_decoder) != is_encoder_decoder:
        kind = "an encoder-decoder" if is_encoder_decoder else "a decoder"
        raise ValueError(f"{wrapper} wraps {kind}, but pretrained_model is a {type(model).__name__}")
    if is_peft_model(model):
        refuse_prompt_learning(model.active_peft_config)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(f"device_map puts the model on {sorted(devices)}; offloaded weights cannot be trained")


def _loading_options(
    kwargs: dict[str, Any], load_in_8bit: bool, load_in_4bit: bool, device_map: Any, torch_dtype: Any
) -> dict[str, Any]:
    """transformers 5's names for classic's options."""
    options: dict[str, Any] = {}
    if load_in_8bit or load_in_4bit:
        if kwargs.get("quantization_config") is not None:
            raise ValueError("load_in_8bit and load_in_4bit are parts of quantization_config; give one or the other")
        if load_in_8bit and load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both True; a model is loaded in one of them")
        if not is_bitsandbytes_available():
            name = "load_in_8bit" if load_in_8bit else "load_in_4bit"
            raise ImportError(f"{name}=True needs bitsandbytes, which is not installed: pip install bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
    if torch_dtype is not None:
        if kwargs.get("dtype") not in (None, torch_dtype):
            raise ValueError("torch_dtype and dtype are the same argument: pass one of them")
        options["dtype"] = torch_dtype
    if device_map is None and (options | kwargs).get("quantization_config") is not None:
        device_map = {"": process_device()}
    if device_map is not None:
        options["device_map"] = _without_missing_devices(device_map)
    return options


def _warn_of_loading_options(model: PreTrainedModel | PeftModel, load_in_8bit: bool, load_in_4bit: bool) -> None:
    for bits, wanted in ((8, load_in_8bit), (4, load_in_4bit)):
        if wanted and not getattr(model, f"is_loaded_in_{bits}bit", False):
            warnings.warn(
                f"load_in_{bits}bit=True has no effect on a model that is in memory; load it with "
                f"quantization_config=BitsAndBytesConfig(load_in_{bits}bit=True), or give its folder or name",
                UserWarning,
                stacklevel=3,
            )


def _without_missing_devices(device_map: Any) -> Any:
    if torch.accelerator.is_available():
        return device_map
    if isinstance(device_map, dict):
        return {name: "cpu" if isinstance(device, int) else device for name, device in device_map.items()}
    return "cpu" if isinstance(device_map, int) else device_map


def _add_adapters(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    use_gradient_checkpointing: bool,
    gradient_checkpointing_kwargs: dict[str, Any] | None,
) -> PeftModel:
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    return with_adapters(model, peft_config)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _to_checkpoint_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """Name the language model's weights as it names them itself, as classic's checkpoints do."""
    for name in [name for name in state_dict if name.startswith(prefix + MODEL_PREFIX)]:
        state_dict[prefix + name.removeprefix(prefix + MODEL_PREFIX)] = state_dict.pop(name)


def _from_checkpoint_names(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *load_state_dict_arguments: Any
) -> None:
    own = tuple(prefix + name for name in (HEAD_PREFIX, MODEL_PREFIX, SCORE_PREFIX))
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(own)]:
        state_dict[prefix + MODEL_PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
