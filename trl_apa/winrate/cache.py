"""Verdicts on disk, one a line, so that a comparison that was cut goes on where it stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class VerdictCache:
    """A file of JSON lines `{"key": ..., "verdict": ...}` that only grows.

    A key is a digest of the judge's identity and the question; neither texts nor addresses are written. A line that
    cannot be read, as a run that was killed leaves it, counts for nothing.

    Args:
        path: the file; it and its folder are made with the first verdict.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._verdicts: dict[str, str] = {}
        self._ends_within_a_line = False
        if self.path.exists():
            content = self.path.read_bytes()
            self._ends_within_a_line = bool(content) and not content.endswith(b"\n")
            self._verdicts = dict(filter(None, map(_entry, content.splitlines())))

    def __len__(self) -> int:
        return len(self._verdicts)

    @staticmethod
    def key(identity: dict[str, Any], question: Sequence[Any]) -> str:
        """What a verdict on a question is filed under: the same for the same judge and the same texts only."""
        text = json.dumps([identity, list(question)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The verdict, if there is one."""
        return self._verdicts.get(key)

    def put(self, key: str, verdict: str) -> None:
        """Remember a verdict, on disk too."""
        self._verdicts[key] = verdict
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            line = json.dumps({"key": key, "verdict": verdict})
            file.write(f"\n{line}\n" if self._ends_within_a_line else f"{line}\n")
        self._ends_within_a_line = False


def _entry(line: bytes) -> tuple[str, str] | None:
    try:
        value = json.loads(line)
        return value["key"], value["verdict"]
    except (ValueError, TypeError, KeyError):
        return None
