"""Deep copies of models that compute with their own weights."""

import copy

from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from trl_apa.models.network_parts import M, text_trunk
from trl_apa.models.partitioned import gathered, is_partitioned, partition


def independent_copy(model: M, shared: list[nn.Parameter] | None = None) -> M:
    """A deep copy of `model` that does not run on the original's weights.

    A model that another trainer has patched may have a `forward` that is a function bound to the
    original (TRL's fused LM head, accelerate's autocast): `deepcopy` keeps such a function as it is, and the copy
    would silently follow the original's training. It gets its class's forward back, and accelerate's device hook, if
    it had one, around that. The copy of a model that ZeRO-3 has sharded is sharded, too; for a moment every process
    holds all of it.

    Args:
        model: any module.
        shared: parameters that the copy shares with the original instead of copying them.
    """
    # deepcopy leaves alone what its memo already holds.
    memo: dict[int, Tensor] = {id(parameter): parameter for parameter in shared or []}
    with gathered(model.parameters()):
        duplicate = copy.deepcopy(model, memo)
    for module in duplicate.modules():
        if "forward" in vars(module):
            del module.forward
            vars(module).pop("_old_forward", None)
            if hasattr(module, "_hf_hook"):
                add_hook_to_module(module, module._hf_hook)
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        partition(duplicate)
    return duplicate


def copy_of_trunk(language_model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy of what turns tokens into hidden states, without vocabulary head and towers for images and sound.

    T5's language model has its two stacks as attributes, without a trunk to copy.
    """
    part = text_trunk(language_model)
    if part is not language_model:
        return independent_copy(part)
    trunk = AutoModel.from_config(language_model.config, dtype=language_model.dtype)
    with gathered([*trunk.parameters(), *language_model.parameters()], modify=True):
        missing = trunk.load_state_dict(language_model.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"{type(language_model).__name__} has no {', '.join(missing)} to copy its trunk from")
    return trunk.to(language_model.device)
