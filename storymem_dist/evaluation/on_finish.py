"""``evaluation=on_finish``: the last replica to end scores the run, in a process of its own.

It begins after this replica's last shot is committed and its weights are gone, and only where no other process works on
the run folder. Whatever happens in it, the render's exit code stays: a failure is a warning.
"""

import gc
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.evaluation.cache import CACHE_FOLDER
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.events import WarningIssued
from storymem_dist.files import hold_lock
from storymem_dist.observe.journal import JournalWriter, new_writer_id
from storymem_dist.observe.observers import Observers
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.resources import PACKAGE_FOLDER
from storymem_dist.terminal.streams import print_error

_LOCK = "on_finish.lock"
_LAST_WORDS_BYTES = 2000


def score_finished_run(root: Path, settings: EvaluationSettings, tracking: TrackingSettings) -> bool:
    """Score the run folder at ``root`` if no other process works on it; return whether it was scored. Never raises.

    Call it once this process holds nothing of the run: no lease, no weights.
    """
    try:
        if settings.mode != "on_finish" or not is_last(root):
            return False
        (root / CACHE_FOLDER).mkdir(parents=True, exist_ok=True)
        if (lock := hold_lock(root / CACHE_FOLDER / _LOCK)) is None:  # two replicas were the last to go
            return False
        try:
            problem = _in_own_process(root, settings, tracking)
        finally:
            lock.release()
    except Exception as error:  # the run is rendered: whatever scoring raises is a warning
        problem = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        problem = "it was interrupted"
    if problem:
        _warn(root, f"the run was rendered but not scored: {problem}; storymem-score scores it")
    return not problem


def is_last(root: Path) -> bool:
    """Whether no other process works on the run folder: each has a heartbeat there until it ends or is known dead."""
    run = RunFolder(root)
    leases = LeaseFolder(folder=run.leases_folder, owner=Owner.this_process(), lease_seconds=math.inf)
    leases.mark_dead_owners()
    return leases.is_alone()


def _in_own_process(root: Path, settings: EvaluationSettings, tracking: TrackingSettings) -> str | None:
    """Run ``finished_run`` as a process; return why it failed, or None."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    job = {
        "root": str(root.absolute()),
        "settings": asdict(settings),
        "report": tracking.report,
        "wandb": "off" if tracking.wandb.mode == "off" else "auto",
        "launcher": os.getpid(),
    }
    path = os.pathsep.join(filter(None, (str(PACKAGE_FOLDER.parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "storymem_dist.evaluation.finished_run", json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        _, said = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode == 0:
        return None
    lines = [line.strip() for line in said.decode(errors="replace")[-_LAST_WORDS_BYTES:].splitlines() if line.strip()]
    how = f"exit code {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    return lines[-1] if lines else how


def _warn(root: Path, message: str) -> None:
    """Say it on standard error, and to the event files, which reports read."""
    print_error(f"storymem: {message}")
    try:
        writer = new_writer_id(0, suffix="score")
        with Observers(journal=JournalWriter(root / "events", writer), writer=writer) as observers:
            observers.notify(WarningIssued(message=message, source="evaluation"))
    except OSError:
        pass  # it is said above
