"""The standalone value model: a separate transformer trunk with a scalar head at every position."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa._trl import is_peft_model
from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.adapters import without_card_of_peft
from trl_apa.models.copying import copy_of_trunk, independent_copy
from trl_apa.models.gguf import dense_options, gguf_source, load_config
from trl_apa.models.loading import class_that_knows, load_language_model
from trl_apa.models.logprobs import response_rows, response_states
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_parts import Network, inner_model, text_trunk, without_unknown_pad
from trl_apa.models.partitioned import gathered, whole_shape
from trl_apa.models.quantization import settle_quantization


HEAD_WEIGHTS = "value_head.safetensors"
DESCRIPTION = "value_model.json"


class ValueHead(nn.Module):
    """Hidden state to scalar, in float32. The last layer starts at zero: no value is claimed before it is learned.

    Args:
        hidden_size: width of the trunk's output.
        kind: "mlp", the paper's two layers (twice the width, ReLU), or "linear".
    """

    def __init__(self, hidden_size: int, kind: str = "mlp"):
        super().__init__()
        if kind not in ("mlp", "linear"):
            raise ValueError(f"kind={kind!r}: the value head is 'mlp' or 'linear'")
        self.kind = kind
        self.hidden_size = hidden_size
        if kind == "mlp":
            self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size if kind == "mlp" else hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def like(cls, score: nn.Linear) -> "ValueHead":
        """A linear head that gives what the score layer of a reward model with one label gives."""
        head = cls(score.in_features, "linear")
        with torch.no_grad(), gathered(score.parameters()):
            head.out.weight.copy_(score.weight)
            if score.bias is not None:
                head.out.bias.copy_(score.bias)
        return head

    def forward(self, hidden_BRH: Tensor) -> Tensor:
        with torch.autocast(hidden_BRH.device.type, enabled=False):
            hidden_BRH = hidden_BRH.to(self.out.weight.dtype)
            if self.kind == "mlp":
                hidden_BRH = self.hidden(hidden_BRH).relu()
            values_BR: Tensor = self.out(hidden_BRH).squeeze(-1)
            return values_BR


class ValueModel(nn.Module):
    """V(s): a separate network, not a head on the policy (section 3 of the paper), fitted to the returns.

    Args:
        network: a transformer that returns hidden states, or a language model with PEFT adapters, whose trunk is used.
        head: maps hidden states to one number each, reward units.
    """

    def __init__(self, network: Network, head: ValueHead):
        super().__init__()
        self.network: Network = network
        self.head = head
        # Beginning of a parameter's name -> what it is in the network that this one is a copy of.
        self.given_names: dict[str, str] = {}
        self.eval()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch, but a copy of a given network has that one's names: a classifier's `score.weight`.

        `state_dict`, of which checkpoints are made, has the names of this class.
        """
        for own_name, parameter in super().named_parameters("", recurse, remove_duplicate):
            name = own_name
            for own, given in self.given_names.items():
                if own_name.startswith(f"{own}."):
                    name = f"{given}.{own_name.removeprefix(f'{own}.')}".lstrip(".")
            yield (f"{prefix}.{name}" if prefix else name), parameter

    @property
    def score(self) -> nn.Linear:
        """The layer that a classifier has under this name; AttributeError if the head is not a copy of one."""
        if "head.out" not in self.given_names:
            raise AttributeError("score")
        return self.head.out

    def train(self, mode: bool = True) -> "ValueModel":
        """Say that training begins, or ends: the network computes the same in both, see `make_repeatable`."""
        self.training = mode
        make_repeatable(self.network, checkpointing=mode)
        return self

    @property
    def trunk(self) -> PreTrainedModel:
        """What turns tokens into hidden states; a PEFT model's adapters sit inside its trunk."""
        return text_trunk(self.network.get_base_model()) if is_peft_model(self.network) else self.network

    @property
    def config(self) -> Any:
        return self.network.config

    def forward(self, tokens: Mapping[str, Tensor], response_width: int) -> Tensor:
        """V of the state before each of the last `response_width` tokens, reward units, `(B, R)`.

        `tokens` are those of `batch.pad_tokens`.
        """
        return trunk_values(self.trunk, self.head, tokens, response_width)

    @classmethod
    def from_policy(cls, policy: Network, head: str = "mlp") -> "ValueModel":
        """A deep copy of the policy's trunk; of a PEFT policy, of its base and its active adapter."""
        width = output_width(inner_model(settle_quantization(policy)))
        network = _copy_with_adapter(policy) if is_peft_model(policy) else trainable(copy_of_trunk(policy))
        return cls(network, ValueHead(width, head).to(_device(network)))

    @classmethod
    def from_reward_model(cls, reward_model: PreTrainedModel) -> "ValueModel":
        """A deep copy of a sequence classifier with one label; the head starts as its score layer.

        Raises:
            ValueError: if it has not one label or no linear score layer.
        """
        score = getattr(reward_model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"value_model={type(reward_model).__name__}: a value model can be built from a reward model with one "
                f"linear `score` of one label, not from {score}"
            )
        trunk = text_trunk(settle_quantization(reward_model))
        network = trainable(independent_copy(trunk))
        value_model = cls(network, ValueHead.like(score).to(_device(network)))
        value_model.given_names = {"network": name_in(reward_model, trunk), "head.out": "score"}
        return value_model

    @classmethod
    def from_pretrained(cls, path: str | Path, base_model: Network | None = None, **kwargs: Any) -> "ValueModel":
        """Load what `save_pretrained` wrote; or start from any checkpoint: a reward model's, a language model's.

        Args:
            path: a folder or a hub name.
            base_model: for a saved adapter, the language model that it belongs on (copied); otherwise loaded from
                where the adapter says that it came from.
            kwargs: passed on to the network's `from_pretrained` (`quantization_config`, `device_map`, ...). `dtype`
                defaults to float32 whatever the checkpoint was saved in, because the network is to be trained.

        Raises:
            OSError: if there is no such checkpoint.
        """
        kwargs = {"dtype": torch.float32, **kwargs}
        head = read_head(path)
        if head is None:
            return cls._from_checkpoint(path, **kwargs)
        if find_adapter_config_file(str(path)) is None:
            network = class_that_knows(load_config(path), AutoModel).from_pretrained(path, **kwargs)
        elif base_model is None:
            network = load_language_model(str(path), **kwargs)
        else:
            base = independent_copy(base_model)
            base = base.unload() if is_peft_model(base) else base
            network = PeftModel.from_pretrained(base.requires_grad_(False), path, is_trainable=True)
        return cls(network, head.to(_device(network)))

    @classmethod
    def _from_checkpoint(cls, path: str | Path, **kwargs: Any) -> "ValueModel":
        path, file = gguf_source(path)
        kwargs = {**file, **kwargs}
        config = load_config(path, **{name: value for name, value in kwargs.items() if name == "gguf_file"})
        kwargs = dense_options(kwargs, config)
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
            return cls.from_reward_model(AutoModelForSequenceClassification.from_pretrained(path, **kwargs))
        return cls.on_trunk(class_that_knows(config, AutoModel).from_pretrained(path, **kwargs))

    @classmethod
    def on_trunk(cls, trunk: PreTrainedModel) -> "ValueModel":
        """A bare trunk with a new head. OPT-350m projects its hidden states; its config says to what."""
        trunk = text_trunk(settle_quantization(trunk))
        config = trunk.config.get_text_config()
        width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        return cls(trunk, ValueHead(width).to(_device(trunk)))

    def load_weights(self, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into these networks."""
        load_network(self.network, path)
        self.head.load_state_dict(load_head_weights(path))

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write network (or its adapter), head and a description as safetensors and JSON.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the model's own, as gathered from a sharded one.
        """
        state = self.state_dict() if state_dict is None else state_dict
        save_value_model(self.network, self.head, path, state_of(state, "network"), state_of(state, "head"))


def name_in(network: nn.Module, part: nn.Module) -> str:
    """What `network` calls one of its modules; empty for itself."""
    names: dict[int, str] = {id(module): name for name, module in network.named_modules()}
    return names[id(part)]


def trunk_values(trunk: PreTrainedModel, head: ValueHead, tokens: Mapping[str, Any], response_width: int) -> Tensor:
    """V of the state before each response token, reward units, at least float32 `(B, R)`; 0 where a row has none.

    Args:
        trunk: what turns tokens into hidden states.
        head: hidden state to value.
        tokens: those of `batch.pad_tokens` or `batch.pack_tokens`.
        response_width: tokens.
    """
    # T5's language model has no separate trunk.
    options = {} if trunk.get_output_embeddings() is None else {"output_hidden_states": True}
    values_M = at_least_float32(head(response_states(trunk, tokens, **options)))
    return response_rows(values_M, tokens, response_width)


def save_value_model(
    network: Network,
    head: ValueHead,
    path: str | Path,
    network_state: dict[str, Tensor],
    head_state: dict[str, Tensor],
    adapter: str | None = None,
) -> None:
    """Write network (or an adapter of it, by default the active one), head and a description.

    Args:
        network, head: of the value model.
        path: a folder, made if it is not there.
        network_state, head_state: their weights.
        adapter: which adapter of `network` is the value model's.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_network(network, path, network_state, adapter)
    save_file({name: tensor.cpu().contiguous() for name, tensor in head_state.items()}, path / HEAD_WEIGHTS)
    description = {"head": head.kind, "hidden_size": head.hidden_size, "adapter": is_peft_model(network)}
    (path / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_head(path: str | Path) -> ValueHead | None:
    """The head of a saved value model; None if `path` holds none."""
    path = Path(path)
    if not (path / DESCRIPTION).is_file():
        return None
    description = json.loads((path / DESCRIPTION).read_text())
    if "hidden_size" not in description:
        raise ValueError(
            f"value_model={str(path)!r} has the weights of {description.get('class')}, a module of your own: make it, "
            f"load {HEAD_WEIGHTS} into it, and give it as value_model"
        )
    head = ValueHead(description["hidden_size"], description["head"])
    head.load_state_dict(load_head_weights(path))
    return head


def load_head_weights(path: str | Path) -> dict[str, Tensor]:
    """The head's weights in the folder of a saved value model."""
    return load_file(Path(path) / HEAD_WEIGHTS)


def state_of(state_dict: dict[str, Tensor], child: str) -> dict[str, Tensor]:
    """The entries of a module's state dict that belong to `child`, under the child's own names."""
    prefix = f"{child}."
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def save_network(
    network: Network, path: str | Path, state_dict: dict[str, Tensor], adapter: str | None = None, **kwargs: Any
) -> None:
    """A transformer's checkpoint in `path` itself; of a PEFT model an adapter's, by default that of the active one.

    peft puts an adapter that is not called "default" into a folder below `path`, where `from_pretrained(path)` does
    not look for it. A `README.md` in `path` stays as it is.
    """
    if not is_peft_model(network):
        with without_unknown_pad(network):
            network.save_pretrained(path, state_dict=state_dict, **kwargs)
        return
    adapter = adapter or network.active_adapter
    with without_card_of_peft(network):
        network.save_pretrained(path, state_dict=state_dict, selected_adapters=[adapter], **kwargs)
    folder = Path(path) / adapter
    if adapter != "default" and folder.is_dir():
        shutil.copytree(folder, path, dirs_exist_ok=True)
        shutil.rmtree(folder)


def load_network(network: Network, path: str | Path, adapter: str | None = None) -> None:
    """Put weights that `save_network` wrote into a network of the same shape (of a PEFT model, into that adapter).

    Raises:
        ValueError: if they are another network's.
    """
    if is_peft_model(network):
        weights = load_peft_weights(str(path), device="cpu")
        adapter = adapter or network.active_adapter
        unexpected = set_peft_model_state_dict(network, weights, adapter_name=adapter).unexpected_keys
        if unexpected:
            raise ValueError(f"the adapter in {path} does not fit the model: it has {unexpected[0]!r}")
        return
    # Its own config, whatever lies beside the weights; and transformers' loader, because it writes some families under
    # other names, or transposed.
    with without_unknown_pad(network):
        loaded, info = type(network).from_pretrained(
            path, config=network.config, dtype=network.dtype, output_loading_info=True
        )
    # The class may make more than this network was made with: BERT's pooler.
    own = network.state_dict().keys()
    if missing := sorted(own & info["missing_keys"]):
        raise ValueError(f"{path} does not fit the model: it has no {missing[0]!r}")
    network.load_state_dict({name: tensor for name, tensor in loaded.state_dict().items() if name in own})


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def output_width(language_model: Network) -> int:
    """Width of the hidden states that the vocabulary head reads (not always `hidden_size`: OPT-350m projects)."""
    return whole_shape(language_model.get_output_embeddings().weight)[-1]


def trainable(trunk: PreTrainedModel) -> PreTrainedModel:
    """All floating-point parameters trainable: the policy that was copied may have been partly frozen."""
    for parameter in trunk.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return trunk


def _copy_with_adapter(policy: PeftModel) -> PeftModel:
    """A deep copy of a PEFT policy with only its active adapter; everything outside the trunk is frozen."""
    network = independent_copy(policy)
    for adapter in [name for name in network.peft_config if name != network.active_adapter]:
        network.delete_adapter(adapter)
    in_trunk = {id(parameter) for parameter in text_trunk(network.get_base_model()).parameters()}
    for parameter in network.parameters():
        if id(parameter) not in in_trunk:
            parameter.requires_grad_(False)
    return network
