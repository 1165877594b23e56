"""Timers that end this process if it does not end by itself. They need no Python code to run, and know no ranks."""

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_END_SECONDS = 120.0  # for what follows an error: reports, uploads, the interpreter's end
_ALARM_SECONDS = 5.0  # between the timer that prints the stack and the one of the system

_ends = False  # of this process, which has one timer of each kind: whether ``end_within`` has set them


def end_within(seconds: float = _END_SECONDS) -> None:
    """Let this process end after ``seconds`` if it is still there, whatever holds it. A later call starts anew.

    faulthandler's timer prints where it hangs (exit code 1), but the interpreter's end stops it; the system's alarm
    (SIGALRM) outlives that.
    """
    global _ends
    _ends = True
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_SECONDS)


def live_on() -> None:
    """Take back ``end_within``: this process got over an error, and begins another job. Leaves other alarms alone."""
    global _ends
    if not _ends:
        return
    _ends = False
    faulthandler.cancel_dump_traceback_later()
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def ending_after_error(*, may_hang: bool) -> Iterator[None]:
    """If the body raises and the rest of this process ``may_hang``, let it end within two minutes all the same.

    A process that begins another body is not ended for the error of an earlier one.
    """
    live_on()
    try:
        yield
    except BaseException:
        if may_hang:
            end_within()
        raise
