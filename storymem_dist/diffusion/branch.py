"""Names of the two guidance passes, and the base class of caches that keep them apart.

Knows nothing about what is cached.
"""

from collections.abc import Iterator
from contextlib import contextmanager

COND = "cond"
UNCOND = "uncond"


class ByBranch:
    """A part of an expert that depends on the guidance branch, which the caller of a forward sets."""

    def __init__(self) -> None:
        self._branch: str | None = None

    @contextmanager
    def during(self, branch: str) -> Iterator[None]:
        """Forwards inside the ``with`` block belong to ``branch`` (``COND`` or ``UNCOND``)."""
        self._branch = branch
        try:
            yield
        finally:
            self._branch = None

    @property
    def branch(self) -> str:
        """The branch of the running forward. Raises ``RuntimeError`` outside ``during``."""
        if self._branch is None:
            raise RuntimeError("a forward with a cache needs its guidance branch; run it with Expert.run")
        return self._branch
