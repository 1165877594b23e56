"""Commits a rendered shot in a thread, while the replica renders the next one.

``BackgroundSave`` encodes and writes the files, publishes the record, updates the views, releases the lease, notifies
the observers and, once all shots of a story are committed, makes the story video. Of the queue it uses this
shot's lease only. The states of shots change in the thread that renders, which handles the outcome (``Saved``) later.

Knows files only: decoding and choosing keyframes need the device and come before, in the thread that renders.
"""

import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from storymem_dist.artifacts.records import ShotRecord, StoredKeyframe
from storymem_dist.artifacts.shot_folder import ClipFiles, ShotFolder, keyframe_name, tail_name
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.gathering import Merge
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.dispatch.protocol import RenderedShot
from storymem_dist.dispatch.queue import Claim
from storymem_dist.dispatch.shot_settings import own_settings
from storymem_dist.dispatch.story_graph import StoryGraph
from storymem_dist.dispatch.story_video import StoryVideoMaker
from storymem_dist.errors import MachineError, RunFolderError
from storymem_dist.events import StageFinished, StageStarted, WarningIssued, json_ready
from storymem_dist.files import quick_digest
from storymem_dist.hardware import machine_fault


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldShot:
    """A shot that this replica holds, and its attempt at it.

    ``resumed_at``: the denoising step from which it resumes, or None. ``began``: seconds on the monotonic clock.
    ``merge``: the replicas that render it together, if they are several.
    """

    claim: Claim
    attempt_id: str
    resumed_at: int | None
    began: float
    merge: Merge | None = None

    @property
    def shot(self) -> PlannedShot:
        """The planned shot."""
        return self.claim.shot


class SaveEnd(Enum):
    """How saving a shot ended."""

    COMMITTED = "committed"
    LOST = "lost"  # another replica has taken the shot over
    FAILED = "failed"  # a file of this shot cannot be written, on any machine
    ABANDONED = "abandoned"  # on request


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """The outcome of a save.

    ``elapsed_seconds`` since the attempt began. ``damaged``: shots whose unusable record prevented the story video.
    """

    end: SaveEnd
    elapsed_seconds: float = 0.0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    error: OSError | None = None
    damaged: Sequence[PlannedShot] = ()


class _Abandoned(Exception):
    """The save was abandoned."""


class BackgroundSave:
    """Saves one rendered shot. Its thread starts on creation."""

    def __init__(
        self,
        held: HeldShot,
        rendered: RenderedShot,
        *,
        part: BatchPart,
        story: StoryGraph,
        story_videos: StoryVideoMaker,
        host: Mapping[str, Any],
        may_publish: Callable[[], bool],
        release: Callable[[], None],
    ) -> None:
        """``host`` goes into the part of the record that may differ between equal runs. ``may_publish`` returns whether
        the lease is still held. ``release`` releases it once the shot is committed.
        """
        self.held = held
        self._part = part
        self._story = story
        self._story_videos = story_videos
        self._host = host
        self._may_publish = may_publish
        self._release = release
        self._abandoned = threading.Event()
        self._outcome: Future[Saved] = Future()
        story_id, shot_id = held.shot.story_id, held.shot.shot_id
        part.observers.notify(StageStarted(stage="save", story_id=story_id, shot_id=shot_id))
        threading.Thread(target=self._run, args=(rendered,), name="save-shot", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the save has ended."""
        return self._outcome.done()

    @property
    def has_crashed(self) -> bool:
        """Whether it ended with an error that is not the fault of one shot; ``outcome`` raises it."""
        return self.has_ended and self._outcome.exception() is not None

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the end, for at most ``timeout_seconds``."""
        concurrent.futures.wait([self._outcome], timeout_seconds)

    def outcome(self) -> Saved:
        """Wait for the end and return the outcome. Raises ``MachineError`` and what else no shot is to blame for."""
        return self._outcome.result()

    def abandon(self) -> None:
        """Stop before the next frame or file, unless the record is already published."""
        self._abandoned.set()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self, rendered: RenderedShot) -> None:
        try:
            self._outcome.set_result(self._commit(rendered))
        except BaseException as error:  # ``outcome`` raises it
            self._outcome.set_exception(error)

    def _commit(self, rendered: RenderedShot) -> Saved:
        held, part = self.held, self._part
        shot, observers = held.shot, self._part.observers
        folder = part.run.shot(shot.story_id, shot.shot_id)
        began = time.monotonic()
        try:
            record = save_shot(
                folder, part, shot, rendered, attempt_id=held.attempt_id, host=self._host, check=self._check
            )
            self._check()
            published = folder.publish(record, may_publish=self._may_publish)
        except _Abandoned:
            folder.discard_attempt(held.attempt_id)
            return Saved(end=SaveEnd.ABANDONED)
        except Exception as error:
            fault = machine_fault(error, while_writing=True)
            if fault is None and not isinstance(error, OSError):
                raise
            with contextlib.suppress(OSError):  # the next holder of the shot removes it
                folder.discard_attempt(held.attempt_id)
            if not self._may_publish():  # and has removed it: that is why it cannot be written
                return Saved(end=SaveEnd.LOST)
            if isinstance(error, OSError) and fault is None:
                return Saved(end=SaveEnd.FAILED, error=error)
            raise fault or error from error
        if not published:
            return Saved(end=SaveEnd.LOST)
        now = time.monotonic()
        seconds = {**rendered.stage_seconds, "save": now - began}
        elapsed = now - held.began
        observers.notify(
            StageFinished(stage="save", elapsed_seconds=now - began, story_id=record.story_id, shot_id=record.shot_id)
        )
        fault = self._finish(record)
        self._release()
        observers.notify(announcing.shot_finished(record, part, elapsed, seconds))
        if fault is not None:
            raise fault
        damaged = self._make_story_video() if self._has_all_records() else ()
        return Saved(end=SaveEnd.COMMITTED, elapsed_seconds=elapsed, stage_seconds=seconds, damaged=damaged)

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    def _finish(self, record: ShotRecord) -> MachineError | None:
        """Update the views of the committed shot; return the fault of the machine that prevents it."""
        try:
            self._part.run.finish_commit(record)
        except OSError as error:
            where = f"{record.story_id}:{record.shot_id}"
            self._warn(f"{where} is committed, but its views could not be updated: {error}", "save")
            return machine_fault(error, while_writing=True)
        return None

    def _has_all_records(self) -> bool:
        """Whether every shot of the story is committed, by whichever process. The last one is looked at first."""
        run = self._part.run
        return all(
            run.shot(shot.story_id, shot.shot_id).is_committed(shot.fingerprint) for shot in reversed(self._story.shots)
        )

    def _make_story_video(self) -> Sequence[PlannedShot]:
        """Make the video of the story; return the shots whose record is unusable."""
        damaged: list[PlannedShot] = []
        try:
            self._story_videos.make(self._story, damaged.append)
        except Exception as error:
            if fault := machine_fault(error, while_writing=True):
                raise fault from error
            if not isinstance(error, OSError):
                raise
            self._warn(f"the video of {self._story.story_id} cannot be made now: {error}", "join")  # tried again later
        return damaged

    def _warn(self, message: str, source: str) -> None:
        self._part.observers.notify(WarningIssued(message=message, source=source))


