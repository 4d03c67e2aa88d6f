"""The one optimizer that trains policy and value model: its parameter groups, and whether its numbers are finite."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


# Options of a group that are multiplied into the weights. Others may be infinite (the growth rate of Prodigy's steps).
FACTORS = ("lr", "initial_lr", "weight_decay", "momentum", "dampening", "betas", "eps")


def add_value_parameters(
    optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter], value_learning_rate: float | None
) -> None:
    """A caller's optimizer was made before the value model existed: give it those parameters too.

    Raises:
        ValueError: if it holds value parameters already, whose rate `value_learning_rate` would not change.
    """
    if optimizer is None:
        return
    parameters = list(parameters)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if value_learning_rate is not None and any(id(p) in known for p in parameters):
        raise ValueError(
            f"value_learning_rate={value_learning_rate}, but optimizer holds the value model's parameters already; "
            "set their rate in a group of that optimizer"
        )
    missing = [p for p in parameters if p.requires_grad and id(p) not in known]
    if value_learning_rate is not None:
        optimizer.add_param_group({"params": missing, "lr": value_learning_rate})
    else:
        optimizer.param_groups[0]["params"].extend(missing)


def split_off_value_groups(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], value_learning_rate: float
) -> None:
    """Move the value model's parameters to groups that are like their own but for the learning rate."""
    of_value = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in of_value]
        group["params"] = [p for p in group["params"] if id(p) not in of_value]
        options = {name: option for name, option in group.items() if name not in ("params", "lr")}
        optimizer.add_param_group({**options, "params": moved, "lr": value_learning_rate})


def check_optimizer_is_finite(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose next step would spoil the weights, by one look at the device.

    Args:
        name: what it is called in the message.
        optimizer: fresh, or with the state of the steps before.

    Raises:
        ValueError: naming the option or the part of its state that is NaN or infinite.
    """
    for number, group in enumerate(optimizer.param_groups):
        for option in FACTORS:
            given = group.get(option)
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, int | float | Tensor) and not math.isfinite(value):
                    raise ValueError(f"{name} has {option}={given} in group {number}; it should be finite")
    held = [
        (part, tensor)
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for part, value in state.items()
        if (tensor := _own_part(value)) is not None
    ]
    if math.isfinite(nn.utils.get_total_norm([tensor for _, tensor in held], norm_type=math.inf)):
        return
    part, tensor = next((part, tensor) for part, tensor in held if not tensor.isfinite().all())
    raise ValueError(
        f"{name} is not finite: {part} of a parameter of shape {tuple(tensor.shape)} holds NaN or inf; its next step "
        "would make the weights so too. Make a new one, or take one from before"
    )


def _own_part(value: Any) -> Tensor | None:
    """What this process has of a state, if it is a plain tensor of floats that holds something."""
    if isinstance(value, DTensor):
        value = value.to_local()
    return value if type(value) is Tensor and value.is_floating_point() and value.numel() else None
