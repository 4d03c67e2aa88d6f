"""The one optimizer that trains policy and value model: its parameter groups, and whether its numbers are finite."""

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers.optimization
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from trl_apa.config.rates import PRETRAINED_RATE, default_rate, rate_is_default, set_default_rate
from trl_apa.models.adapters import trains_added_weights_alone
from trl_apa.models.critic import Critic
from trl_apa.models.policy_and_value import PolicyAndValue
from trl_apa.models.value_model import ValueModel
from trl_apa.trainer.run_identity import comparable


logger = logging.getLogger(__name__)

# A group's option to the name that users set.
OPTION_OF = {"lr": "learning_rate", "eps": "adam_epsilon"}
# Options of a group that are multiplied into the weights. Others may be infinite (the growth rate of Prodigy's steps).
FACTORS = ("lr", "initial_lr", "weight_decay", "momentum", "dampening", "betas", "eps")
# Schedulers that the Trainer knows by their class, and tells a metric.
LED_BY_METRICS = (ReduceLROnPlateau, getattr(transformers.optimization, "GreedyLR", ReduceLROnPlateau))


class GivenScheduler(AcceleratedScheduler):
    """A scheduler of the caller's own: `.scheduler`, as classic's trainer had it, and all its attributes.

    It moves once a call of `step`, whatever the number of processes.
    """

    def __init__(self, scheduler: Any):
        super().__init__(scheduler, [], step_with_optimizer=False)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)  # while it is copied or unpickled
        return getattr(self.scheduler, name)


def wrapped_optimizer(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Any:
    """The optimizer as accelerate wraps it, `.optimizer` being itself; hooks that are registered on either are called.

    Args:
        optimizer: of weights that are not sharded.
        accelerator: knows the wrapper again when it prepares the networks.
    """
    wrapper = accelerator.prepare(optimizer)
    # accelerate's wrapper has no hooks of its own: `register_step_post_hook` would fail on it.
    hooks = {name: value for name, value in vars(optimizer).items() if name.startswith("_optimizer_")}
    vars(wrapper).update(hooks)
    return wrapper


def given_scheduler(scheduler: Any) -> Any:
    """A caller's scheduler as `GivenScheduler`; None, and those that metrics lead, as they are."""
    return scheduler if scheduler is None or isinstance(scheduler, LED_BY_METRICS) else GivenScheduler(scheduler)


def forget_gradients_of(model: nn.Module, optimizer: Any) -> None:
    """After an update: gradients are given up, or what the script has put in place of `optimizer.zero_grad` is done.

    Args:
        model: as the engine has prepared it.
        optimizer: as accelerate has prepared it.
    """
    if "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
    else:
        model.zero_grad()


def choose_learning_rate(args: Any, module: PolicyAndValue) -> None:
    """Where no rate was given, set the one for what is trained of the policy."""
    if not rate_is_default(args):
        return
    set_default_rate(args, default_rate(trains_added_weights_alone(module.policy)))
    if args.learning_rate != PRETRAINED_RATE and args.should_log:
        logger.warning(
            "learning_rate is %g, as adapters alone are trained; for all weights it would be %g",
            args.learning_rate,
            PRETRAINED_RATE,
        )


def value_learning_rate(args: Any, value_model: Critic | None) -> float | None:
    """The value model's own rate; None if it is the policy's, or if there is no value model.

    Where neither rate was given, a value model that is a network of its own has the default for what it trains.
    """
    if value_model is None:
        return None
    given: float | None = args.value_learning_rate
    if given is not None or not rate_is_default(args) or not isinstance(value_model, ValueModel):
        return given
    rate = default_rate(trains_added_weights_alone(value_model.network))
    return None if rate == args.learning_rate else rate


def freeze_what_is_left_out(module: PolicyAndValue, optimizer: torch.optim.Optimizer | None) -> None:
    """Freeze the policy's parameters that a caller's optimizer does not hold, with a warning that counts them.

    They would cost memory and the backward pass, and their gradients would count in the norm that is clipped. The
    value model's are not looked at: `add_value_parameters` adds those.

    Raises:
        ValueError: if the optimizer holds none of them.
    """
    trained = module.trainable_parameters()["policy"]
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [p for p in trained if id(p) not in held]
    if not left_out:
        return
    if len(left_out) == len(trained):
        raise ValueError(
            f"optimizer lacks {len(left_out)} of the {len(trained)} trainable tensors of model; make it after "
            "adapters were added, over parameters that require a gradient"
        )
    names = [name for name, p in module.policy.named_parameters() if any(p is other for other in left_out)]
    warnings.warn(
        f"optimizer leaves out {len(left_out)} of the {len(trained)} trainable tensors of model "
        f"({sum(p.numel() for p in left_out):,} of {sum(p.numel() for p in trained):,} parameters; {names[0]}, say): "
        "they are frozen",
        UserWarning,
        stacklevel=4,
    )
    for parameter in left_out:
        parameter.requires_grad_(False)


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
            "set their rate in its parameter group"
        )
    missing = [p for p in parameters if p.requires_grad and id(p) not in known]
    if value_learning_rate is not None:
        optimizer.add_param_group({"params": missing, "lr": value_learning_rate})
    else:
        optimizer.param_groups[0]["params"].extend(missing)


