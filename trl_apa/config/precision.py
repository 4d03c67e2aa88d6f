"""In which precision a run computes that does not say."""

from transformers.utils import is_torch_bf16_gpu_available


def default_bf16(fp16: bool, use_cpu: bool) -> bool:
    """Whether `bf16` is on where it is not set: on a GPU that has it, unless `fp16` is.

    Args:
        fp16, use_cpu: of the config.
    """
    return not (fp16 or use_cpu) and bool(is_torch_bf16_gpu_available())


class Bf16WherePossible:
    """Goes before a config of TRL's, whose own default, bf16 everywhere, stops runs on machines without it."""

    bf16: bool | None
    fp16: bool
    use_cpu: bool

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = default_bf16(self.fp16, self.use_cpu)
        super().__post_init__()  # type: ignore[misc]  # of the config behind it
