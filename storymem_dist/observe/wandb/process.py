"""Feeds Weights & Biases in a child process, from the event files, with one active feeder for each run folder.

``WandbProcess`` is the back end in the render's process: it only starts and ends the feeder, so no fault of W&B can
reach a render. The feeder reads files, so the events of all replicas, nodes and joined jobs reach the same W&B run.
Each job starts a feeder; one of them holds the folder's lock, the others wait and take over when it ends.

``storymem-report RUN --wandb online`` feeds a whole run by hand, whether it was rendered without network or its upload
broke off. Knows processes and locks; ``feed`` decides what is logged.
"""

import contextlib
import json
import netrc
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from urllib.parse import urlparse

import storymem_dist.events as ev
from storymem_dist.errors import RunFolderError, StoryMemError
from storymem_dist.files import create_file, hold_lock
from storymem_dist.observe.journal import JournalWriter, new_writer_id
from storymem_dist.observe.observers import Observers
from storymem_dist.observe.run.files import RunFiles, parse_config
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.folder import load_progress, offline_runs, own_folder
from storymem_dist.observe.wandb.limits import check_with_package
from storymem_dist.resources import PACKAGE_FOLDER
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.streams import print_error
from storymem_dist.terminal.text import printable

GRACE_SECONDS = 20.0
"""Time that a feeder has, in addition to W&B's own, to read the last events and write the tables."""

SILENT_SECONDS = 3.0
"""The end of a job waits this long for its feeder without a word."""

_LOG_END_BYTES = 4096


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


def check_settings(settings: WandbSettings) -> None:
    """Raise ``ConfigError`` where W&B would refuse the settings or its environment variables, unless it is off.

    Only the first rank asks the installed package, which takes a second.
    """
    if choose_mode(settings.mode) != "off" and os.environ.get("RANK", "0") == "0":
        check_with_package(settings.names())


