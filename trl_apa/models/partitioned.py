"""Weights that DeepSpeed's ZeRO-3 has cut up among the processes: outside of its forward passes they look empty."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Size, nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds the parameter, whose own data may then be empty."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> Size:
    """The shape of a parameter, also of one that is cut up."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Inside, every process has these parameters whole; nothing happens to those that are not cut up.

    Args:
        parameters: the same on all processes, which enter together.
        modify: keep what the first process does to them.
    """
    cut_up = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not cut_up:
        yield
        return
    import deepspeed  # slow to import, and there only if somebody uses it

    with deepspeed.zero.GatheredParameters(cut_up, modifier_rank=0 if modify else None):
        yield


def partition(module: nn.Module) -> None:
    """Cut up a module's parameters as the run's DeepSpeed configuration says."""
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
