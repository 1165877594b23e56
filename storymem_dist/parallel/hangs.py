"""Finds the ranks that block their replica, from the last report of each rank, and describes them. Pure functions.

A rank blocks the others if it has ended, is silent, is outside a collective while others are inside one, or is at an
earlier position. Knows neither how ranks exchange reports nor what they render.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """The last report of a rank about itself.

    ``number`` is equal on ranks at equal positions of the lock step and grows along it; ``where`` is the position in
    words, ``line`` the line of code. ``waits``: inside a collective. ``here_seconds`` is the time at this position,
    ``silent_seconds`` the time without a sign of life outside collectives; neither grows while the process is paused.
    ``patience`` multiplies the allowed silence. ``failure`` is why the rank gave up, ``unheard_seconds`` the age of the
    report.
    """

    rank: int
    host: str
    number: int
    where: str
    line: str
    waits: bool
    here_seconds: float
    silent_seconds: float
    patience: float = 1.0
    failure: str = ""
    unheard_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``culprits`` are the ranks that the others wait for, if any. ``text`` describes every rank."""

    culprits: tuple[int, ...]
    text: str


def judge(seen: Sequence[Sighting], *, alive_seconds: float) -> Verdict:
    """Find the ranks that block a replica. A rank without a report for ``alive_seconds`` is silent."""
    culprits = _culprits(seen, alive_seconds)
    others = [one for one in seen if one not in culprits]
    parts = [_describe(one, alive_seconds) for one in culprits]
    groups: dict[str, list[Sighting]] = {}
    for one in others:
        groups.setdefault(one.where, []).append(one)
    for where, group in groups.items():
        does = "wait" if len(group) > 1 else "waits"
        whom = "it" if len(culprits) == 1 else "them" if culprits else "another rank"
        here = min(one.here_seconds + one.unheard_seconds for one in group)
        parts.append(f"{_names(group)} {does} for {whom} in {where}, for {here:.0f} s")
    return Verdict(culprits=tuple(one.rank for one in culprits), text="; ".join(parts))


def _culprits(seen: Sequence[Sighting], alive_seconds: float) -> list[Sighting]:
    if ended := [one for one in seen if one.failure and not one.waits]:
        return ended
    if silent := [one for one in seen if not one.failure and one.unheard_seconds > alive_seconds]:
        return silent
    furthest_back = min((one.number for one in seen), default=0)
    behind = [one for one in seen if one.number == furthest_back]
    outside = [one for one in behind if not one.waits] or [one for one in seen if not one.waits]
    return outside or (behind if len(behind) < len(seen) else [])


def _describe(one: Sighting, alive_seconds: float) -> str:
    name = f"rank {one.rank} ({one.host})"
    if one.failure:
        return f"{name} ended in {one.where}: {one.failure}"
    if one.unheard_seconds > alive_seconds:
        return f"{name} has shown no sign of life for {one.unheard_seconds:.0f} s; it was last seen in {one.where}"
    here = one.here_seconds + one.unheard_seconds
    return f"{name} has not left {one.where}, for {here:.0f} s; it is at {one.line}"


def _names(group: Sequence[Sighting]) -> str:
    *first, last = [str(one.rank) for one in group]
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
