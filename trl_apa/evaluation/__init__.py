"""How good a policy is on held-out prompts."""

from typing import TYPE_CHECKING

from trl_apa.module_paths import lazy_names


if TYPE_CHECKING:
    from .held_out import held_out_metrics as held_out_metrics


__getattr__ = lazy_names(
    __name__,
    {
        "held_out_metrics": ".held_out",
    },
)
