"""A value model of the user's own: any module that gives a value for each token that it has read."""

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl_apa.algorithms.masking import at_least_float32
from trl_apa.models.logprobs import response_rows
from trl_apa.models.modes import make_repeatable
from trl_apa.models.value_model import DESCRIPTION, HEAD_WEIGHTS
from trl_apa.rollout.batch import send


KIND = "own"
INTERFACE = (
    "it should be an nn.Module whose forward(input_ids, attention_mask), int64 (B, T) both, with pads on the right, "
    "gives values (B, T): at each token that of the state after it, from the tokens up to it alone"
)
# Values of the same tokens may differ by this share of the largest, which rounding makes.
ROUNDING = 1e-3


class OwnValueModel(nn.Module):
    """V(s) of a module that is no transformer of ours: see `INTERFACE`.

    Args:
        module: `forward(input_ids, attention_mask)` gives values `(B, T)`, reward units.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.eval()

    def train(self, mode: bool = True) -> "OwnValueModel":
        """Say that training begins, or ends: the module computes the same in both, see `make_repeatable`."""
        self.training = mode
        make_repeatable(self.module, checkpointing=mode)
        return self

    def forward(self, tokens: Mapping[str, Any], response_width: int) -> Tensor:
        """V of the state before each of the last `response_width` tokens, reward units, `(B, R)`.

        `tokens` are those of `batch.lay_out`.
        """
        input_ids_BT, attention_mask_BT, places_N = right_padded(tokens)
        values_BT: Tensor = self.module(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
        index_M = places_N[tokens["predicting_index"]]
        return response_rows(at_least_float32(values_BT).flatten()[index_M], tokens, response_width)

    def everywhere(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Values at every position of a padded batch, `(B, T)`, as classic's wrappers give them; 0 at pads."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids_BT, right_mask_BT, places_N = right_padded({"input_ids": input_ids, "attention_mask": mask_BT})
        values_BT = at_least_float32(self.module(input_ids=ids_BT, attention_mask=right_mask_BT))
        found = values_BT.flatten()[places_N.clamp(min=0)].view_as(input_ids)
        return torch.where(mask_BT.bool(), found, torch.zeros_like(found))

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the module's weights as safetensors, and a description.

        Args:
            path: a folder, made if it is not there.
            state_dict: weights to write instead of the module's own, as gathered from a sharded one.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        # Copies, because safetensors takes no two weights that are one, tied embeddings say.
        save_file(
            {n.removeprefix("module."): t.cpu().contiguous().clone() for n, t in state.items()}, path / HEAD_WEIGHTS
        )
        description = {"kind": KIND, "class": f"{type(self.module).__module__}.{type(self.module).__qualname__}"}
        (path / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    def load_weights(self, path: str | Path) -> None:
        """Put what `save_pretrained` wrote into the module."""
        self.module.load_state_dict(load_file(Path(path) / HEAD_WEIGHTS))


def is_own(path: str | Path) -> bool:
    """Whether a folder holds what `OwnValueModel.save_pretrained` wrote."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((Path(path) / DESCRIPTION).read_text()).get("kind") == KIND)
    return False


def own_value_model(module: nn.Module, num_token_ids: int | None, device: torch.device) -> OwnValueModel:
    """`module` as a value model, on `device`, after a trial of what it should give.

    Args:
        module: of the user's.
        num_token_ids: ids that the policy knows are below it; None if it does not say.
        device: of the policy.

    Raises:
        ValueError: naming `value_model`, if it gives something else, or its values depend on later tokens or on pads.
    """
    problem = f"value_model is a {type(module).__name__}: {{}}; {INTERFACE}"
    names = inspect.signature(module.forward).parameters
    if not {"input_ids", "attention_mask"} <= names.keys():
        raise ValueError(problem.format(f"its forward takes {', '.join(names) or 'nothing'}"))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(problem.format("it has no trainable parameter"))
    made = OwnValueModel(module).to(device)
    try:
        wrong = _try(made.module, num_token_ids or 2, device)
    except Exception as error:
        raise ValueError(problem.format(f"it failed with {type(error).__name__}: {error}")) from error
    if wrong is not None:
        raise ValueError(problem.format(wrong))
    return made


