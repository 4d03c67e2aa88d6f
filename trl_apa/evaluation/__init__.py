"""How good a policy is on held-out prompts."""

from trl_apa.module_paths import lazy_names


__getattr__ = lazy_names(
    __name__,
    {
        "held_out_metrics": ".held_out",
    },
)
