"""Ends a rank whose launcher is gone, so that it does not keep its GPU.

A launcher that is killed cannot stop its ranks. On Linux the kernel sends SIGTERM to each of them; everywhere, a thread
looks for the launcher. SIGTERM stops a rank after its running step, as a preemption does; one that still runs a minute
later ends at once. Knows processes; nothing of what a rank does.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from storymem_dist.hardware import process_start
from storymem_dist.terminal.streams import print_error

GRACE_SECONDS = 60.0
"""How long a rank may take to stop once its launcher is gone."""

_LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_launcher(launcher: int | None = None) -> None:
    """Stop this process when its launcher is gone. Call it once, early, in a rank that a launcher started.

    ``launcher`` is the launcher's process id where it is known; else the parent process. The kernel's signal comes when
    the *thread* ends that started this process: torch's agent starts ranks in its main thread.
    """
    launcher = launcher or os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    threading.Thread(target=_watch, args=(_is_gone(launcher), launcher), name="launcher-watch", daemon=True).start()


def started_by_torch() -> bool:
    """Whether torch's agent started this process (torchrun, ``accelerate launch``, ``launch=torchrun``)."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def _is_gone(launcher: int) -> Callable[[], bool]:
    """Return a function that says whether the launcher has ended. It may have ended before this call."""
    if os.getppid() == launcher:
        return lambda: os.getppid() != launcher
    start = process_start(launcher)  # a program stands between them; None: it has ended, or there is no /proc
    return lambda: start is None or process_start(launcher) != start


def _watch(is_gone: Callable[[], bool], launcher: int) -> None:
    while not is_gone():
        time.sleep(_LOOK_SECONDS)
    print_error(f"storymem-render: the launcher (process {launcher}) is gone; this rank stops")
    os.kill(os.getpid(), signal.SIGTERM)  # again, where the kernel has sent it
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)
