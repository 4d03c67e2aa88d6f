"""The networks of offline training: ILQL's values, and APA's state normaliser."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trl_apa._trl import is_peft_model
from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models import PolicyAndValue, ValueHead, ValueModel, freeze_all_but, load_policy_and_value
from trl_apa.models.gguf import save_dense_base
from trl_apa.models.logprobs import TOKEN_FIELDS, response_rows, response_states
from trl_apa.models.network_parts import Network
from trl_apa.models.quantization import settle_quantization
from trl_apa.models.value_model import state_of
from trl_apa.offline.config import OfflineConfig


NORMALISER_FOLDER = "state_normaliser"
Q_WEIGHTS = "q_heads.safetensors"


class QHead(nn.Module):
    """Hidden state to one value for each token of the vocabulary, in float32; the last layer starts at zero.

    Args:
        hidden_size: width of the trunk's output.
        vocabulary: tokens.
    """

    def __init__(self, hidden_size: int, vocabulary: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, vocabulary)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden_BRH: Tensor) -> Tensor:
        with torch.autocast(hidden_BRH.device.type, enabled=False):
            values_BRV: Tensor = self.out(self.hidden(hidden_BRH.to(self.out.weight.dtype)).relu())
            return values_BRV


class QValueModel(ValueModel):
    """V, two Q heads and their slowly moving targets on one trunk of their own (ILQL).

    Args:
        network, head: those of a value model.
        vocabulary: tokens that the policy chooses from.
    """

    def __init__(self, network: Network, head: ValueHead, vocabulary: int):
        super().__init__(network, head)
        device = head.out.weight.device
        self.q = nn.ModuleList(QHead(head.hidden_size, vocabulary) for _ in range(2)).to(device)
        self.target_q = nn.ModuleList(QHead(head.hidden_size, vocabulary) for _ in range(2)).to(device)
        self.target_q.requires_grad_(False).load_state_dict(self.q.state_dict())

    def at_responses(self, tokens: Mapping[str, Tensor], response_width: int) -> dict[str, Tensor]:
        """Of the state before each of the last `response_width` tokens, reward units, at least float32.

        Returns:
            `values` `(B, R)`, `q1` and `q2` `(B, R, V)`, with gradient, and `target_q` `(B, R, V)`, the smaller of the
            target heads, without; 0 where a row has no token.
        """
        hidden_MH = response_states(self.trunk, tokens)
        values = {"values": self.head(hidden_MH), "q1": self.q[0](hidden_MH), "q2": self.q[1](hidden_MH)}
        values = {name: at_least_float32(value) for name, value in values.items()}
        values["target_q"] = self.smaller_target(hidden_MH)
        return {name: response_rows(value, tokens, response_width) for name, value in values.items()}

    @torch.no_grad()
    def smaller_target(self, hidden_BRH: Tensor) -> Tensor:
        """The smaller of the two target heads, reward units, at least float32 `(B, R, V)`."""
        first_BRV, second_BRV = (head(hidden_BRH.detach()) for head in self.target_q)
        return at_least_float32(torch.minimum(first_BRV, second_BRV))

    @torch.no_grad()
    def advantages(self, hidden_BRH: Tensor) -> Tensor:
        """Q^(s,a) - V(s) of every token, reward units, `(B, R, V)`."""
        return self.smaller_target(hidden_BRH) - at_least_float32(self.head(hidden_BRH))[..., None]

    @torch.no_grad()
    def move_targets(self, rate: float) -> None:
        """target <- (1 - rate) target + rate Q (Polyak's average)."""
        for target, current in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.lerp_(current.to(target.dtype), rate)

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """As of `ValueModel`, and the Q heads."""
        state = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(path, state)
        heads = {name: tensor for name, tensor in state.items() if name.partition(".")[0] in ("q", "target_q")}
        save_file({name: tensor.cpu().contiguous() for name, tensor in heads.items()}, Path(path) / Q_WEIGHTS)

    def load_weights(self, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into these networks."""
        super().load_weights(path)
        state = load_file(Path(path) / Q_WEIGHTS)
        self.q.load_state_dict(state_of(state, "q"))
        self.target_q.load_state_dict(state_of(state, "target_q"))

    @classmethod
    def from_pretrained(cls, path: str | Path, base_model: Network | None = None, **kwargs: Any) -> "QValueModel":
        """What `save_pretrained` wrote; arguments as of `ValueModel.from_pretrained`."""
        values = ValueModel.from_pretrained(path, base_model, **kwargs)
        vocabulary = len(load_file(Path(path) / Q_WEIGHTS)["q.0.out.bias"])
        model = cls(values.network, values.head, vocabulary)
        model.load_weights(path)
        return model


class OfflineNetworks(PolicyAndValue):
    """Policy, value model and, for APA, the state normaliser, in one module.

    Args:
        policy: a language model.
        value_model: a separate network, `QValueModel` for ILQL; None for a loss that needs no values.
        normaliser: h(s), a network like a value model whose head starts at zero; None without one.
    """

    value_model: ValueModel | None
    # The loss is divided by what the Trainer counts in a batch.
    accepts_loss_kwargs = True

    def __init__(self, policy: Network, value_model: ValueModel | None, normaliser: ValueModel | None = None):
        super().__init__(policy, value_model)
        self.normaliser = None if normaliser is None else settle_quantization(normaliser)

    @property
    def values(self) -> ValueModel:
        """The value model; TypeError with a loss that needs none."""
        if self.value_model is None:
            raise TypeError("value_model is None: this loss needs no values")
        return self.value_model

    @property
    def q_model(self) -> QValueModel:
        """The value model of ILQL; TypeError with another loss."""
        if not isinstance(self.value_model, QValueModel):
            raise TypeError(f"value_model is a {type(self.value_model).__name__}; it should be a QValueModel")
        return self.value_model

    @property
    def parts_beside_policy(self) -> tuple[str, ...]:
        return (*super().parts_beside_policy, *(() if self.normaliser is None else (NORMALISER_FOLDER,)))

    def forward(  # type: ignore[override]  # what the base class takes is passed on by name
        self, with_normaliser: bool = False, with_q: bool = False, **inputs: Any
    ) -> dict[str, Tensor]:
        """What the update reads of a micro-batch at its response tokens.

        Args:
            with_normaliser: also run the normaliser, if there is one: `normaliser` `(B, R)`.
            with_q: also `values`, `q1`, `q2` and `target_q`, see `QValueModel.at_responses`.
            inputs: of `PolicyAndValue.response_outputs`.
        """
        outputs = super().response_outputs(**inputs)
        tokens = {name: inputs[name] for name in TOKEN_FIELDS if inputs.get(name) is not None}
        if with_q:
            outputs |= self.q_model.at_responses(tokens, inputs["response_width"])
        if with_normaliser and self.normaliser is not None:
            outputs["normaliser"] = self.normaliser(tokens, inputs["response_width"])
        return outputs

    def networks(self) -> Iterator[Network]:
        yield from super().networks()
        if self.normaliser is not None:
            yield self.normaliser.network

    def save_pretrained(
        self,
        path: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        base_folder: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """As of `PolicyAndValue`, and the normaliser in a separate folder."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(path, state_dict, base_folder, **kwargs)
        if self.normaliser is not None and kwargs.get("is_main_process", True):
            state = state_of(state_dict, "normaliser")
            save_dense_base(self.normaliser.network, base_folder or path, state_of(state, "network"))
            self.normaliser.save_pretrained(Path(path) / NORMALISER_FOLDER, state)

    def load_weights(self, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into these networks."""
        load_policy_and_value(self, path)
        if self.normaliser is not None:
            self.normaliser.load_weights(Path(path) / NORMALISER_FOLDER)


def offline_networks(args: OfflineConfig, module: PolicyAndValue) -> OfflineNetworks:
    """The networks that the loss needs, made of policy and value model.

    Raises:
        ValueError: if the value model is no network of its own, or the policy an encoder-decoder.
    """
    policy, value_model = module.policy, module.value_model
    if value_model is not None and not isinstance(value_model, ValueModel):
        raise ValueError(f"value_model is a {type(value_model).__name__}; offline it should be a network of its own")
    if module.config.is_encoder_decoder:
        raise ValueError("model is an encoder-decoder; offline learning is for decoders")
    if value_model is not None and args.loss_type == "ilql" and not isinstance(value_model, QValueModel):
        vocabulary = policy.get_output_embeddings().weight.shape[0]
        value_model = QValueModel(value_model.network, value_model.head, vocabulary)
        if args.bc_coef == 0:
            policy.requires_grad_(False)
    normaliser = ValueModel.from_policy(policy) if args.learn_state_normaliser else None
    if normaliser is not None and args.num_unfrozen_layers is not None and not is_peft_model(normaliser.network):
        freeze_all_but(args.num_unfrozen_layers, normaliser.network)
    return OfflineNetworks(policy, value_model, normaliser)
