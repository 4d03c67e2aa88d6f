"""JSON lines that a command writes as they come, and continues after it was killed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trl_apa.files import replace_text, write_all


try:
    import fcntl
except ImportError:  # no POSIX system: two processes that write one file are not found out there
    fcntl = None  # type: ignore[assignment]  # it has the type of a module

Write = Callable[[dict[str, Any]], None]
ANEW = "set --overwrite to start again, or name another file"


class RowFile:
    """The rows of one command in their order, one a line, each on disk before the next.

    A hidden file beside it, `.NAME.run.json`, says which command's rows they are. Whoever reads the rows need not know
    of it.

    Args:
        path: the file. A device or a pipe is written to and nothing more.
        about: what the rows depend on, as JSON types: option to value.
        prompts: the `prompt` of every row that there will be.
        overwrite: start again, whatever the file holds.
    """

    def __init__(self, path: str | Path, about: dict[str, Any], prompts: Sequence[Any], overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.record = record_of(self.path)
        self.about = json.loads(json.dumps(about))
        self.prompts = prompts

    def count(self) -> int:
        """How many rows are there.

        Raises:
            ValueError: if the file has anything but rows of this command.
            OSError: if it cannot be read.
        """
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; it should be a file")
        if self.overwrite or not self.path.is_file() or self.path.stat().st_size == 0:
            return 0
        self._check_record()
        return len(self._lengths())

    @contextmanager
    def writing(self, first: int) -> Iterator[Write]:
        """Gives a function that writes one row after the other.

        Args:
            first: the row that it begins with, which is the `count` of those that are there.

        Raises:
            ValueError: as `count`, or if another process writes the file, or has since they were counted.
            OSError: if it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            if self.path.is_file():
                self._lock(file)
                self._begin(file, first)
            yield lambda row: write_all(file, json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _begin(self, file: IO[bytes], first: int) -> None:
        if self.count() != first:
            raise ValueError(f"another process has written {self.path}: run this again")
        if first:
            file.truncate(sum(self._lengths()))
        else:
            # In this order: this command's record never accompanies another command's rows.
            file.truncate(0)
            replace_text(self.record, json.dumps(self.about, indent=1) + "\n")

    def _lock(self, file: IO[bytes]) -> None:
        """Until the file is closed, or the process is gone."""
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {self.path}") from error
        except OSError:
            pass  # a file system without locks

    def _check_record(self) -> None:
        try:
            before = json.loads(self.record.read_bytes())
            changed = [name for name in {**before, **self.about} if before.get(name) != self.about.get(name)]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} exists, but the record of the command that wrote it ({self.record.name}) does not: "
                f"{ANEW}"
            ) from error
        if changed:
            values = (f"{name} was {before.get(name)!r} and is {self.about.get(name)!r}" for name in changed)
            raise ValueError(f"{self.path} holds the rows of another command ({', '.join(values)}): {ANEW}")

    def _lengths(self) -> list[int]:
        """Bytes of each row, up to the one that was not written to its end."""
        lengths: list[int] = []
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                if number >= len(self.prompts) or not _is_row(line, self.prompts[number]):
                    raise ValueError(f"{self.path}, line {number + 1} was not written by this command: {ANEW}")
                lengths.append(len(line))
        return lengths


def record_of(path: Path) -> Path:
    """The hidden file that says which command's rows `path` holds."""
    target = path.resolve()
    return target.with_name(f".{target.name}.run.json")


def _is_row(line: bytes, prompt: Any) -> bool:
    try:
        row = json.loads(line)
        return row["prompt"] == json.loads(json.dumps(prompt)) and isinstance(row["completion"], str)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def digest(values: Sequence[Any]) -> str:
    """The number of values and a digest of them, for comparison."""
    text = json.dumps(list(values), ensure_ascii=False)
    return f"{len(values)}, sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}"
