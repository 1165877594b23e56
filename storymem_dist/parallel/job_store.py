"""The store through which the ranks of a job found each other, for short messages between them later."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_STORE_SECONDS = 30.0
_STORE_TRIES = 3


def own_connection(timeout_seconds: float) -> Any:
    """Return a connection to the job's store that no other thread waits for. Torch's stubs lack the class."""
    assert dist.group.WORLD is not None
    store: Any = dist.group.WORLD.get_group_store()
    connection = store.clone()
    connection.set_timeout(timedelta(seconds=timeout_seconds))
    return connection


class JobStore:
    """The store of the job's ranks, over a connection that no other thread waits for.

    A request that gets no answer in time is repeated, and a lost connection is replaced once: every request has the
    same effect when it is repeated. Raises ``ConnectionError`` when the store is gone: its process has ended.
    """

    def __init__(self, connect: Callable[[], Any] | None = None) -> None:
        self._connect = connect or (lambda: own_connection(_STORE_SECONDS))
        self._connection = self._connect()

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""
        self._ask("set", key, value)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Return the values of keys that are set."""
        values: list[bytes] = self._ask("multi_get", keys)
        return values

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set a key that has the expected value; return the value after that."""
        value: bytes = self._ask("compare_set", key, expected, desired)
        return value

    def _ask(self, request: str, *arguments: object) -> Any:
        for _ in range(_STORE_TRIES):
            try:
                return getattr(self._connection, request)(*arguments)
            except dist.DistNetworkError:
                try:
                    self._connection = self._connect()
                except dist.DistError as error:
                    raise ConnectionError(str(error)) from error
            except dist.DistStoreError:  # no answer in time
                pass
        raise ConnectionError(f"no answer to {request} in {_STORE_TRIES} times {_STORE_SECONDS:g} s")
