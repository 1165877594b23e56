"""Feeds Weights & Biases in a child process, from the event files, with one active feeder for each run folder.

``WandbProcess`` is the back end in the render's process: it only starts and ends the feeder, so no fault of W&B can
reach a render. The feeder reads files, so the events of all replicas, nodes and joined jobs reach the same W&B run.
Each job starts a feeder; one of them holds the folder's lock, the others wait and take over when it ends.

Started by hand, ``python -m storymem_dist.observe.wandb.process RUN`` feeds a run that has ended or was rendered
without network. Knows processes and locks; ``feed`` decides what is logged.
"""

import argparse
import contextlib
import json
import netrc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlparse

import storymem_dist.events as ev
from storymem_dist.errors import StoryMemError
from storymem_dist.files import hold_lock
from storymem_dist.observe.journal import JournalWriter, new_writer_id
from storymem_dist.observe.observers import Observers
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.resources import PACKAGE_FOLDER

GRACE_SECONDS = 20.0
"""Time that a feeder has, in addition to W&B's own, to read the last events and write the tables."""


def choose_mode(mode: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return ``online``, ``offline`` or ``off`` for the setting ``mode``.

    ``auto`` follows ``WANDB_MODE`` if that is set, else is online if an API key is found and offline if not.
    """
    if mode != "auto":
        return mode
    asked = environment.get("WANDB_MODE", "")
    if asked:
        return {"online": "online", "disabled": "off"}.get(asked, "offline")
    return "online" if has_api_key(environment) else "offline"


def has_api_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B finds an API key: in the environment, or in the netrc file for its server."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(environment.get("NETRC")).authenticators(host) is not None
    return False


class WandbProcess:
    """The back end in the rendering process: starts the feeder as a child process, and ends it.

    Events reach the feeder through the event files, so ``handle`` has nothing to do. A feeder that dies is reported
    once; the render continues.
    """

    name = "Weights & Biases"
    tick_seconds = 5.0

    def __init__(self, run_folder: Path, settings: WandbSettings) -> None:
        folder = run_folder / "wandb"
        folder.mkdir(exist_ok=True)
        self._log_file = folder / "feed.log"
        self._close_seconds = settings.finish_timeout_seconds + GRACE_SECONDS
        package_parent = str(PACKAGE_FOLDER.parent)
        path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", __spec__.name, str(run_folder)]
        command += ["--settings", json.dumps(asdict(settings)), "--follow", "--process-id", str(os.getpid())]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the render; the feeder ends when its standard input closes
            )

    def handle(self, stamped: ev.StampedEvent) -> None:
        """Do nothing: the feeder reads the event files."""

    def tick(self) -> None:
        """Raise ``RuntimeError`` when the feeder has died."""
        code = self._process.poll()
        if code:
            raise RuntimeError(f"its feeder ended with exit code {code}; see {self._log_file}")

    def close(self) -> None:
        """Let the feeder finish; kill it after its time limit. Raises as ``tick`` does."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(self._close_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.tick()


def feed(
    run_folder: Path, settings: WandbSettings, *, should_finish: threading.Event, process_id: int | None = None
) -> None:
    """Feed W&B until ``should_finish`` is set and everything in the event files is logged.

    Waits without using W&B while another feeder holds the folder's lock.

    Raises:
        RunFolderError: not a run folder.
    """
    RunFiles(run_folder)
    mode = choose_mode(settings.mode)
    if mode == "off":
        return
    os.environ.setdefault("WANDB_DATA_DIR", str(run_folder / "wandb" / "data"))
    Path(os.environ["WANDB_DATA_DIR"]).mkdir(parents=True, exist_ok=True)
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    lock_file = run_folder / "wandb" / "feed.lock"
    while (lock := hold_lock(lock_file)) is None:
        if should_finish.wait(settings.poll_interval_seconds):
            return
    from storymem_dist.observe.wandb.feed import WandbFeed  # takes a second; a waiting feeder does not need it

    feeder = WandbFeed(run_folder, settings, mode=mode, process_id=process_id)
    for warning in feeder.warnings:
        _warn(run_folder, warning)
    while not should_finish.wait(settings.poll_interval_seconds):
        feeder.poll()
    feeder.finish()
    lock.release()


def _warn(run_folder: Path, message: str) -> None:
    """Write a warning to the event files, which consoles and reports read."""
    writer = new_writer_id(0, suffix="wandb")
    with Observers(journal=JournalWriter(run_folder / "events", writer), writer=writer) as observers:
        observers.notify(ev.WarningIssued(message=message, source="observe.wandb"))


def _wait_for_end_of_input(finished: threading.Event) -> None:
    """Set ``finished`` when standard input ends: the parent closed it or has ended."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
    finished.set()


def main(arguments: list[str] | None = None) -> int:
    """Feed W&B from a run folder; by hand for a finished run, or as the child process of a render (``--follow``)."""
    parser = argparse.ArgumentParser(prog="python -m storymem_dist.observe.wandb.process", description=main.__doc__)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON object of tracking.wandb settings")
    parser.add_argument("--follow", action="store_true", help="continue until standard input ends")
    parser.add_argument("--process-id", type=int, help="process whose system metrics are recorded")
    given = parser.parse_args(arguments)
    finished = threading.Event()
    if given.follow:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the render's last events after a SIGTERM must be logged too
        os.nice(10)
        threading.Thread(target=_wait_for_end_of_input, args=(finished,), daemon=True).start()
    else:
        finished.set()
    try:
        feed(given.run_folder, WandbSettings(**given.settings), should_finish=finished, process_id=given.process_id)
    except StoryMemError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
