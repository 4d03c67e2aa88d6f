"""Classic's critic: a linear head on the policy's own last hidden states, and where checkpoints keep it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file

from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.gguf import SUFFIX


HEAD_PREFIX = "v_head."
HEAD_WEIGHTS = "v_head.safetensors"


class SummaryHead(nn.Module):
    """One linear layer from a hidden state to a value, after dropout.

    Args:
        hidden_size (`int`): width of the hidden states.
        dropout (`float`, *optional*, defaults to `0.1`): rate in train mode.
        init_strategy (`str`, *optional*):
            `"normal"`: weights from N(0, `initializer_range`^2), bias 0. `None`: as torch initialises a linear layer.
        initializer_range (`float`, *optional*, defaults to `0.2`): standard deviation for `"normal"`.

    Raises:
        ValueError: for another `init_strategy`.
    """

    def __init__(
        self,
        hidden_size: int,
        dropout: float = 0.1,
        init_strategy: str | None = None,
        initializer_range: float = 0.2,
    ):
        super().__init__()
        if init_strategy not in (None, "normal"):
            raise ValueError(f"v_head_init_strategy={init_strategy!r}; it should be 'normal' or None")
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(hidden_size, 1)
        if init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Values `(B, T, 1)`, reward units, in the precision of the head."""
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            values_BT1: Tensor = self.summary(self.dropout(hidden_BTH).to(self.summary.weight))
            return values_BT1


class PolicyValueHead(nn.Module):
    """V(s) read off the policy's last hidden states, as classic PPO did: the value loss moves the policy's trunk too.

    APA's critic stands alone (section 3 of the paper): see `ValueModel`.

    Args:
        head (`SummaryHead`): hidden state to value.
    """

    def __init__(self, head: SummaryHead):
        super().__init__()
        self.head = head

    def forward(self, hidden_BRH: Tensor) -> Tensor:
        """V of the state before each response token, reward units, float32 `(B, R)`."""
        return at_least_float32(self.head(hidden_BRH).squeeze(-1))

    def load_weights(self, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into this head."""
        self.head.load_state_dict(read_value_head(str(path)))

    def save_pretrained(
        self, path: str | Path, state_dict: dict[str, Tensor] | None = None, for_classic: bool = False
    ) -> None:
        """Write the head next to the policy in `path`, under the names of the classic wrappers.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
            for_classic: see `save_value_head`.
        """
        state = self.state_dict() if state_dict is None else state_dict
        renamed = {name.replace("head.", HEAD_PREFIX, 1): tensor for name, tensor in state.items()}
        save_value_head(path, renamed, for_classic)


def save_value_head(path: str | os.PathLike[str], state_dict: dict[str, Tensor], for_classic: bool = False) -> None:
    """Write those weights of `state_dict` that are under `v_head.`; `read_value_head` reads them back.

    Args:
        path: a folder, made if it is not there.
        state_dict: weights of which the head's are a part.
        for_classic: also write the file in which classic's wrappers look for the head beside an adapter.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    head_state = {name: t.cpu().contiguous() for name, t in state_dict.items() if name.startswith(HEAD_PREFIX)}
    save_file(head_state, Path(path) / HEAD_WEIGHTS, metadata={"format": "pt"})
    if for_classic:
        torch.save(head_state, Path(path) / WEIGHTS_NAME)


def read_value_head(path: str, **hub: Any) -> dict[str, Tensor]:
    """The weights under `v_head.` of a checkpoint of ours or of classic TRL, without that prefix; often none.

    Args:
        path: folder or hub name.
        hub: `token`, `revision`, ... for a hub name.
    """

    def find(name: str) -> str | None:
        file: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        return file

    if path.endswith(SUFFIX):
        return {}
    for name in (HEAD_WEIGHTS, SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if file := find(name):
            return _read_head_weights(file)
        if index := find(f"{name}.index.json"):
            shard_of = json.loads(Path(index).read_text())["weight_map"]
            shards = sorted({shard for key, shard in shard_of.items() if key.startswith(HEAD_PREFIX)})
            return {key: t for shard in shards for key, t in _read_head_weights(str(find(shard))).items()}
    return {}


def _read_head_weights(file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as weights:
            state = {key: weights.get_tensor(key) for key in weights.keys() if key.startswith(HEAD_PREFIX)}
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return {key.removeprefix(HEAD_PREFIX): t for key, t in state.items() if key.startswith(HEAD_PREFIX)}
