"""MP4 files of any origin, opened as MP4 and as nothing else. Never loads torch: reports need this."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer

from storymem_dist.files import UnsafePath, open_regular

MAX_PIXELS = 64 * 10**6
"""Most pixels of a frame or image that are decoded."""


@contextmanager
def open_mp4(path: Path) -> Iterator[InputContainer]:
    """Open a file of any origin as MP4 and as nothing else: other formats may name further files or addresses.

    Refuses frames of more than ``MAX_PIXELS``. Raises ``OSError`` (``UnsafePath`` for what is refused) and
    ``av.FFmpegError``.
    """
    with open_regular(path) as file:
        if file.read(8)[4:] != b"ftyp":
            raise UnsafePath(f"{path} is not an MP4 file")
        file.seek(0)
        with av.open(file, "r", format="mp4") as container:
            for stream in container.streams.video:
                if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                    raise UnsafePath(f"{path}: its frames are too large")
            yield container


def is_mp4(path: Path) -> bool:
    """Whether ``path`` is a regular file that starts as MP4 files do."""
    try:
        with open_regular(path) as file:
            return file.read(8)[4:] == b"ftyp"
    except OSError:
        return False
