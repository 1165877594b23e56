"""rich's console on the safe streams: its own colours and movements stay, the same characters in texts are escaped."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from storymem_dist.terminal.streams import SafeStream
from storymem_dist.terminal.text import printable_lines


class SafeConsole(Console):
    """A console for texts of any origin. ``file``: by default standard output."""

    def __init__(self, file: Any = None, **options: Any) -> None:
        stream = file if file is not None else sys.stdout
        super().__init__(file=stream.unescaped if isinstance(stream, SafeStream) else stream, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with escapes in the text of every segment."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable_lines(segment.text), segment.style)


def escape_streams() -> None:
    """Put the escapes in front of the streams by which rich replaced the process's own, until its live view stops."""
    sys.stdout = cast("TextIO", _EscapingStream(sys.stdout))
    sys.stderr = cast("TextIO", _EscapingStream(sys.stderr))


class _EscapingStream:
    """Text to another stream, with the same escapes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, escaped."""
        self._stream.write(printable_lines(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
