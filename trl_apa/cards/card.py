"""A model card as data, and how it is written."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and not in its __all__

from trl_apa.cards.papers import Paper
from trl_apa.redaction import without_secrets


FILE = "README.md"
TEMPLATE = Path(__file__).with_name("template.md")
LIBRARIES = ("trl-apa", "trl", "transformers", "torch", "peft", "datasets", "tokenizers")
DATA_FILES = {".json", ".jsonl", ".csv", ".parquet"}
# Both together tell a generated card from a README of the user's own.
TAGS = ("generated_from_trainer", "trl-apa")


class Figure(NamedTuple):
    """A row of the table of figures, as text.

    Args:
        meaning: what is measured, and its unit.
        first, last, best: of the run; empty where there is none.
    """

    meaning: str
    first: str
    last: str
    best: str = ""


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Args:
        name: of the model.
        what: the sentence about what it is and what made it.
        imports, loading: Python that loads it from where `folder` says that it lies.
        hub_id: where it was uploaded to.
        base_model: what training started from: a hub name, or a path, of which only the last part is shown.
        datasets: hub names, or paths.
        rewards: names of what scored responses.
        library: `library_name` of the hub.
        task: `pipeline_tag` of the hub.
        tags: more tags.
        options: that define the run.
        steps: optimizer steps made.
        figures: of the run.
        interval: what stands behind ±.
        links: name to address, of trackers.
        papers: to cite.
    """

    name: str
    what: str
    imports: Sequence[str]
    loading: str
    hub_id: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    rewards: Sequence[str] = ()
    library: str = "transformers"
    task: str | None = None
    tags: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    figures: Sequence[Figure] = ()
    interval: str = "half a 95% interval over the prompts"
    links: Mapping[str, str] = field(default_factory=dict)
    papers: Sequence[Paper] = ()


def write_card(card: Card, folder: str | os.PathLike[str], *holders: Any) -> bool:
    """Write `README.md`, without secrets and without paths of this machine.

    A `README.md` that is no generated model card of this package stays, with a warning.

    Args:
        card: what it says.
        folder: where the model lies; made if it is not there.
        holders: options whose secrets are hidden.

    Returns:
        Whether it was written.
    """
    file = Path(folder) / FILE
    if file.is_file() and not is_generated(file):
        warnings.warn(
            f"{file} is no generated model card and stays as it is: no card is written; move it to get one",
            stacklevel=2,
        )
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    card = without_secrets(card, *holders)
    hub_base = hub_name(card.base_model)
    data = ModelCardData(
        base_model=hub_base,
        datasets=[name for name in card.datasets if hub_name(name)] or None,
        library_name=card.library,
        pipeline_tag=card.task,
        model_name=card.name,
        tags=list(dict.fromkeys([*TAGS, *card.tags])),
    )
    text = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        card=card,
        base=_link(card.base_model, "https://huggingface.co/"),
        datasets=[_link(name, "https://huggingface.co/datasets/") for name in card.datasets],
        rewards=[f"`{shown_name(name)}`" for name in card.rewards],
        options={name: _value(value) for name, value in card.options.items() if value is not None},
        notes=_notes(card),
        versions={name: version(name) for name in LIBRARIES},
    )
    text.save(file)
    return True


def is_generated(file: Path) -> bool:
    """Whether a `README.md` has both `TAGS` in the metadata that it begins with."""
    try:
        metadata = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError):
        return False
    tags = metadata.get("tags")
    return isinstance(tags, list) and all(tag in tags for tag in TAGS)


def _notes(card: Card) -> list[str]:
    """What stands above the figures."""
    has_interval = any("±" in figure.first + figure.last for figure in card.figures)
    after = [f"After {card.steps} optimizer steps."] if card.steps else []
    return [*after, *([f"Behind ±: {card.interval}."] if has_interval else [])]


def hub_name(name: str | None) -> str | None:
    """`name` if it may be one of the hub's; None for a path."""
    if not name or os.path.exists(name) or os.path.isabs(name) or DATA_FILES.intersection(Path(name).suffixes):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def shown_name(name: str) -> str:
    """A hub name as it is; of a path, which would tell of this machine, the last part."""
    return hub_name(name) or Path(name).name or name


def _link(name: str | None, site: str) -> str | None:
    if not name:
        return None
    return f"[{name}]({site}{name})" if hub_name(name) else f"`{shown_name(name)}`"


def _value(value: Any) -> str:
    """An option as code in a cell of a table."""
    value = shown_name(value) if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)) else value
    return "`" + json.dumps(value, default=str, ensure_ascii=False).replace("|", "\\|").replace("`", "'") + "`"
