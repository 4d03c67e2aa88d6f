"""Batch sizes: what follows from those that were given, and whether they divide each other."""

from typing import TYPE_CHECKING

from trl_apa.config import trl_0_12


if TYPE_CHECKING:
    from trl_apa.config.apa import APAConfig

# Options that decide how many rollouts an iteration, an optimizer step and a forward pass have.
SIZES = ("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def fill_batch_sizes(config: "APAConfig") -> None:
    """Fill in `batch_size` and `per_device_train_batch_size` where they are not set.

    Raises:
        ValueError: as `check_batch_sizes`.
    """
    if config.batch_size is None:
        mini_batch = (config.per_device_train_batch_size or 1) * config.gradient_accumulation_steps
        config.batch_size = trl_0_12.rollouts_by_mini_batches(config) or max(config._default_batch_size, mini_batch)
    per_micro_step, remainder = divmod(
        config.batch_size, config.gradient_accumulation_steps * (config.num_mini_batches or 1)
    )
    if config.per_device_train_batch_size is None and remainder == 0:
        divisors = [size for size in range(1, config._largest_mini_batch + 1) if per_micro_step % size == 0]
        config.per_device_train_batch_size = divisors[-1] if config.num_mini_batches is None else per_micro_step
    check_batch_sizes(config)


def check_batch_sizes(config: "APAConfig") -> None:
    """
    Raises:
        ValueError: naming the options, if `batch_size` does not divide into mini-batches, not into
            `num_mini_batches`, or not into `num_generations` of each prompt.
    """
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if size is None or config.batch_size % config.backward_batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} should be a multiple of mini_batch_size * gradient_accumulation_steps "
            f"= {size} * {accumulation}"
        )
    if config.num_mini_batches not in (None, config.batch_size // config.backward_batch_size):
        raise ValueError(
            f"num_mini_batches={config.num_mini_batches}, but batch_size={config.batch_size} is "
            f"{config.batch_size // config.backward_batch_size} times mini_batch_size * gradient_accumulation_steps "
            f"= {size} * {accumulation}: remove one of them"
        )
    if config.batch_size % config.num_generations:
        raise ValueError(
            f"num_generations={config.num_generations}: batch_size={config.batch_size} should be a multiple of it"
        )


def check_horizon(config: "APAConfig") -> None:
    """The adaptive coefficient moves by at most 0.2 * responses / horizon a step, which must stay below 1.

    Raises:
        ValueError: naming `horizon`, if it does not.
    """
    responses = config.batch_size * config.world_size
    adapts = config.reads("horizon") and config.adap_kl_ctrl
    if adapts and config.horizon is not None and responses >= 5 * config.horizon:
        raise ValueError(
            f"horizon={config.horizon}: it should be more than a fifth of the {responses} responses of one step"
        )
