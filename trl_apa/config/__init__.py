"""The options: `APAConfig` in `apa.py`, and how options are declared, checked and translated."""

from typing import TYPE_CHECKING

from trl_apa.module_paths import lazy_names


if TYPE_CHECKING:
    from .apa import APAConfig as APAConfig


__getattr__ = lazy_names(
    __name__,
    {
        "APAConfig": ".apa",
    },
)
