"""Learning from fixed prompts, responses and rewards (figure 9 of the paper): APA, AWR, ILQL, QRPO and DRO."""

from trl_apa.offline.config import OfflineConfig
from trl_apa.offline.data import label_pairs, label_rows
from trl_apa.offline.decoding import advantage_shifted
from trl_apa.offline.networks import QValueModel
from trl_apa.offline.trainer import OfflineAPATrainer


__all__ = [
    "OfflineAPATrainer",
    "OfflineConfig",
    "QValueModel",
    "advantage_shifted",
    "label_pairs",
    "label_rows",
]
