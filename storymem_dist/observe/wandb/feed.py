"""Feeds one Weights & Biases run from the event files of one run folder.

Only this module and ``media`` import wandb.

Everything logged is a function of the events so far: axes count events, not calls. Online, a restarted feed folds the
events that it has logged before (up to the position in ``wandb/feed.json``) and continues after them, with the same run
id. Offline it logs the whole run again into a new folder, because ``wandb sync`` takes one folder for one run; those of
earlier feeds are moved to ``wandb/superseded``.

Series and their axes: ``step/*`` over ``step/done`` (finished denoising steps of the run), ``shot/*`` over
``shot/done``, ``replica_N/*`` over ``replica_N/steps_done``, and ``run/*``, ``system/*``, ``weights/*`` and
``throughput/*`` over ``run/elapsed_seconds``. Tables: ``memory_frames``, ``failures``, ``requests``, ``story/ID``.

Knows W&B and the events; ``process`` decides when and where it runs, ``media`` makes tables and pictures.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import wandb

import storymem_dist.events as ev
from storymem_dist.artifacts.scores import read_scores
from storymem_dist.observe.journal import JournalTail
from storymem_dist.observe.run.files import RunFiles, parse_config
from storymem_dist.observe.run.rates import rates
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import Attempt
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.folder import Progress, load_progress, save_progress, supersede_offline_runs
from storymem_dist.observe.wandb.limits import fitting, key_part
from storymem_dist.observe.wandb.media import Media

TABLE_GROWTH = 1.5
"""The memory table is logged again when it has grown by this factor: the total work stays linear in its size."""

FIRST_TABLE_ROWS = 20

_LONGEST_ALERT = 1000


class WandbFeed:
    """Feeds one W&B run from one run folder.

    ``mode`` is ``online`` or ``offline``; an online run that cannot be opened is kept offline (see ``warnings``, which
    may grow). ``anew``: log everything, also what an earlier feed has logged; W&B ignores rows that it has.
    ``process_id`` is the process whose CPU and GPU use W&B's own system metrics show. ``poll`` logs new events and
    returns their number; ``finish`` logs the tables and the summary and ends the run. Raises ``RunFolderError`` when
    the folder is not a run folder.
    """

    def __init__(
        self,
        run_folder: Path,
        settings: WandbSettings,
        *,
        mode: str,
        process_id: int | None = None,
        anew: bool = False,
    ) -> None:
        self._run_folder = run_folder
        self._files = RunFiles(run_folder)
        self._settings = settings
        self._tail = JournalTail(run_folder / "events")
        self._state = RunState()
        self._steps_done = 0
        self._steps_of: dict[str, int] = {}
        self._shots_done = 0
        self._stories_done = 0
        self._num_refused = 0
        self._decisions: list[tuple[float, ev.MemoryDecided]] = []
        self._rows_in_last_table = 0
        self._rates_cost = (0.0, 0.0)
        self._defined_replicas: set[str] = set()
        self.warnings: list[str] = []
        self.mode = mode
        progress = load_progress(run_folder, self._target)
        self._run = self._open_run(process_id)
        if anew or self.mode != "online" or list(progress.target) != self._target:
            progress = Progress()
        else:
            progress.row = max(progress.row, self._run.step)
        supersede_offline_runs(run_folder, but=self.folder_name)
        progress.target = self._target
        self._progress = progress
        self._media = Media(run_folder, settings, self._state, progress.videos)
        self._define_axes()
        wandb.Table.MAX_ROWS = wandb.Table.MAX_ARTIFACT_ROWS

    # -- the run -------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where the server shows the run; its project while that is not known."""
        return str(self._run.url or self._settings.project)

    @property
    def folder_name(self) -> str:
        """Name of the run's folder in ``RUN/wandb``."""
        return Path(self._run.dir).parent.name

    @property
    def _target(self) -> list[str]:
        """What the logged rows belong to: mode, server, entity and project."""
        server = os.environ.get("WANDB_BASE_URL", "")
        return [self.mode, server, self._settings.entity or "", self._settings.project]

    def _open_run(self, process_id: int | None) -> Any:
        if self.mode != "online":
            return self._init("offline", process_id)
        try:
            return self._init("online", process_id)
        except Exception as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.warnings.append(f"Weights & Biases cannot be reached, the run is kept offline: {first_line}")
            wandb.teardown()
            self.mode = "offline"
            return self._init("offline", process_id)

    def _init(self, mode: Literal["online", "offline"], process_id: int | None) -> Any:
        settings = self._settings
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=settings.name or fitting(self._run_folder.resolve().name),
            notes=settings.notes,
            tags=settings.tags or None,
            id=re.sub(r"[^A-Za-z0-9_-]", "-", key_part(self._files.run_id)),
            resume="allow",
            mode=mode,
            dir=str(self._run_folder),
            config=self._config(),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=settings.init_timeout_seconds,
                finish_timeout=settings.finish_timeout_seconds,
                x_stats_pid=process_id or os.getpid(),
                save_code=False,
                disable_job_creation=True,
            ),
        )

    def _config(self) -> dict[str, Any]:
        """The newest resolved configuration of the run folder; it exists when the first shot begins."""
        self._config_hash, text = self._files.newest_config()
        here = ev.json_ready({"run_folder": str(self._run_folder), "config_hash": self._config_hash})
        return {**parse_config(text), **here}

    def _define_axes(self) -> None:
        for axis, series in (
            ("step/done", ("step/*",)),
            ("shot/done", ("shot/*",)),
            ("story/done", ("story/*",)),
            ("run/elapsed_seconds", ("run/*", "system/*", "weights/*", "throughput/*")),
        ):
            self._run.define_metric(axis)
            for name in series:
                self._run.define_metric(name, step_metric=axis)

    def _log(self, values: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in values.items() if value is not None}, step=self._progress.row)
        self._progress.row += 1

    # -- events --------------------------------------------------------------------------------------------------------

    def poll(self, *, to_the_end: bool = False) -> int:
        """Log new events of the event files, with ``to_the_end`` all of them; returns their number."""
        num_new = 0
        for stamped in self._tail.follow():
            num_new += self._take(stamped)
        while events := self._tail.poll() if to_the_end else ():
            for stamped in events:
                num_new += self._take(stamped)
        if num_new:
            if self._files.newest_config()[0] != self._config_hash:
                self._run.config.update(self._config(), allow_val_change=True)
            grown = len(self._decisions) >= max(FIRST_TABLE_ROWS, TABLE_GROWTH * self._rows_in_last_table)
            if grown:
                self._log_memory_table()
            save_progress(self._run_folder, self._progress)
        return num_new

    def _take(self, stamped: ev.StampedEvent) -> bool:
        event = stamped.event
        self._state.apply(stamped)
        replica = f"replica_{stamped.replica}"
        if isinstance(event, ev.StepFinished):
            self._steps_done += 1
            self._steps_of[replica] = self._steps_of.get(replica, 0) + 1
        elif isinstance(event, ev.ShotFinished):
            self._shots_done += 1
        elif isinstance(event, ev.StoryFinished):
            self._stories_done += 1
        elif isinstance(event, ev.MemoryDecided):
            self._decisions.append((stamped.wall_time, event))
        if stamped.sequence <= self._progress.logged.get(stamped.writer, -1):
            return False
        try:
            self._log_event(stamped, replica)
        except (ValueError, TypeError, OSError, wandb.Error) as error:  # one row must not end all others
            if not self._num_refused:
                what = f"{type(event).__name__}: {type(error).__name__}: {error}"
                self.warnings.append(f"Weights & Biases refuses a row, which is left out: {what[:300]}")
            self._num_refused += 1
        self._progress.logged[stamped.writer] = stamped.sequence
        return True

    def _log_event(self, stamped: ev.StampedEvent, replica: str) -> None:
        event = stamped.event
        elapsed = stamped.wall_time - (self._state.first_time or stamped.wall_time)
        match event:
            case ev.JobStarted():
                self._job_started(event)
            case ev.LayoutChosen():
                self._run.config.update({"chosen": ev.event_to_dict(event)}, allow_val_change=True)
            case ev.StepFinished():
                self._log(self._step_values(event, stamped, replica))
            case ev.ShotFinished():
                self._log(self._shot_values(event, replica))
                self._log(self._run_values(elapsed))
            case ev.StoryFinished():
                self._log_story(event)
            case ev.ShotFailed() | ev.StoryboardRejected():
                self._log({"run/elapsed_seconds": elapsed, "run/failures": len(self._state.failures)})
            case ev.RequestApplied():
                self._request_applied(event, elapsed)
            case ev.WeightsProgress():
                key = key_part(re.sub(r"[^A-Za-z0-9_]+", "_", event.what))
                rate = event.bytes_done / event.elapsed_seconds / 1e9 if event.elapsed_seconds > 0 else None
                self._log(
                    {
                        "run/elapsed_seconds": elapsed,
                        f"weights/{replica}/{key}_gb": event.bytes_done / 1e9,
                        f"weights/{replica}/gb_per_second": rate,
                    }
                )
            case ev.ThroughputSampled() | ev.SystemSampled() | ev.ReplicaWaited():
                self._log({"run/elapsed_seconds": elapsed, **self._sample_values(event, replica)})

    def _request_applied(self, event: ev.RequestApplied, elapsed: float) -> None:
        request = self._state.requests[event.number]
        if event.at_start or len(request.applied) > 1:  # each replica reports it
            return
        values = {"run/requests": len(self._state.requests), "run/request_seconds": request.seconds_to_effect}
        self._log({"run/elapsed_seconds": elapsed, **values})
        if event.action == "stop" and self.mode == "online":
            self._run.alert("A stop was requested", f"by {event.who}: {event.message}"[:_LONGEST_ALERT])

    def _job_started(self, event: ev.JobStarted) -> None:
        values: dict[str, Any] = {"versions": dict(event.versions), "device": event.device, "layout": event.layout}
        values |= {"job": event.job, "num_replicas": event.num_replicas, "num_devices_per_replica": event.num_devices}
        self._run.config.update(values, allow_val_change=True)

    def _step_values(self, event: ev.StepFinished, stamped: ev.StampedEvent, replica: str) -> dict[str, Any]:
        axis = f"{replica}/steps_done"
        if axis not in self._defined_replicas:
            self._run.define_metric(axis)
            self._run.define_metric(f"{replica}/*", step_metric=axis)
            self._defined_replicas.add(axis)
        attempt = self._attempt_of(event.story_id, event.shot_id)
        tokens = attempt.started.num_tokens if attempt is not None else None
        return {
            "step/done": self._steps_done,
            "step/seconds": event.elapsed_seconds,
            "step/step": event.step,
            "step/timestep": event.timestep,
            "step/expert": event.expert,
            "step/shot": f"{event.story_id}/{event.shot_id}",
            "step/replica": stamped.replica,
            "step/gpu_memory_gib": event.gpu_memory_gib,
            "step/reused": int(event.reused),
            "step/tokens_per_second": tokens / event.elapsed_seconds if tokens and event.elapsed_seconds > 0 else None,
            axis: self._steps_of[replica],
            f"{replica}/seconds_per_step": event.elapsed_seconds,
        }

    def _shot_values(self, event: ev.ShotFinished, replica: str) -> dict[str, Any]:
        attempt = self._attempt_of(event.story_id, event.shot_id)
        values: dict[str, Any] = {
            "shot/done": self._shots_done,
            "shot/name": f"{event.story_id}/{event.shot_id}",
            "shot/replica": replica,
            "shot/seconds": event.elapsed_seconds,
            "shot/num_kept": len(event.keyframes),
        }
        values |= {f"shot/stage_seconds/{key_part(stage)}": seconds for stage, seconds in event.stage_seconds.items()}
        caption = f"{event.story_id}/{event.shot_id}"
        if attempt is not None:
            values |= {
                "shot/mode": attempt.started.mode,
                "shot/seed": attempt.started.seed,
                "shot/num_memory": attempt.started.num_memory,
                "shot/seconds_per_step": attempt.seconds_per_step,
                "shot/reused_steps": attempt.num_reused_steps,
            }
            if attempt.num_timed_steps:
                values["shot/reuse_ratio"] = attempt.num_reused_steps / attempt.num_timed_steps
            for verdict in ev.MEMORY_VERDICTS:
                values[f"shot/memory/{verdict}"] = sum(d.verdict == verdict for d in attempt.decisions)
            caption += f" · {attempt.started.mode} · seed {attempt.started.seed} · {attempt.started.prompt}"
        values["shot/video"] = self._media.video("shot", self._settings.num_shot_videos, event.clip, caption)
        return values

    def _run_values(self, elapsed: float) -> dict[str, Any]:
        """Figures over the whole run; skipped while computing them would take more than a twentieth of the time."""
        last, cost = self._rates_cost
        began = time.monotonic()
        values: dict[str, Any] = {"run/elapsed_seconds": elapsed}
        if began - last < 20 * cost:
            return values
        speed = rates(self._state)
        values |= {
            "run/shots_finished": self._state.count("finished"),
            "run/clips_per_gpu_hour": speed.clips_per_gpu_hour,
            "run/seconds_per_step": speed.seconds_per_step,
            "run/tokens_per_second": speed.tokens_per_second,
            "run/flop_utilisation": speed.flop_utilisation,
            "run/reuse_ratio": speed.reuse_ratio,
            "run/wait_ratio": speed.wait_ratio,
        }
        self._rates_cost = (time.monotonic(), time.monotonic() - began)
        return values

    @staticmethod
    def _sample_values(
        event: ev.ThroughputSampled | ev.SystemSampled | ev.ReplicaWaited, replica: str
    ) -> dict[str, float | int | None]:
        if isinstance(event, ev.ReplicaWaited):
            return {f"throughput/{replica}/waited_seconds": event.elapsed_seconds}
        values = {key: value for key, value in ev.event_to_dict(event).items() if isinstance(value, int | float)}
        if isinstance(event, ev.SystemSampled):
            values.pop("rank")
            return {f"system/{key_part(event.host)}/rank_{event.rank}/{key}": value for key, value in values.items()}
        return {f"throughput/{replica}/{key}": value for key, value in values.items()}

    def _attempt_of(self, story_id: str, shot_id: str) -> Attempt | None:
        story = self._state.stories.get(story_id)
        shot = story.shots.get(shot_id) if story is not None else None
        return shot.last if shot is not None else None

    def _log_memory_table(self) -> None:
        self._log({"memory_frames": self._media.memory_table(self._decisions)})
        self._rows_in_last_table = len(self._decisions)

    def _log_story(self, event: ev.StoryFinished) -> None:
        story = self._state.stories[event.story_id]
        values: dict[str, Any] = {
            "story/done": self._stories_done,
            f"story/{key_part(event.story_id)}": self._media.story_table(story),
        }
        caption = f"{event.story_id} · {story.name}"
        values["story/video"] = self._media.video("story", self._settings.num_story_videos, event.video, caption)
        self._log(values)

    def _scores(self) -> Mapping[str, float]:
        """What the run was scored, by measure; nothing where it was not, or where its scores cannot be read."""
        try:
            scores = read_scores(self._run_folder)
        except (OSError, ValueError):
            return {}
        return scores.values if scores is not None else {}

    def finish(self) -> None:
        """Log what is only known at the end, and end the W&B run (uploads may take the configured time)."""
        self.poll(to_the_end=True)
        if len(self._decisions) > self._rows_in_last_table:
            self._log_memory_table()
        for story in self._state.stories.values():
            if story.outcome == "" and story.shots:
                table = self._media.story_table(story)
                self._log({"story/done": self._stories_done, f"story/{key_part(story.story_id)}": table})
        if self._state.failures:
            self._log({"failures": self._media.failure_table(self._state.failures)})
        if self._state.requests:
            self._log({"requests": self._media.request_table(self._state.requests)})
        speed = asdict(rates(self._state))
        self._run.summary.update({f"total/{key}": value for key, value in speed.items() if value is not None})
        self._run.summary["total/num_failures"] = len(self._state.failures)
        self._run.summary.update({f"score/{key}": value for key, value in self._scores().items()})
        save_progress(self._run_folder, self._progress)
        self._run.finish()
