"""Training goes on without a tracker that fails: one warning says which and why."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from trl_apa.redaction import without_secrets_in_error


EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# Also asked of a tracker that failed before: what closes its run.
LAST_EVENT = "on_train_end"


def tracker_of(callback: TrainerCallback) -> str | None:
    """The name in `report_to` of the tracker that a callback reports to; None if it is no reporter."""
    return next((name for name, reporter in INTEGRATION_TO_CALLBACK.items() if isinstance(callback, reporter)), None)


def is_lost(callback: TrainerCallback) -> bool:
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
        if not is_lost(callback):
            warnings.warn(
                f"{tracker_of(callback)} failed in {doing}, and the run goes on without it: "
                f"{type(error).__name__}: {without_secrets_in_error(str(error))}",
                stacklevel=3,
            )
        callback._has_failed = True


def go_on_without(callbacks: Iterable[TrainerCallback]) -> None:
    """Let those of `callbacks` that are reporters fail without ending the run."""
    for callback in callbacks:
        if tracker_of(callback) is not None and not hasattr(callback, "_has_failed"):
            callback._has_failed = False
            for event in EVENTS:
                setattr(callback, event, _forgiven(callback, getattr(callback, event)))


def _forgiven(callback: TrainerCallback, handler: Callable) -> Callable:
    @wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        if is_lost(callback) and handler.__name__ != LAST_EVENT:
            return None
        with may_fail(callback, handler.__name__):
            return handler(*args, **kwargs)
        return None

    return handle
