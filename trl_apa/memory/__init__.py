"""Peak memory of a training run, predicted from the config of its model."""

from typing import TYPE_CHECKING

from trl_apa.module_paths import lazy_names


if TYPE_CHECKING:
    from trl_apa.memory.prediction import Planner, Prediction, predict
    from trl_apa.memory.setup import Setup


__all__ = ["Planner", "Prediction", "Setup", "predict"]

__getattr__ = lazy_names(
    __name__, {"Planner": ".prediction", "Prediction": ".prediction", "Setup": ".setup", "predict": ".prediction"}
)
