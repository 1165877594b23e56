"""Notes requests to stop: a signal, or a file ``STOP`` in the run folder.

The batch loop asks for them between two denoising steps. Knows nothing of what is stopped.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from storymem_dist.dispatch.pace import Pace

STOP_FILES_VARIABLE = "STORYMEM_STOP_FILES"
"""Environment variable: files, separated by colons, whose appearance asks this job alone to stop."""

_SHORTEST_PAUSE = 0.05  # seconds between two looks of the thread


class StopSwitch:
    """Notes requests to stop.

    ``stop_files`` are checked at most once per ``file_seconds``, more rarely at the ``pace`` of many processes. A stop
    file that exists at the first check belongs to an earlier job: it counts only once it is touched again. With
    ``restarted``, this process continues the same job and such a file counts. ``own_files`` are for this job alone and
    always count; one may hold the name of the signal that a launcher received. Each call of ``reason`` calls
    ``on_ask``: a sign of progress.
    """

    def __init__(
        self,
        stop_files: Sequence[Path] = (),
        *,
        own_files: Sequence[Path] = (),
        restarted: bool = False,
        file_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
        on_ask: Callable[[], None] = lambda: None,
    ) -> None:
        self._files = (*stop_files, *own_files)
        self._file_seconds = file_seconds
        self._clock = clock
        self._pace = pace or Pace()
        self._on_ask = on_ask
        self._reason: str | None = None
        self._on_request: Callable[[], None] = lambda: None
        self._passed_on = False
        self._lock = threading.RLock()  # a signal may come while it is held
        self._next_look = -float("inf")
        self._own = dict.fromkeys(own_files)
        self._old: dict[Path, tuple[int, int] | None] | None = dict.fromkeys(self._files) if restarted else None

    def request(self, reason: str) -> None:
        """Ask for a stop. The first reason is kept."""
        self._reason = self._reason or reason

    def look_no_more(self) -> None:
        """Leave the files to another process, which is asked before this one."""
        self._files = ()

    def when_requested(self, note: Callable[[], None], pace: Pace | None = None) -> None:
        """Call ``note`` as soon as a stop is requested, from any thread. ``pace``: of looks at files from now on.

        Only while ``listening`` or when ``reason`` is asked. ``note`` must not raise.
        """
        with self._lock:
            self._on_request = note
            self._pace = pace or self._pace
            self._passed_on = False
        self._look()

    def start_watching(self) -> None:
        """Look at the stop files for the first time: those that exist now belong to an earlier job. May be repeated."""
        self.reason()

    def reason(self) -> str | None:
        """Return why to stop (``SIGTERM``, ``SIGINT``, ``STOP file``), or None to continue."""
        self._on_ask()
        self._look()
        return self._reason

    def _look(self) -> None:
        """Look at the files, if it is time, and pass a request on."""
        with self._lock:
            if self._reason is None and self._files and self._clock() >= self._next_look:
                self._next_look = self._clock() + self._pace.seconds(self._file_seconds, len(self._files))
                found = {path: _identity(path) for path in self._files}
                if self._old is None:
                    self._old = {**found, **self._own}
                new = [path for path in self._files if found[path] is not None and found[path] != self._old[path]]
                if new:
                    self.request(_signal_in(new[0]) if new[0] in self._own else "STOP file")
            if self._reason is not None and not self._passed_on:
                self._passed_on = True
                self._on_request()

    @contextmanager
    def listening(self) -> Iterator["StopSwitch"]:
        """Note the signals that ask a process to end while the body runs; a second SIGINT interrupts at once.

        SIGHUP, SIGUSR1 and SIGUSR2 that are ignored (``nohup``) stay ignored. A thread notes requests also while the
        main thread is in a long call outside Python. Main thread only.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self.request(signal.Signals(number).name)
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, note) for number in signals_that_stop()}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._keep_looking, args=(reader,), name="stop-switch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)  # ends the thread
            thread.join()
            os.close(reader)

    def _keep_looking(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], max(self._file_seconds, _SHORTEST_PAUSE))[0]:
                numbers = os.read(reader, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number in _STOPS:
                        self.request(signal.Signals(number).name)
            self._look()


_STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
_MAY_BE_IGNORED = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def signals_that_stop() -> list[signal.Signals]:
    """Return the signals that ask this process to stop, without those that it was started to ignore (``nohup``)."""
    return [
        number
        for number in sorted(_STOPS)
        if not (number in _MAY_BE_IGNORED and signal.getsignal(number) is signal.SIG_IGN)
    ]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _signal_in(path: Path) -> str:
    """The signal that a launcher names in its stop file: it received it for its ranks. Else ``STOP file``."""
    try:
        text = path.read_text()
        return signal.Signals[text.strip()].name
    except (OSError, ValueError, KeyError):
        return "STOP file"


def own_stop_files() -> list[Path]:
    """Return the files that ask this job alone to stop, as its launchers set them."""
    return [Path(path) for path in os.environ.get(STOP_FILES_VARIABLE, "").split(os.pathsep) if path]
