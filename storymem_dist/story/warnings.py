"""Collects what a storyboard's author should know, a sentence for each kind. Knows nothing about storyboards."""

from collections.abc import Iterable

from storymem_dist.story.problems import one_line, short

_MAX_CHARACTERS = 600
_MAX_KEYS = 12
_MAX_SENTENCES = 20


class Warnings:
    """The warnings of one storyboard. ``quotes`` is a cure that is added where text was expected: "" if it is none."""

    def __init__(self, *, quotes: str = "") -> None:
        self.quotes = quotes
        self._places: dict[str, list[str]] = {}
        self._unused: dict[str, int] = {}

    def add(self, what: str, place: str = "") -> None:
        """Add a warning; ``place`` is its scene, shot or picture, if it is not about the whole."""
        self._places.setdefault(what, []).append(place)

    def add_unused(self, keys: Iterable[str]) -> None:
        """Add keys that are not used; one warning names them all."""
        for key in keys:
            self._unused[key] = self._unused.get(key, 0) + 1

    def sentences(self, where: str) -> tuple[str, ...]:
        """Return a sentence for each kind of warning: ``where``, what, and the first of its places."""
        said = [_sentence(where, what, places) for what, places in self._places.items()]
        if self._unused:
            listed = [
                f"{short(key)!r}" + (f" ({count} times)" if count > 1 else "") for key, count in self._unused.items()
            ]
            more = f" and {len(listed) - _MAX_KEYS} more" if len(listed) > _MAX_KEYS else ""
            said.append(_sentence(where, f"unknown keys are not used: {', '.join(listed[:_MAX_KEYS])}{more}", [""]))
        if len(said) > _MAX_SENTENCES:
            rest = len(said) - _MAX_SENTENCES + 1
            said[_MAX_SENTENCES - 1 :] = [_sentence(where, f"{rest} more kinds of warnings are left out", [""])]
        return tuple(said)


def _sentence(where: str, what: str, places: list[str]) -> str:
    first = f", {places[0]}" if places[0] else ""
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    said = one_line(f"{first}: {what}{more}")
    return one_line(where) + (said if len(said) <= _MAX_CHARACTERS else said[: _MAX_CHARACTERS - 3] + "...")
