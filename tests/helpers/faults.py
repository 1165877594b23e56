"""Ends the process at a chosen file operation, as a power cut or ``kill -9`` would.

Uses an audit hook, which sees every operation on files that Python code makes (opening for writing, renaming, linking,
removing, making folders) before it happens. A hook cannot be removed, so this is for forked children only.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_at(number: int, root: Path, *, torn: bool, armed: Callable[[], bool]) -> None:
    """Exit with code 9 just before the ``number``-th operation (from 1) below ``root`` that happens while ``armed()``.

    With ``torn``, only openings for writing count, and the file is left with garbage in it. Heartbeats then do not
    count: they come when the clock says so, and a resume that is shorter than a lease keeps a garbled one.
    """
    count = 0
    dying = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, dying
        if dying:
            return
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if not (writing or (event in _CHANGES and not torn)):
            return
        if not str(arguments[0]).startswith(str(root)) or not armed():
            return
        if torn and (str(arguments[0]).endswith(".alive") or not Path(arguments[0]).parent.is_dir()):
            return  # where the folder is missing, the operation fails and leaves no file
        count += 1
        if count == number:
            dying = True
            if torn:
                Path(arguments[0]).write_bytes(b'{"half": ')
            os._exit(9)

    sys.addaudithook(hook)
