"""Verdicts on disk, one a line, so that a comparison that was interrupted continues where it stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_apa.files import write_all
from trl_apa.winrate.verdicts import WORTH


class VerdictCache:
    """A file of JSON lines `{"key": ..., "verdict": ...}` that only grows; scores are verdicts too.

    A key is a digest of the judge's identity and the question; neither texts nor addresses are written. A line that
    is not such an entry counts for nothing, whatever it holds: the half line of a run that was killed, other JSON,
    bytes that are no text, a verdict that there is not.

    Args:
        path: the file; it and its folder are made with the first verdict.
        is_verdict: which values can be verdicts; those of a comparison by default.

    Raises:
        OSError: if `path` is there and cannot be read.
    """

    def __init__(self, path: str | Path, is_verdict: Callable[[str], bool] = WORTH.__contains__):
        self.path, self.is_verdict = Path(path), is_verdict
        self._verdicts: dict[str, str] = {}
        if self.path.is_file():
            entries = (_entry(line, is_verdict) for line in self.path.read_bytes().splitlines())
            self._verdicts = dict(filter(None, entries))

    def __len__(self) -> int:
        return len(self._verdicts)

    @staticmethod
    def key(identity: dict[str, Any], question: Sequence[Any]) -> str:
        """What a verdict on a question is filed under: the same for the same judge and the same texts only."""
        text = json.dumps([identity, list(question)], sort_keys=True, ensure_ascii=False)
        # JSON may hold halves of surrogate pairs, which UTF-8 has no bytes for.
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def get(self, key: str) -> str | None:
        """The verdict, if there is one."""
        return self._verdicts.get(key)

    def put(self, key: str, verdict: str) -> None:
        """Remember a verdict, on disk too.

        Raises:
            ValueError: if it cannot be one.
            OSError: if the file cannot be written.
        """
        if not self.is_verdict(verdict):
            raise ValueError(f"verdict={verdict!r}: it should be one of {', '.join(WORTH)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "verdict": verdict}).encode() + b"\n"
        # Looked at each time: the last writer, this process or another, may have failed within a line.
        with open(self.path, "ab+", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(max(size - 1, 0))
            write_all(file, line if file.read(1) in (b"", b"\n") else b"\n" + line)
        self._verdicts[key] = verdict


def _entry(line: bytes, is_verdict: Callable[[str], bool]) -> tuple[str, str] | None:
    try:
        value = json.loads(line.decode())
        key, verdict = value["key"], value["verdict"]
        return (key, verdict) if isinstance(key, str) and is_verdict(verdict) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
