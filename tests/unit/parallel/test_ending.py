"""After an error on NCCL, no group is destroyed, and timers that need no Python end the process."""

import faulthandler
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from storymem_dist.parallel import ending
from storymem_dist.parallel.ending import end_within, ending_after_error
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.mesh import lone_mesh
from storymem_dist.parallel.session import Session, Team
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.watch import Watch


def a_session(backend: str, num_ranks: int = 2) -> Session:
    """One of several replicas of one rank: it has no peers, but a default group."""
    return Session(
        rank=0,
        local_rank=0,
        layout=Layout(replica=num_ranks),
        device=torch.device("cpu"),
        backend=backend,
        mesh=lone_mesh(),
        team=Team(),
        readers=Team(),
        readers_group=None,
        owns_default_group=True,
    )


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to groups and timers, in order."""
    happened: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_, **__: happened.append(what)

    monkeypatch.setattr(ending, "_ends", False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", note("destroyed"))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", note("timer"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", note("timer off"))
    monkeypatch.setattr(signal, "setitimer", note("alarm"))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # pytest's own time-out has the alarm
    return happened


@pytest.mark.parametrize(
    ("backend", "num_ranks", "expected"),
    [("nccl", 2, []), ("nccl", 1, []), ("gloo", 2, ["destroyed"])],
)
def test_groups_of_nccl_are_not_destroyed_after_an_error(
    order: list[str], backend: str, num_ranks: int, expected: list[str]
) -> None:
    with pytest.raises(ValueError, match="broken"), a_session(backend, num_ranks):
        raise ValueError("broken")
    assert order == expected


def test_groups_are_destroyed_when_all_went_well(order: list[str]) -> None:
    with a_session("nccl"):
        pass
    assert order == ["destroyed"]


@pytest.mark.parametrize(
    ("backend", "num_ranks", "stall_seconds", "expected"),
    [
        ("nccl", 2, 1800.0, ["timer off", "timer", "alarm"]),
        ("gloo", 2, 1800.0, ["timer off", "destroyed"]),
        ("nccl", 1, 1800.0, ["timer off"]),
        ("nccl", 2, None, ["timer off"]),  # no limits, for a debugger
    ],
)
def test_the_watch_leaves_timers_that_the_end_of_the_session_does_not_stop(
    order: list[str], backend: str, num_ranks: int, stall_seconds: float | None, expected: list[str]
) -> None:
    activity = SimpleNamespace(number=0, num_signs=0, where="a step", is_slow=False)
    settings = ParallelSettings(stall_timeout_seconds=stall_seconds)
    started = replace(a_session(backend, num_ranks), limits_its_end=stall_seconds is not None)
    watching = Watch(started, settings, look=lambda: activity, tell=print)
    with pytest.raises(ValueError, match="broken"), started, watching:
        order.clear()  # the timer of the watch itself
        raise ValueError("broken")
    assert order == expected


def test_a_mistake_before_the_watch_opens_is_covered_as_well(order: list[str]) -> None:
    for may_hang, expected in ((False, []), (True, ["timer", "alarm"])):
        with pytest.raises(KeyboardInterrupt), ending_after_error(may_hang=may_hang):
            raise KeyboardInterrupt
        assert order == expected
    order.clear()
    with ending_after_error(may_hang=True):
        assert order == ["timer off", "alarm"], "a process that goes on is not ended in the middle of its next job"
    with ending_after_error(may_hang=True):
        pass
    assert order == ["timer off", "alarm"]


HANGS = {
    "in Python": ("", "import time; time.sleep(60)", 1),
    "in C code that holds the interpreter": ("", "import ctypes; ctypes.PyDLL(None).sleep(60)", 1),
    "after the interpreter's end": (
        "import ctypes; libc = ctypes.CDLL(None); libc.on_exit(ctypes.cast(libc.pause, ctypes.c_void_p), None)",
        "pass",
        -signal.SIGALRM,
    ),
}


@pytest.mark.parametrize("where", HANGS)
def test_a_process_that_hangs_is_ended_wherever_it_hangs(where: str) -> None:
    before, hang, expected = HANGS[where]
    code = f"""
import storymem_dist.parallel.ending as ending
{before}
ending._ALARM_SECONDS = 0.5
ending.end_within(1.0)
{hang}
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == expected, done.stderr
    assert time.monotonic() - began < 30
    if expected == 1:
        assert "Timeout" in done.stderr and "File" in done.stderr


def test_somebody_elses_alarm_is_left_alone(monkeypatch: pytest.MonkeyPatch, order: list[str]) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: print)
    end_within(5.0)
    assert order == ["timer"]
