"""Weights that DeepSpeed's ZeRO-3 has sharded among the processes: outside of its forward passes they look empty."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Size, Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter, whose own data may then be empty."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> Size:
    """The shape of a parameter, also of one that is sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Inside, every process has these parameters complete; parameters that are not sharded are unchanged.

    Args:
        parameters: the same on all processes, which enter together.
        modify: keep what the first process does to them.
    """
    sharded = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not sharded:
        yield
        return
    import deepspeed  # slow to import, and there only if somebody uses it

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None):
        yield


def partition(module: nn.Module) -> None:
    """Cut up a module's parameters as the run's DeepSpeed configuration says."""
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())


def use_one_precision(module: nn.Module) -> None:
    """Give trained weights the precision of those that ZeRO-3 sharded while loading: it does not allow a mixture."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for dtype in {parameter.dtype for parameter in trained if is_partitioned(parameter)}:
        for parameter in trained:
            if not is_partitioned(parameter):
                parameter.data = parameter.data.to(dtype)
