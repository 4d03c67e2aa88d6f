"""Whether a model's numbers can be trusted on this machine: what `trl-apa check` and `trainer.check()` measure."""

from trl_apa.checking.report import Finding, Report
from trl_apa.checking.run import check_trainer


__all__ = ["Finding", "Report", "check_trainer"]