class WandbProcess:
    """The back end in the rendering process: starts the feeder as a child process, and ends it.

    Events reach the feeder through the event files, so ``handle`` has nothing to do. A feeder that dies is reported
    once; the render continues. Raises ``OSError`` when the feeder cannot be started.
    """

    name = "Weights & Biases"
    tick_seconds = 5.0

    def __init__(self, run_folder: Path, settings: WandbSettings) -> None:
        self._run_folder = run_folder
        self._log_file = own_folder(run_folder) / f"feed-{new_writer_id(0)}.log"
        self._close_seconds = settings.finish_timeout_seconds + GRACE_SECONDS
        package_parent = str(PACKAGE_FOLDER.parent)
        path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", __spec__.name, str(run_folder)]
        command += ["--settings", json.dumps(asdict(settings)), "--follow", "--process-id", str(os.getpid())]
        with os.fdopen(create_file(self._log_file), "ab") as log:
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
        """Raise ``RuntimeError`` when the feeder has died: why, and what to do."""
        code = self._process.poll()
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            raise RuntimeError(
                f"its feeder ended ({how}): {self._last_words()} (log: {self._log_file}). All events are in the run "
                f"folder; send them with: {feed_command(self._run_folder)}"
            )

    def close(self) -> None:
        """Let the feeder finish, and say so if that takes longer; kill it after its time limit. Raises as ``tick``."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(min(SILENT_SECONDS, self._close_seconds))
        except subprocess.TimeoutExpired:
            self._wait_aloud(self._close_seconds - SILENT_SECONDS)
        self.tick()
        with contextlib.suppress(OSError):
            if self._log_file.stat().st_size == 0:
                self._log_file.unlink()
        if offline := offline_runs(self._run_folder):
            where = shlex.quote(str(self._run_folder / "wandb" / offline[-1]))
            print_error(f"storymem: Weights & Biases: the run is kept offline; upload it with: wandb sync {where}")

    def _wait_aloud(self, seconds: float) -> None:
        print_error(
            f"storymem: waiting for Weights & Biases to take the last values and videos, for at most {seconds:.0f} s "
            "(tracking.wandb.finish_timeout_seconds). The render is done and nothing is lost: what is not uploaded by "
            f"then is sent by: {feed_command(self._run_folder)}"
        )
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        """The last line of the feeder's log."""
        try:
            with self._log_file.open("rb") as log:
                log.seek(max(0, self._log_file.stat().st_size - _LOG_END_BYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            lines = []
        return next((printable(line.strip())[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def feed_command(run_folder: Path) -> str:
    """Return the command that feeds a run folder to W&B's server."""
    return f"storymem-report {shlex.quote(str(run_folder))} --wandb online"


def feed(
    run_folder: Path,
    settings: WandbSettings,
    *,
    should_finish: threading.Event,
    process_id: int | None = None,
    by_hand: bool = False,
) -> str:
    """Feed W&B until ``should_finish`` is set and everything in the event files is logged; return a line about it.

    Waits without using W&B while another feeder holds the folder's lock; empty if it does so until the end.
    ``by_hand``, feeds the whole run anew, and does not wait.

    Raises:
        RunFolderError: not a run folder, or something in it leads out of it. By hand, also when another feeder holds
            the lock, or when an online run was kept offline.
    """
    RunFiles(run_folder)
    mode = choose_mode(settings.mode)
    if mode == "off":
        return "Weights & Biases is off (tracking.wandb.mode=off or WANDB_MODE)"
    os.environ.pop("WANDB_SERVICE", None)  # a service of another process cannot be ended when its server is away
    try:
        folder = own_folder(run_folder)
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "data"))
        Path(os.environ["WANDB_DATA_DIR"]).mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        while (lock := hold_lock(folder / "feed.lock")) is None:
            if by_hand:
                raise RunFolderError(f"{run_folder} is being fed to Weights & Biases by another process")
            if should_finish.wait(settings.poll_interval_seconds):
                return ""
    except OSError as error:
        raise RunFolderError(f"{run_folder} cannot be fed to Weights & Biases: {error}") from error
    from storymem_dist.observe.wandb.feed import WandbFeed  # takes a second; a waiting feeder does not need it

    feeder = WandbFeed(run_folder, settings, mode=mode, process_id=process_id, anew=by_hand)
    num_warned = _warn_of(run_folder, feeder.warnings, 0)
    while not should_finish.wait(settings.poll_interval_seconds):
        feeder.poll()
        num_warned = _warn_of(run_folder, feeder.warnings, num_warned)
    feeder.finish()
    _warn_of(run_folder, feeder.warnings, num_warned)
    lock.release()
    if feeder.mode == "online":
        return f"Weights & Biases has the run: {feeder.address}"
    kept = f"upload it with: wandb sync {shlex.quote(str(run_folder / 'wandb' / feeder.folder_name))}"
    if by_hand and mode == "online":
        raise RunFolderError(f"{'; '.join(feeder.warnings)}; {kept}")
    return f"the run is kept offline; {kept}"


def feed_by_hand(run_folder: Path, mode: str) -> str:
    """Feed the whole run again, ``online`` or ``offline``, with the tracking settings in it; return a line about it.

    Raises ``RunFolderError`` when the folder or its settings cannot be used, a feeder is at work there, or the server
    did not take it; ``ConfigError`` where an environment variable of W&B is not accepted.
    """
    return _feed_once(run_folder, mode, by_hand=True)


def feed_again(run_folder: Path, mode: str = "auto") -> str:
    """Feed what is new, scores among it, to the run that the folder was fed to before; return a line about it.

    ``mode``: ``auto`` is the mode it was fed in; where it never was, nothing is fed and the line is empty. Raises as
    ``feed_by_hand``.
    """
    if mode == "auto":
        target = load_progress(run_folder, ()).target
        mode = target[0] if target and target[0] in ("online", "offline") else "off"
    return "" if mode == "off" else _feed_once(run_folder, mode, by_hand=False)


def _feed_once(run_folder: Path, mode: str, *, by_hand: bool) -> str:
    tracking = parse_config(RunFiles(run_folder).newest_config()[1]).get("tracking")
    given = tracking.get("wandb") if isinstance(tracking, dict) else None
    kept = {f.name: given[f.name] for f in fields(WandbSettings) if isinstance(given, dict) and f.name in given}
    try:
        settings = WandbSettings(**{**kept, "mode": mode})
    except (StoryMemError, TypeError, ValueError) as error:
        raise RunFolderError(f"{run_folder}: its tracking settings cannot be used: {error}") from None
    check_with_package(settings.names())
    finished = threading.Event()
    finished.set()
    try:
        return feed(run_folder, settings, should_finish=finished, by_hand=by_hand)
    except OSError as error:
        raise RunFolderError(f"{run_folder} cannot be fed to Weights & Biases: {error}") from error


def _warn_of(run_folder: Path, warnings: list[str], num_warned: int) -> int:
    """Write the warnings after the first ``num_warned`` to the event files; return their number."""
    for warning in warnings[num_warned:]:
        _warn(run_folder, warning)
    return len(warnings)


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
    with program("storymem-feed"):
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    parser = Parser(prog="python -m storymem_dist.observe.wandb.process", description=main.__doc__)
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
        feed(
            given.run_folder,
            WandbSettings(**given.settings),
            should_finish=finished,
            process_id=given.process_id,
            by_hand=not given.follow,
        )
    except StoryMemError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
