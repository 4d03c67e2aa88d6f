"""Standard output and error of a command that leaves more than it prints: losing them does not end it."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def streams_that_may_be_lost(program: str) -> Iterator[None]:
    """Inside, nothing that is printed raises.

    A character that the terminal's encoding lacks is printed as its escape. A stream that nobody reads any more (`|
    head`), or that lies on a full disk, is done without from then on; for stdout a line on stderr says so.
    """
    before = sys.stdout, sys.stderr

    def tell(error: Exception) -> None:
        if sys.stderr is not None:
            print(f"{program}: stdout is lost ({error}); continuing without it", file=sys.stderr)

    if sys.stderr is not None:
        sys.stderr = _MayBeLost(sys.stderr, lambda error: None)
    if sys.stdout is not None:
        sys.stdout = _MayBeLost(sys.stdout, tell)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _MayBeLost):
                stream.flush()
        sys.stdout, sys.stderr = before


class _MayBeLost:
    """A text stream that swallows what can no longer be written.

    Args:
        stream: where it is written.
        tell: called with the error when the stream is lost.
    """

    def __init__(self, stream: TextIO, tell: Callable[[Exception], None]):
        self._stream, self._tell, self._is_lost = stream, tell, False

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._is_lost = True
        discard(self._stream)
        self._tell(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def nobody_reads(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that is closed at its other end. What cannot be written is discarded."""
    if stream is None:
        return False
    with suppress(OSError, ValueError, AttributeError):  # it is no file, or select has no poll on this system
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            discard(stream)
            return True
    try:
        stream.flush()
    except (OSError, ValueError) as error:
        discard(stream)
        return isinstance(error, BrokenPipeError)
    return False


def discard(stream: TextIO) -> None:
    """Discard the stream's buffer and later writes: they would fail when the process ends."""
    # A stream without a file descriptor, or that is closed, holds nothing.
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
