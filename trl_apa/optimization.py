"""The parameter groups of the one optimizer that trains policy and value model."""

from collections.abc import Iterable

import torch
from torch import nn


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
