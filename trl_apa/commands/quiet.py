"""Warnings of libraries that the user of a command cannot act on, and that are not shown while one runs.

Each is known by its whole text and its place. Another text, or the same one from elsewhere, is shown. Who imports the
package sees them all.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Hidden(NamedTuple):
    """A warning that is not shown.

    Args:
        place: the module that warns, or the name of the logger.
        text: a regular expression that the whole text matches.
    """

    place: str
    text: str


# Old names, by which TRL's and PEFT's own code sets and reads what transformers has renamed; and memory that the
# Trainer pins by default, also where there is no device to pin it for.
WARNINGS = (
    Hidden(
        "transformers.training_args",
        r"`gradient_checkpointing` is deprecated and will be removed in v6\. Use `activation_checkpointing` instead\.",
    ),
    Hidden(
        "transformers.modeling_utils",
        r"`is_gradient_checkpointing` is deprecated and will be removed in v6\. "
        r"Use `is_activation_checkpointing` instead\.",
    ),
    Hidden(
        "torch.utils.data.dataloader",
        r"'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used\.",
    ),
)
# A reward model made from a language model: its head is new, the other's is left out, and nothing else differs.
NEW_HEAD = (
    r"\w+ForSequenceClassification LOAD REPORT from: [^\n]*\nKey +\| Status +\|[^\n]*\n[-+]+\n"
    r"(?:(?:(?:embed_out|lm_head)\.weight +\| UNEXPECTED|score\.weight +\| MISSING) +\|[^\n]*\n)+\n*Notes:.*"
)
LOGGED = (
    # Imported, it speaks of a faster 4-bit kernel for CPUs, which has no gradient and is not used here.
    Hidden("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm_4bit_forward from kernels-community: .*"),
    # Before every 8-bit product. The kernel casts to float16, whatever the precision of the run.
    Hidden(
        "bitsandbytes.autograd._functions",
        r"MatMul8bitLt: inputs will be cast from torch\.\w+ to float16 during quantization",
    ),
)
STYLE = re.compile(r"\x1b\[[0-9;]*m")


class _Leaves(logging.Filter):
    """Of one logger; keeps the records whose whole text matches none of the expressions."""

    def __init__(self, texts: list[str]):
        super().__init__()
        self.texts = [re.compile(text, re.DOTALL) for text in texts]

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return not any(text.fullmatch(STYLE.sub("", record.getMessage())) for text in self.texts)


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Inside, what is in `WARNINGS` and `LOGGED` is not shown; everything else is as before."""
    with warnings.catch_warnings(), _not_logged(LOGGED):
        for hidden in WARNINGS:
            warnings.filterwarnings("ignore", rf"{hidden.text}\Z", module=rf"{re.escape(hidden.place)}\Z")
        yield


@contextmanager
def without_report_of_new_head() -> Iterator[None]:
    """Inside, a reward model is made from a language model, and nothing says that its head is new.

    Only there: of a reward model that is to score, the same report is the one sign that its scores are noise.
    """
    with _not_logged([Hidden("transformers.modeling_utils", NEW_HEAD)]):
        yield


@contextmanager
def _not_logged(all_hidden: Sequence[Hidden]) -> Iterator[None]:
    filters = {
        place: _Leaves([hidden.text for hidden in all_hidden if hidden.place == place])
        for place in {hidden.place for hidden in all_hidden}
    }
    for place, leaves in filters.items():
        logging.getLogger(place).addFilter(leaves)
    try:
        yield
    finally:
        for place, leaves in filters.items():
            logging.getLogger(place).removeFilter(leaves)
