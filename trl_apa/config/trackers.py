"""Trackers as options name them: texts, members of accelerate's enum, and tracker objects of a script's own."""

from collections.abc import Mapping
from typing import Any

from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration


def tracker_objects(trackers: Any) -> list[GeneralTracker]:
    """The objects of accelerate's among trackers, each once.

    Args:
        trackers: `log_with` or `report_to`: one, or a list of them.
    """
    objects = [tracker for tracker in _listed(trackers) if isinstance(tracker, GeneralTracker)]
    return list({id(tracker): tracker for tracker in objects}.values())


def tracker_names(trackers: Any) -> str | list[str] | None:
    """The names among trackers as `report_to` takes them: a list only where a list was given; None if there is none.

    Raises:
        ValueError: for a tracker's class in place of a tracker.
    """
    for tracker in _listed(trackers):
        if isinstance(tracker, type) and issubclass(tracker, GeneralTracker):
            raise ValueError(f"log_with has the class {tracker.__name__}; it should be an object of it")
    # An enum's member is a text too, which would not be written as one.
    names = [
        getattr(tracker, "value", tracker) for tracker in _listed(trackers) if not isinstance(tracker, GeneralTracker)
    ]
    if not isinstance(trackers, list | tuple):
        return names[0] if names else None
    return names or None


def check_project_kwargs(project_kwargs: Any) -> None:
    """
    Raises:
        ValueError: unless it is a dict of what accelerate's `ProjectConfiguration` takes.
    """
    if project_kwargs is None:
        return
    known = ProjectConfiguration.__dataclass_fields__
    if not isinstance(project_kwargs, Mapping) or not set(project_kwargs) <= set(known):
        raise ValueError(f"project_kwargs={project_kwargs!r}: it should be a dict of {', '.join(known)}")


def _listed(trackers: Any) -> list[Any]:
    if trackers is None:
        return []
    return list(trackers) if isinstance(trackers, list | tuple) else [trackers]
