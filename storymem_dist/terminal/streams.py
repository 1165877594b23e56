"""Standard output and standard error that never fail, and the only functions of this package that print.

A closed descriptor, a full disk, a reader that has gone, an encoding without the character: the text is lost or
escaped, and the program goes on to the exit code that it would have had. ``install`` replaces the two streams of the
process; libraries then print through them as well.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from typing import Any

from storymem_dist.terminal.text import printable, printable_lines

_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)
_FULL_PIPE_SECONDS = 5.0


class _Descriptor(io.RawIOBase):
    """Bytes to a file descriptor. What cannot be written is dropped; ``gone``: nobody can ever read it again."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._gone = False

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest and not self._gone:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a terminal that another program made non-blocking
                if not select.select([], [self._descriptor], [], _FULL_PIPE_SECONDS)[1]:
                    break
            except OSError as error:
                self._gone = error.errno in _GONE
                break
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False


class _Captured(io.RawIOBase):
    """Bytes to a text stream without a descriptor, as tests and notebooks have them."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream = stream
        self._encoding = encoding

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(bytes(data).decode(self._encoding, "replace"))
            self._stream.flush()
        return len(data)

    def writable(self) -> bool:
        return True


class SafeStream(io.TextIOWrapper):
    """Text to a terminal or log. Control characters in it are escaped, except line breaks and tabs.

    ``unescaped`` writes to the same place without escaping, for a library that draws on the terminal.
    """

    unescaped: io.TextIOWrapper

    def write(self, text: str) -> int:
        """Write ``text``; never raises for what is in it or for where it goes."""
        super().write(printable_lines(text))
        return len(text)

    def close(self) -> None:
        """Only flush: the descriptor belongs to the process."""
        self.flush()


def install() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` safe streams. May be called again."""
    if sys.stdin is None:
        _occupy(0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, SafeStream):
            continue
        if stream is None:
            _occupy(descriptor)
        else:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        setattr(sys, name, _safe(stream, descriptor))


def print_line(text: object = "") -> None:
    """Print one line on standard output: whatever ``text`` holds, it stays one line."""
    _write(sys.stdout, f"{printable(text)}\n")


def print_lines(lines: Iterable[object]) -> None:
    """Print each of ``lines`` on standard output."""
    _write(sys.stdout, "".join(f"{printable(line)}\n" for line in lines))


def print_text(text: str) -> None:
    """Print text of several lines, which ends with a line break, on standard output."""
    _write(sys.stdout, printable_lines(text))


def print_error(text: object) -> None:
    """Print one line on standard error: whatever ``text`` holds, it stays one line."""
    _write(sys.stderr, f"{printable(text)}\n")


def print_on(stream: Any, line: object) -> None:
    """Print one line on another stream, a log for example."""
    _write(stream, f"{printable(line)}\n")


def print_error_text(text: str) -> None:
    """Print text of several lines on standard error, such as a log record with a trace, and end its last line."""
    _write(sys.stderr, f"{printable_lines(text)}\n")


def _write(stream: Any, text: str) -> None:
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            stream.write(text)
        except UnicodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode())
        stream.flush()


def _safe(stream: Any, descriptor: int) -> SafeStream:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    sink: io.RawIOBase
    if stream is None:
        sink = _Descriptor(descriptor)
    else:
        try:
            sink = _Descriptor(stream.fileno())
        except (AttributeError, OSError, ValueError):
            sink = _Captured(stream, encoding)
    # TextIOWrapper takes anything with ``write``; a buffer below it would keep what could not be written
    safe = SafeStream(sink, encoding, "backslashreplace", "\n", line_buffering=True)  # type: ignore[arg-type]
    safe.unescaped = io.TextIOWrapper(sink, encoding, "backslashreplace", "\n", line_buffering=True)  # type: ignore[arg-type]
    return safe


def _occupy(descriptor: int) -> None:
    """Open ``/dev/null`` as a closed descriptor, before a file gets its number and receives what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
