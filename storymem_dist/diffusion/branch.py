"""The two passes of guidance by name, and what a cache needs to tell them apart. Knows nothing of what is cached."""

from collections.abc import Iterator
from contextlib import contextmanager

COND = "cond"
UNCOND = "uncond"


class ByBranch:
    """Something inside an expert that behaves by guidance branch: whoever runs a forward says which one it is."""

    def __init__(self) -> None:
        self._branch: str | None = None

    @contextmanager
    def during(self, branch: str) -> Iterator[None]:
        """The forward inside belongs to ``branch`` (``COND`` or ``UNCOND``)."""
        self._branch = branch
        try:
            yield
        finally:
            self._branch = None

    @property
    def branch(self) -> str:
        """The branch of the forward that goes on. Raises ``RuntimeError`` when nobody has said it."""
        if self._branch is None:
            raise RuntimeError("a forward with a cache must say which guidance branch it is (Expert.run does)")
        return self._branch
