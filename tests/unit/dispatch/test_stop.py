import os
import signal
from pathlib import Path

import pytest

from storymem_dist.dispatch.stop import StopSwitch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def test_a_stop_file_that_appears_stops_and_the_first_reason_stays(tmp_path: Path) -> None:
    stop = StopSwitch([tmp_path / "a" / "STOP", tmp_path / "STOP"], clock=Clock())
    assert stop.reason() is None
    (tmp_path / "STOP").touch()
    assert stop.reason() == "STOP file"
    stop.request("SIGTERM")
    assert stop.reason() == "STOP file"


def test_a_stop_file_of_an_earlier_job_counts_only_when_it_is_touched_again(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    path.touch()
    os.utime(path, (1, 1))
    stop = StopSwitch([path], clock=Clock())
    assert stop.reason() is None and stop.reason() is None
    path.touch()
    assert stop.reason() == "STOP file"


def test_a_stop_file_counts_for_a_restarted_process_of_the_same_job(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert StopSwitch([tmp_path / "STOP"], restarted=True, clock=Clock()).reason() == "STOP file"


def test_files_are_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    now = [0.0]
    stop = StopSwitch([tmp_path / "STOP"], file_seconds=1.0, clock=lambda: now[0])
    stop.reason()
    (tmp_path / "STOP").touch()
    now[0] = 0.9
    assert stop.reason() is None
    now[0] = 1.1
    assert stop.reason() == "STOP file"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSwitch().listening() as stop:
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        assert stop.reason() == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once() -> None:
    with StopSwitch().listening() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
