"""What a check found: a line for each property, with the measured figure and what to do where it does not hold."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_apa.models.trials import Difference


VERDICTS = {True: "ok", False: "WRONG", None: "-"}
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"
WIDTH = 118


@dataclass(frozen=True)
class Finding:
    """One property of the networks.

    Args:
        name: what was looked at.
        ok: whether it holds; None where it was not tried, or says nothing of right and wrong.
        measured: what was seen, in words and figures.
        figures: the same for programs, by name with its unit.
        advice: what to do if it does not hold, or what the trainer does about it.
    """

    name: str
    ok: bool | None
    measured: str
    figures: dict[str, Any] = field(default_factory=dict)
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings about one model.

    Args:
        model: its name or class.
        machine: device and precision.
        findings: in the order in which they were made.
    """

    model: str
    machine: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.ok is not False for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name.

        Raises:
            KeyError: if there is none.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, colour: bool = False) -> list[str]:
        """The table: verdict, name, figure; what to do below."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.model} on {self.machine}", ""]
        for finding in self.findings:
            verdict = f"{VERDICTS[finding.ok]:<6}"
            if colour and finding.ok is not None:
                verdict = (GREEN if finding.ok else RED) + verdict + PLAIN
            lines += _hanging(f"{verdict}{finding.name:<{width}}  ", width + 8, finding.measured)
            if finding.advice:
                lines += _hanging(" " * (width + 8), width + 8, finding.advice)
        wrong = [finding.name for finding in self.findings if finding.ok is False]
        return [*lines, "", f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [asdict(finding) for finding in self.findings]
        for finding in findings:  # JSON has no NaN
            finding["figures"] = {name: _finite(value) for name, value in finding["figures"].items()}
        return {"model": self.model, "machine": self.machine, "ok": self.ok, "findings": findings}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compared(name: str, difference: Difference, allowed: float, advice: str = "", ok: bool | None = None) -> Finding:
    """A finding about two computations that should agree.

    Args:
        name: see `Finding`.
        difference: between the two.
        allowed: the largest relative difference that counts as rounding.
        advice: what to do if it is larger.
        ok: the verdict where it does not depend on `allowed`.
    """
    close = difference.relative <= allowed
    figures: dict[str, float | None] = {"relative": difference.relative, "allowed_relative": allowed}
    measured = f"max {difference.relative:.1e} of the largest output"
    if difference.max_nats is not None:
        measured = f"max {difference.max_nats:.1e}, mean {difference.mean_nats:.1e} nats a token"
        figures |= {"max_nats": difference.max_nats, "mean_nats": difference.mean_nats}
    return Finding(name, close if ok is None else ok, measured, figures, "" if close else advice)


def skipped(name: str, why: str) -> Finding:
    """A finding about something that was not tried."""
    return Finding(name, None, why)


def _hanging(first: str, indent: int, text: str) -> Sequence[str]:
    # The first line may have colours, which take no room.
    wrapped = textwrap.wrap(text, WIDTH - indent, break_long_words=False) or [""]
    return [first + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
