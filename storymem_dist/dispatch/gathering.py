"""How idle replicas of one job find together for a shot: a few words per replica in the store of the job's ranks.

    storymem-merge/<replica>      busy | soon <kind> | idle <kind> | called <call> <first> <size> | helping
    storymem-merge/call/<call>    open | on | off

``soon``: it looks for work, or waits for its own save, and may be idle after that; likewise one that has not begun.
Only a replica itself leaves ``busy`` and ``soon``; only a compare-and-set leaves ``idle``, either by the replica, which
goes on to look for work, or by one that calls it. So a replica cannot begin a shot of its own while it is called. A
call counts once its caller has reached all replicas of the team and has set it to ``on``; it sets it to ``off`` if one
of them went away, and so does a called replica that has waited too long for the word. The first of the two decides,
so all agree.

The replica that holds the lease of the shot calls, and leads the team. Knows a store; nothing of ranks, shots or files.
If the store is gone (the process that held it has ended, its work done), no replica is idle for others.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storymem_dist.dispatch.merging import Team

_PREFIX = "storymem-merge"
_BUSY, _SOON, _IDLE, _CALLED, _HELPING = "busy", "soon", "idle", "called", "helping"
_OPEN, _ON, _OFF = "open", "on", "off"
_NOTHING_LOADED = "-"
_LOOK_SECONDS = 0.05  # between two looks of an idle replica, or of a called one that waits for the word
_WORD_SECONDS = 20.0  # a caller takes milliseconds; one that takes longer is paused or gone


class SharedStore(Protocol):
    """What is used of the store of the job's ranks (``parallel.job_store``).

    All methods raise ``ConnectionError`` when it is gone for all.
    """

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Return values of keys that are set; waits for others."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set a key that has the expected value; return the value after that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Replicas that render one shot together. ``leader`` is the one that holds its lease."""

    team: Team
    leader: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """The other replicas at one moment: those that are idle or may soon be, with the kind of experts that each has
    loaded (None: none, or not known yet), and how many have a shot of their own.
    """

    idle: Mapping[int, str | None]
    soon: Mapping[int, str | None]
    num_busy: int


class Gathering:
    """One replica's part in finding together. ``replicas``: those of its node that may work together, itself among
    them; their leaders each have a ``Gathering`` of the same store. ``sleep`` and ``clock`` are in seconds.
    """

    def __init__(
        self,
        store: SharedStore,
        *,
        replica: int,
        replicas: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store: SharedStore | None = store
        self._replica = replica
        self._others = [other for other in replicas if other != replica]
        self._clock, self._sleep = clock, sleep
        self._word = ""
        self._num_calls = 0
        self._say(f"{_SOON} {_NOTHING_LOADED}")

    def be_busy(self) -> None:
        """Say that this replica has a shot, or has ended. Not while it is idle: ``look_for_work`` comes first."""
        self._say(_BUSY)

    def wait(self, seconds: float, loaded: str | None) -> None:
        """Be idle for ``seconds``, or until this replica is called."""
        idle = f"{_IDLE} {loaded or _NOTHING_LOADED}"
        until = self._clock() + seconds
        self._say(idle)
        while (left := until - self._clock()) > 0.0:
            self._sleep(min(_LOOK_SECONDS, left))
            if self._word == idle and self._read([_state_key(self._replica)]) not in ([idle], []):
                return

    def look_for_work(self, loaded: str | None) -> Merge | None:
        """Stop being idle: None to look for work, or what this replica was called for, and must take part in."""
        soon = f"{_SOON} {loaded or _NOTHING_LOADED}"
        idle = self._word
        if not idle.startswith(_IDLE):
            self._say(soon)
            return None
        self._word = soon
        found = self._swap(_state_key(self._replica), idle, soon)
        if not found.startswith(_CALLED):
            return None
        merge = self._answer(found)
        self._word = ""
        self._say(soon if merge is None else _HELPING)
        return merge

    def neighbours(self) -> Neighbours:
        """Return what the other replicas do. One look: between two, one could go from ``soon`` to ``idle`` unseen."""
        states = self._states()
        return Neighbours(
            idle=_in(_IDLE, states), soon=_in(_SOON, states), num_busy=sum(word == _BUSY for word in states.values())
        )

    def call(self, team: Team) -> Merge | None:
        """Call the other replicas of ``team``; None when one of them has something else to do by then."""
        self._num_calls += 1
        call = f"{self._replica}.{self._num_calls}"
        word = f"{_CALLED} {call} {team.first} {team.size}"
        states = self._states()
        self._set(_call_key(call), _OPEN)
        reached = True
        for replica in team.replicas:
            if replica == self._replica:
                continue
            state = states.get(replica, _BUSY)
            if not state.startswith(_IDLE) or self._swap(_state_key(replica), state, word) != word:
                reached = False
                break
        verdict = self._swap(_call_key(call), _OPEN, _ON if reached else _OFF)
        return Merge(team=team, leader=self._replica) if verdict == _ON else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _answer(self, word: str) -> Merge | None:
        """Wait for the word of the caller; what this replica is called for if it comes."""
        _, call, first, size = word.split()
        until, verdict = self._clock() + _WORD_SECONDS, _OPEN
        while verdict == _OPEN and self._clock() < until:
            verdict = next(iter(self._read([_call_key(call)])), _OFF)
            if verdict == _OPEN:
                self._sleep(_LOOK_SECONDS)
        if verdict == _OPEN:
            verdict = self._swap(_call_key(call), _OPEN, _OFF)
        if verdict != _ON:
            return None
        return Merge(team=Team(first=int(first), size=int(size)), leader=int(call.split(".")[0]))

    def _states(self) -> dict[int, str]:
        """The words of the other replicas, none without a store. One that has not begun will look for work soon."""
        keys = [_state_key(other) for other in self._others]
        words = self._read(keys) or [next(iter(self._read([key])), f"{_SOON} {_NOTHING_LOADED}") for key in keys]
        return {} if self._store is None else dict(zip(self._others, words, strict=True))

    def _say(self, word: str) -> None:
        if word != self._word:
            self._word = word
            self._set(_state_key(self._replica), word)

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, value)
            except ConnectionError:
                self._store = None

    def _read(self, keys: list[str]) -> list[str]:
        """The values of ``keys``; nothing when one of them is not set."""
        if self._store is not None:
            try:
                if self._store.check(keys):
                    return [value.decode() for value in self._store.multi_get(keys)]
            except ConnectionError:
                self._store = None
        return []

    def _swap(self, key: str, expected: str, desired: str) -> str:
        """Replace ``expected`` by ``desired``; the value after that, empty without a store."""
        if self._store is not None:
            try:
                return self._store.compare_set(key, expected, desired).decode()
            except ConnectionError:
                self._store = None
        return ""


def _in(state: str, words: Mapping[int, str]) -> dict[int, str | None]:
    """The replicas in ``state``, with what they have loaded."""
    found: dict[int, str | None] = {}
    for replica, word in words.items():
        name, _, kind = word.partition(" ")
        if name == state:
            found[replica] = None if kind == _NOTHING_LOADED else kind
    return found


def _state_key(replica: int) -> str:
    return f"{_PREFIX}/{replica}"


def _call_key(call: str) -> str:
    return f"{_PREFIX}/call/{call}"
