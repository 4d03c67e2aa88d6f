"""Training continues if a report or a tracker fails; one warning says which and why."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from trl_apa.redaction import without_secrets_in_error


logger = logging.getLogger(__name__)
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# Also called for a tracker that failed before: these close its run.
LAST_EVENT = "on_train_end"
# What reports on the terminal.
DISPLAYS = (PrinterCallback, ProgressCallback)


class Report(TrainerCallback):
    """A report to a tracker that transformers has no reporter for.

    Args:
        name: the tracker's.
    """

    name: str


def tracker_of(callback: TrainerCallback) -> str | None:
    """The name in `report_to` of the tracker that a callback reports to; None if it is no reporter."""
    return next((name for name, reporter in INTEGRATION_TO_CALLBACK.items() if isinstance(callback, reporter)), None)


def is_disabled(callback: TrainerCallback) -> bool:
    """Whether its tracker has failed before."""
    return getattr(callback, "_has_failed", False)


@contextmanager
def may_fail(callback: TrainerCallback, doing: str) -> Iterator[None]:
    """An error inside is a warning, the first time, and the tracker is lost from then on.

    Nothing that is reported is in the tracker alone: statistics are in `trainer_state.json` too, tables in
    `completions/`.
    """
    try:
        yield
    except Exception as error:
        if not is_disabled(callback):
            name = callback.name if isinstance(callback, Report) else tracker_of(callback)
            _tell(callback, f"{name or type(callback).__name__} failed in {doing}", error)
        callback._has_failed = True


@contextmanager
def warn_if_report_fails(owner: Any, what: str, kind: str | None = None) -> Iterator[None]:
    """An error inside is a warning that says what failed and why, the first time.

    Args:
        owner: whose report it is: a trainer, or a tracker's callback. It keeps which kinds of its reports have failed.
            The first that does is a warning, the others are a line in the log each. None: a report that is made once.
        what: is reported, as the warning calls it.
        kind: of report; each `what` is one by default.
    """
    try:
        yield
    except Exception as error:
        if (kind or what) not in _failed_reports(owner):
            _tell(owner, f"{what} failed", error)
            _failed_reports(owner).add(kind or what)


def isolate_failures(callbacks: Iterable[TrainerCallback]) -> None:
    """Let those of `callbacks` that report to a tracker or on the terminal fail without ending the run."""
    for callback in callbacks:
        reports = tracker_of(callback) is not None or isinstance(callback, (*DISPLAYS, Report))
        if reports and not hasattr(callback, "_has_failed"):
            callback._has_failed = False
            for event in EVENTS:
                setattr(callback, event, _isolated(callback, getattr(callback, event)))


def _isolated(callback: TrainerCallback, handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        if is_disabled(callback) and handler.__name__ != LAST_EVENT:
            return None
        with may_fail(callback, handler.__name__):
            return handler(*args, **kwargs)
        return None

    return handle


def _failed_reports(owner: Any) -> set[str]:
    return set() if owner is None else vars(owner).setdefault("_failed_reports", set())


def _tell(owner: Any, what: str, error: Exception) -> None:
    text = f"{what}, and the run continues without it: {type(error).__name__}: "
    text += without_secrets_in_error(str(error))
    if _failed_reports(owner):
        logger.warning(text)
    else:
        warnings.warn(text, stacklevel=4)  # above this function, the context manager and `contextlib`: who reports
