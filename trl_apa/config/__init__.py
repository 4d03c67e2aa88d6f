"""The options: `APAConfig` in `apa.py`, and how options are declared, checked and translated."""

from trl_apa.module_paths import lazy_names


__getattr__ = lazy_names(
    __name__,
    {
        "APAConfig": ".apa",
    },
)
