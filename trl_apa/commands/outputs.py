"""A command's outputs: checked, and the checkpoint to resume, before anything is loaded; named once written."""

import os
from pathlib import Path


def check_output_folder(name: str, path: str | Path) -> None:
    """See whether files can be written to a folder, or one can be made there; nothing is made.

    Args:
        name: of the option.
        path: its value.

    Raises:
        ValueError: if it is a file or is below one, or if it is not writable.
    """
    _check_folder(f"{name}={str(path)!r}", Path(path).absolute())


def _check_folder(what: str, place: Path) -> None:
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{what}: {place} is a file; it should be a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: nothing can be written to {place}")


def check_output_file(name: str, path: str | Path | None) -> None:
    """As `check_output_folder`, for a file. None: there is to be none.

    Raises:
        ValueError: if it is a folder, or if it cannot be written.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"{name}={str(path)!r} is a folder; it should be a file")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name}={str(path)!r} cannot be written")
    _check_folder(f"{name}={str(path)!r}", Path(path).absolute().parent)


def checkpoint_to_resume(resume: str | None, output_dir: str | Path) -> str | bool | None:
    """`resume_from_checkpoint` as `Trainer.train` takes it: `true` means the last checkpoint of the output folder.

    Raises:
        ValueError: if there is no such folder, or no checkpoint in the output folder.
    """
    asked = str(resume or "no").lower()
    if asked in ("false", "no", "none"):
        return None
    if asked in ("true", "yes", "last"):
        if not any(Path(output_dir).glob("*checkpoint-*")):  # one that is complete may still lack its name
            raise ValueError(f"resume_from_checkpoint={resume}: there is no checkpoint in output_dir={output_dir!r}")
        return True
    if not Path(str(resume)).is_dir():
        raise ValueError(f"resume_from_checkpoint={resume!r}: there is no such folder")
    return resume


def saved_in(folder: str | Path, *names: str | bool) -> str:
    """`model, tokenizer and README.md are in runs/sft`.

    Args:
        folder: of the outputs.
        names: of what was written; what was not is False.
    """
    *written, last = [name for name in names if isinstance(name, str)]
    return f"{', '.join(written)} and {last} are in {folder}"
