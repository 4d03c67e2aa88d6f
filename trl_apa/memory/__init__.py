"""Peak memory of a training run, predicted from the config of its model."""

from trl_apa.memory.prediction import Planner, Prediction, predict
from trl_apa.memory.setup import Setup


__all__ = ["Planner", "Prediction", "Setup", "predict"]