def split_off_value_groups(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], value_learning_rate: float
) -> None:
    """Move the value model's parameters to groups that differ only in the learning rate."""
    of_value = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in of_value]
        group["params"] = [p for p in group["params"] if id(p) not in of_value]
        options = {name: option for name, option in group.items() if name not in ("params", "lr")}
        optimizer.add_param_group({**options, "params": moved, "lr": value_learning_rate})


def optimizer_name(optimizer: Any) -> str:
    """The class of an optimizer, inside accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def group_options(optimizer: Any) -> list[dict[str, Any]]:
    """The options of each parameter group as they were before a scheduler moved its rate."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        options["lr"] = options.pop("initial_lr", options["lr"])
        groups.append(options)
    return groups


def use_new_group_options(
    optimizer: Any, scheduler: Any, then: Sequence[dict[str, Any]] | None, now: Sequence[dict[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """After a checkpoint was loaded into an optimizer: give its groups the options that were changed since.

    A new rate takes the place of the old one in the schedule: the schedule's factor is kept.

    Args:
        optimizer: with the checkpoint's state.
        scheduler: its schedule with the checkpoint's state.
        then: `group_options` of the run that wrote the checkpoint; None if the checkpoint does not say.
        now: `group_options` of this optimizer before the checkpoint was loaded.

    Returns:
        What was changed: option to (then, now).

    Raises:
        ValueError: if the checkpoint is of another kind of optimizer.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    scheduler = getattr(scheduler, "scheduler", scheduler)
    for number, (group, options) in enumerate(zip(optimizer.param_groups, now, strict=True)):
        if lacking := options.keys() - group.keys():
            raise ValueError(
                f"the checkpoint has another optimizer than {optimizer_name(optimizer)}: its groups have no "
                f"{', '.join(sorted(lacking))}; set optim to its old value"
            )
        was = {name: group[name] for name in options} | {"lr": group.get("initial_lr", group["lr"])}
        was = comparable(was if then is None else then[number])
        for name, value in comparable(options).items():
            if name not in was or was[name] == value:
                continue
            changed[OPTION_OF.get(name, name)] = (was[name], value)
            if name == "lr":
                _set_base_rate(group, scheduler, number, options["lr"])
            else:
                group[name] = options[name]
    if isinstance(scheduler, LambdaLR):
        _follow_schedule(optimizer, scheduler)
    return changed


def _set_base_rate(group: dict[str, Any], scheduler: Any, number: int, rate: float) -> None:
    before = group.get("initial_lr", group["lr"])
    factor = float(group["lr"]) / float(before) if float(before) else 1.0
    group["lr"] = rate * factor
    if "initial_lr" in group:
        group["initial_lr"] = rate
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs[number] = rate


def _follow_schedule(optimizer: Any, scheduler: LambdaLR) -> None:
    """The learning rates of the schedule at its step, under its present options (such as a larger `max_steps`)."""
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def check_optimizer_is_finite(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose next step would spoil the weights, by one look at the device.

    Args:
        name: its name in the message.
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
        f"{name} is not finite: {part} of a parameter of shape {tuple(tensor.shape)} holds NaN or inf, and the next "
        "step would spread it to the weights. Create a new optimizer, or use an earlier one"
    )


def _own_part(value: Any) -> Tensor | None:
    """What this process has of a state, if it is a plain tensor of floats that holds something."""
    if isinstance(value, DTensor):
        value = value.to_local()
    return value if type(value) is Tensor and value.is_floating_point() and value.numel() else None
