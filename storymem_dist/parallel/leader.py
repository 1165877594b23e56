"""One rank decides and all ranks of its group receive the value or exception; or all run a function and fail together.

What only the leader can know (what is on disk, whether a save worked, "stop now") goes through ``LeaderDecides``. While
the leader works, a helper thread sends signs of life: a leader may take hours (no shot is ready yet), and a dead one is
still noticed within the time-out of the group. Nothing here knows what is decided.
"""

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from storymem_dist.errors import StoryMemError
from storymem_dist.hardware import machine_fault

T = TypeVar("T")
_ALIVE = b""  # an empty message: the leader is still working


class LeaderDecides:
    """``decide(fn)`` runs ``fn`` on the leader of ``group`` and sends its outcome to all of its ranks.

    The value must survive pickling, and tensors in it must be on the CPU. A value that cannot be pickled fails the call
    on every rank. An exception arrives as it was raised, or as ``MachineError`` if the machine caused it (causes do not
    survive pickling); one that cannot be pickled arrives as ``RuntimeError`` with its type and text.
    """

    def __init__(self, group: dist.ProcessGroup, *, keep_alive_seconds: float, leader: int = 0) -> None:
        """``group``: a gloo group, ``leader`` a rank of it. ``keep_alive_seconds``: pause between two signs of life."""
        self._group = group
        self._keep_alive_seconds = keep_alive_seconds
        self._leader = leader
        self._is_leader = group.rank() == leader

    def __call__(self, fn: Callable[[], T]) -> T:
        """Return the leader's ``fn()``, or raise its exception. Collective over the group."""
        if not self._is_leader:
            return _unpacked(self._receive())
        with self._signs_of_life():
            try:
                value, error = fn(), None
            except BaseException as caught:  # an interrupt, too, must reach the ranks that wait
                value, error = None, machine_fault(caught) or caught
        message, error = _packed(value, error)
        self._send(message)
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # fn's value: error is None

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # a lost peer: sending the outcome reports it
                while not done.wait(self._keep_alive_seconds):
                    self._send(_ALIVE)

        thread = threading.Thread(target=beat, name="leader-keep-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()  # collectives of one group must not interleave

    def _send(self, message: bytes) -> None:
        dist.broadcast(torch.tensor([len(message)]), group=self._group, group_src=self._leader)
        if message:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            dist.broadcast(content, group=self._group, group_src=self._leader)

    def _receive(self) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        while not size:
            dist.broadcast(size, group=self._group, group_src=self._leader)
        message = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(message, group=self._group, group_src=self._leader)
        return message.numpy().tobytes()


def all_or_none(group: dist.ProcessGroup, fn: Callable[[], T]) -> T:
    """Run ``fn`` on every rank of the gloo ``group``. If it raises anywhere, every rank raises.

    A rank where ``fn`` succeeded raises the exception of the first rank that failed, so no rank waits for failed ones.
    """
    error: Exception | None = None
    try:
        value = fn()
    except Exception as caught:
        error = machine_fault(caught) or caught
    message, _ = _packed(None, error)
    messages: list[Any] = [None] * group.size()
    dist.all_gather_object(messages, message, group=group)
    if error is not None:
        raise error
    for message in messages:
        _unpacked(message)
    return value


def decide_alone(fn: Callable[[], T]) -> T:
    """``LeaderDecides`` of a replica with one rank."""
    return fn()


def _packed(value: object, error: BaseException | None) -> tuple[bytes, BaseException | None]:
    """Pickle an outcome; what cannot be pickled becomes an error that can."""
    try:
        message = pickle.dumps((value, error))
        if error is not None:
            pickle.loads(message)  # some exceptions can be pickled but not rebuilt
    except Exception as failure:
        if error is None:
            error = TypeError(f"the leader's decision cannot be sent to the other ranks: {failure}")
            return pickle.dumps((None, error)), error
        if isinstance(error, StoryMemError):
            substitute: Exception = StoryMemError(str(error))
        else:
            substitute = RuntimeError(f"{type(error).__name__} on the leader: {error}")
        return pickle.dumps((None, substitute)), error
    return message, error


def _unpacked(message: bytes) -> Any:
    value, error = pickle.loads(message)
    if error is not None:
        raise error
    return value
