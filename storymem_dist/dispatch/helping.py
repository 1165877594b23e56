"""Marks of replicas that help with a shot of another one, so that the shot counts a death among them.

    leases/<key>.<generation>.<replica>.helping      made when it begins; removed when it ends, or is asked to stop

A launcher asks all that are left to stop when one process has died. So a lease alone does not show that a helper has
died: its holder was asked to stop, whatever happened. A mark that is left says that a helper died unasked.
"""

import contextlib
from pathlib import Path

from storymem_dist.files import names_in

_SUFFIX = ".helping"


class Help:
    """What one process notes of its help, in the folder of leases. Any thread may call ``end``. Never raises."""

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._mark: Path | None = None

    def begin(self, folder: Path, key: str, generation: int) -> None:
        """Note that this process helps the holder of a lease."""
        self._mark = mark = folder / f"{key}.{generation}.{self._replica}{_SUFFIX}"
        with contextlib.suppress(OSError):
            mark.touch()
            if self._mark is None:  # asked to stop meanwhile
                mark.unlink(missing_ok=True)

    def end(self) -> None:
        """Note that this process does not help any more, or that its death would not count: it was asked to stop."""
        mark, self._mark = self._mark, None
        if mark is not None:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)


def marks_of_helpers(folder: Path, key: str, generation: int | None = None) -> list[Path]:
    """Return the marks of those that help the holder of a lease, or helped it and died; None: of all generations."""
    beginning = f"{key}." if generation is None else f"{key}.{generation}."
    return [folder / name for name in names_in(folder) if name.startswith(beginning) and name.endswith(_SUFFIX)]
