"""Numbers for modules by regular expressions, as peft's ``rank_pattern`` and ``alpha_pattern`` give them.

The expressions come from a file that somebody else wrote, so their length, their repeats and the processor time for
all of them are limited.
"""

import time
from collections.abc import Iterable, Mapping

import regex

from storymem_dist.errors import CheckpointError, shortened

_MAX_LENGTH = 300
_MAX_REPEATS = 3
_MAX_SECONDS = 3.0
_REPEAT = regex.compile(r"\{[^}]*\}")


class ModulePatterns:
    """Finds the number of a module: that of the first expression for its whole name, or for the end of it after a dot.

    Args:
        place: file and place of the expressions, for messages.
        numbers: by expression, in the order in which they are tried.

    Raises:
        CheckpointError: an expression is no regular expression, or too long or too costly.
    """

    def __init__(self, place: str, numbers: Mapping[str, float]) -> None:
        self._place, self._seconds = place, 0.0
        self._compiled = [(text, self._compile(text), number) for text, number in numbers.items()]

    def find(self, names: Iterable[str]) -> float | None:
        """The number for a module with these names, None without one. Raises ``CheckpointError`` past the limit."""
        names = tuple(names)
        for text, expression, number in self._compiled:
            started = time.process_time()
            try:
                found = any(expression.fullmatch(name, timeout=_MAX_SECONDS) for name in names)
            except TimeoutError:
                raise self._too_costly(text) from None
            self._charge(text, started)
            if found:
                return number
        return None

    def _compile(self, text: str) -> "regex.Pattern[str]":
        repeats = _REPEAT.findall(text)
        if len(text) > _MAX_LENGTH or len(repeats) > _MAX_REPEATS or regex.search(r"\{[^}]*\d{3}", text):
            raise CheckpointError(
                f"{self._place} has the pattern {shortened(text, 80)!r}; allowed are {_MAX_LENGTH} characters and "
                f"{_MAX_REPEATS} repeats such as {{1,2}}"
            )
        started = time.process_time()
        try:
            expression = regex.compile(rf"(?:.*\.)?(?:{text})")
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise CheckpointError(
                f"{self._place} has the pattern {shortened(text, 80)!r}, which is no regular expression: {error}"
            ) from None
        self._charge(text, started)
        return expression

    def _charge(self, text: str, started: float) -> None:
        self._seconds += time.process_time() - started
        if self._seconds > _MAX_SECONDS:
            raise self._too_costly(text)

    def _too_costly(self, text: str) -> CheckpointError:
        return CheckpointError(
            f"{self._place} has patterns that take too long to look up (stopped at {shortened(text, 80)!r}); write "
            "them as the names of modules"
        )