def save_checkpoint(part: BatchPart, shot: PlannedShot, state: DenoiseState) -> None:
    """Save the state of a running shot between two steps. Raises ``MachineError``; other failures are warnings."""
    path = part.run.checkpoint(shot.story_id, shot.shot_id, shot.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        state.save(path)
    except (OSError, RunFolderError) as error:
        if fault := machine_fault(error, while_writing=True):
            raise fault from error
        message = f"{error}; the render continues without this step checkpoint"
        part.observers.notify(WarningIssued(message=message, source="save"))


def save_shot(
    folder: ShotFolder,
    part: BatchPart,
    shot: PlannedShot,
    rendered: RenderedShot,
    *,
    attempt_id: str,
    host: Mapping[str, Any],
    check: Callable[[], None],
) -> ShotRecord:
    """Write clip, keyframes and tail into the attempt's folder and return the record that names them.

    ``host`` goes into the part of the record that may differ between equal runs. ``check`` is called before every
    frame and image; an exception from it ends the writing. Raises ``OSError``.
    """
    began = time.monotonic()
    files = ClipFiles(
        clip=rendered.clip,
        keyframes=[(kept.slot, kept.frame_index, kept.image) for kept in rendered.keyframes],
        tail=rendered.tail,
        fps=part.sampler.fps,
    )
    stored = folder.save_attempt(attempt_id, files, part.video, check)
    num_frames, _, height, width = rendered.clip.shape
    return ShotRecord(
        story_id=shot.story_id,
        shot_id=shot.shot_id,
        shot_index=shot.index,
        scene_num=shot.shot.scene_num,
        index_in_scene=shot.shot.index_in_scene,
        prompt=shot.shot.prompt,
        cut=shot.shot.cut,
        kind=shot.kind,
        mode=shot.mode,
        seed=shot.seed,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=part.sampler.fps,
        clip="clip.mp4",
        clip_sample=quick_digest(folder.attempt_folder(attempt_id) / "clip.mp4"),
        keyframes=tuple(
            StoredKeyframe(slot=kept.slot, frame_index=kept.frame_index, file=keyframe_name(kept.slot))
            for kept in rendered.keyframes
        ),
        tail=tuple(tail_name(number) for number in range(len(rendered.tail))),
        memory=json_ready(rendered.memory),
        inputs=json_ready(shot.inputs),
        fingerprint=shot.fingerprint,
        predecessor=shot.predecessor,
        config_hash=part.config_hash,
        files=stored,
        timing={
            "stage_seconds": {**json_ready(rendered.stage_seconds), "save": time.monotonic() - began},
            "committed_at": time.time(),
            **({"loras": json_ready(rendered.loras)} if rendered.loras else {}),
        },
        host=json_ready({"attempt_id": attempt_id, "host": socket.gethostname(), **part.host, **host}),
        own=json_ready(own_settings(shot.shot, shot.sampler) | ({"given": rendered.given} if rendered.given else {})),
    )
