"""Trackers get a run's options without keys and tokens, and are opened with the keys that they need."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from transformers import TrainerCallback

from trl_apa.redaction import RedactedOptions, errors_without_secrets, without_secrets
from trl_apa.redaction.patterns import is_secret_name
from trl_apa.trainer.tracker_failures import EVENTS, LAST_EVENT, tracker_of


# What opens a run with these logs in, or finds its server; the rest is what people read there.
USED_TO_CONNECT = ("settings", "server_url", "dir", "log_dir")


def hide_secrets_from(callbacks: Iterable[TrainerCallback]) -> None:
    """Give those of `callbacks` that are reporters options and a command line without secrets.

    W&B writes the command line of the process into its files. What a reporter's error quotes is hidden too.
    """
    for callback in callbacks:
        if tracker_of(callback) is not None and not hasattr(callback, "_is_told_no_secret"):
            callback._is_told_no_secret = True
            for event in EVENTS:
                handler = getattr(callback, event)
                if getattr(handler, "__func__", handler) is not getattr(TrainerCallback, event):
                    setattr(callback, event, _told_no_secret(handler))


def options_to_open(options: Mapping[str, Any], *holders: Any) -> dict[str, Any]:
    """The arguments that open a tracker's run: real keys to log in, and none in values that the tracker shows.

    Args:
        options: arguments of `wandb.init` and the like.
        holders: more options, whose secrets are hidden too.
    """
    return {
        name: value
        if name in USED_TO_CONNECT or is_secret_name(name)
        else without_secrets({name: value}, options, *holders)[name]
        for name, value in options.items()
    }


def _told_no_secret(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def handle(args: Any, *others: Any, **kwargs: Any) -> Any:
        # At the end W&B and DVCLive make a Trainer of the options, which may log in.
        is_shown = isinstance(args, RedactedOptions) and handler.__name__ != LAST_EVENT
        with errors_without_secrets(vars(args)), _command_line_without_secrets(vars(args)):
            return handler(args.shown() if is_shown else args, *others, **kwargs)

    return handle


@contextmanager
def _command_line_without_secrets(*holders: Any) -> Iterator[None]:
    given = sys.argv
    sys.argv = list(without_secrets(given, *holders))
    try:
        yield
    finally:
        sys.argv = given
