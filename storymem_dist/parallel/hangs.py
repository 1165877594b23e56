"""Which ranks hold up their replica: from what each rank last said of itself to names and words. Pure.

A rank hangs where the others wait for it: it has ended, or says nothing any more, or is not inside a collective while
others are, or is at an earlier place. Nothing here knows how ranks hear of each other, or what they render.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A rank, as it last described itself.

    ``number`` is equal on ranks at equal places of the lock step and grows along it; ``where`` is the place in words,
    ``line`` the line of code. ``waits``: inside a collective. ``here_seconds`` is how long it has been at that place,
    ``silent_seconds`` how long without a sign of life outside collectives; both stand still while the process does.
    ``patience`` multiplies how long it may be silent. ``failure``: why it gave up; ``unheard_seconds``: how long ago
    this was.
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
    """``culprits`` are the ranks that the others wait for; none when nobody is behind. ``text`` tells of every rank."""

    culprits: tuple[int, ...]
    text: str


def judge(seen: Sequence[Sighting], *, alive_seconds: float) -> Verdict:
    """Find who holds up a replica whose ranks are ``seen``. Who was not heard of for ``alive_seconds`` is silent."""
    culprits = _culprits(seen, alive_seconds)
    others = [one for one in seen if one not in culprits]
    parts = [_accuse(one, alive_seconds) for one in culprits]
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


def _accuse(one: Sighting, alive_seconds: float) -> str:
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
