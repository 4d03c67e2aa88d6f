"""Files that a process may be killed, or a disk fill up, in the middle of writing."""

from pathlib import Path
from typing import IO


def replace_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name and rename it: readers never see an incomplete file.

    A device or a pipe is written to as it is.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write to a file without a buffer, of which nothing is left to be written after a failure.

    Raises:
        OSError: if it cannot be written, naming it.
    """
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error