@torch.no_grad()
def _try(module: nn.Module, num_token_ids: int, device: torch.device) -> str | None:
    """What is wrong with the values of a row, of one with other tokens at its end, and of one with pads there."""
    ids_T = torch.arange(6, device=device) * 7 % num_token_ids
    ids_T[2] = num_token_ids - 1
    other_T = torch.cat([ids_T[:3], (ids_T[3:] + 1) % num_token_ids])
    ones_2T = torch.ones(2, 6, dtype=torch.long, device=device)
    values_2T = module(input_ids=torch.stack([ids_T, other_T]), attention_mask=ones_2T)
    if not isinstance(values_2T, Tensor) or values_2T.shape != (2, 6) or not values_2T.is_floating_point():
        shape = tuple(values_2T.shape) if isinstance(values_2T, Tensor) else type(values_2T).__name__
        return f"it gives {shape} for input_ids of shape (2, 6)"
    allowed = ROUNDING * max(1.0, float(values_2T.abs().max()))
    if float((values_2T[0, :3] - values_2T[1, :3]).abs().max()) > allowed:
        return "its values depend on later tokens"
    padded_2T = torch.stack([torch.cat([ids_T[:3], ids_T.new_zeros(3)]), ids_T])
    mask_2T = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6], device=device)
    beside_2T = module(input_ids=padded_2T, attention_mask=mask_2T)
    if float((beside_2T[0, :3] - values_2T[0, :3]).abs().max()) > allowed:
        return "its values depend on the pads behind a row"
    return None


def right_padded(tokens: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of any layout, each with its own tokens first and pads of id 0 behind them.

    Args:
        tokens: those of `batch.lay_out`, of a decoder alone.

    Returns:
        `input_ids` and `attention_mask`, int64 `(B, T)`, and for each of the `N` places in the flattened layout its
        place in flattened `(B, T)`, int64 `(N,)`; -1 for a pad.
    """
    ids = tokens["input_ids"]
    if "row_groups" in tokens:
        lengths = [length for count, length, _ in tokens["row_groups"] for _ in range(count)]
        prefixes = [0] * len(lengths)
    elif "sequence_lengths" in tokens:
        lengths = list(tokens["sequence_lengths"])
        prefixes = list(tokens.get("prompt_lengths", [0] * len(lengths)))
    else:
        return _left_aligned(ids, tokens["attention_mask"])
    parts, rows, places, lead = ids[0].split(lengths), [], [], ids[0, :0]
    for part, prefix in zip(parts, prefixes, strict=True):
        lead = part if prefix == 0 else lead
        rows.append(torch.cat([lead[:prefix], part]))
    width = max(len(row) for row in rows)
    for number, (part, prefix) in enumerate(zip(parts, prefixes, strict=True)):
        start = number * width + prefix
        places.append(torch.arange(start, start + len(part)))
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask_BT, send(torch.cat(places), ids.device)


def _left_aligned(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a batch with pads on any side, moved to the left."""
    place_BT = mask_BT.long().cumsum(dim=1) - 1
    rows_BT = torch.arange(len(ids_BT), device=ids_BT.device)[:, None] * ids_BT.shape[1]
    places_N = torch.where(mask_BT.bool(), rows_BT + place_BT, -1).flatten()
    kept_N = mask_BT.flatten().bool()
    flat_N = torch.zeros_like(ids_BT.flatten())
    moved_BT = flat_N.index_copy(0, places_N[kept_N], ids_BT.flatten()[kept_N]).view_as(ids_BT)
    counts_B = mask_BT.long().sum(dim=1, keepdim=True)
    moved_mask_BT = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < counts_B).long()
    return moved_BT, moved_mask_BT, places_N
