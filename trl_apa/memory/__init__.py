"""Peak memory of a training run, predicted from the config of its model."""

from trl_apa.memory.prediction import Prediction, predict
from trl_apa.memory.setup import Setup


__all__ = ["Prediction", "Setup", "predict"]
