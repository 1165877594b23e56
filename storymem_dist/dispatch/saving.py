"""From a rendered shot to a committed one, beside whatever the replica does next.

``BackgroundSave`` has a thread of its own: it encodes and writes the files, publishes the record, puts the views in
their place, gives the lease back, tells the observers and, after a story's last shot, joins the story. Queue and graph
belong to the thread that renders, which takes note of the outcome (``Saved``) when it gets to it.

Only files are written here. Decoding and choosing keyframes come before, in the thread that renders: they need the
device that renders.
"""

import concurrent.futures
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
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.graph import Chain
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.dispatch.protocol import RenderedShot
from storymem_dist.dispatch.queue import Claim
from storymem_dist.dispatch.story_video import StoryJoiner
from storymem_dist.events import StageFinished, StageStarted, WarningIssued
from storymem_dist.files import json_ready


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldShot:
    """A shot that this replica holds, and its attempt at it.

    ``resumed_at``: the denoising step at which an earlier attempt was left. ``began``: on the monotonic clock.
    """

    claim: Claim
    attempt_id: str
    resumed_at: int | None
    began: float

    @property
    def shot(self) -> PlannedShot:
        """The shot."""
        return self.claim.shot


class SaveEnd(Enum):
    """How saving a shot ended."""

    COMMITTED = "committed"
    LOST = "lost"  # another replica has taken the shot over
    FAILED = "failed"  # a file could not be written
    ABANDONED = "abandoned"  # on request


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """How it ended.

    ``elapsed_seconds`` count from the beginning of the attempt. ``damaged``: shots of the story whose record turned out
    to be unusable when it was to be joined.
    """

    end: SaveEnd
    elapsed_seconds: float = 0.0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    error: OSError | None = None
    damaged: Sequence[PlannedShot] = ()


class _Abandoned(Exception):
    """Nobody waits for the shot any more."""


class BackgroundSave:
    """Saves one rendered shot, from the moment it is made on."""

    def __init__(
        self,
        held: HeldShot,
        rendered: RenderedShot,
        *,
        part: BatchPart,
        chain: Chain,
        joiner: StoryJoiner,
        host: Mapping[str, Any],
        may_publish: Callable[[], bool],
        release: Callable[[], None],
    ) -> None:
        """``host`` goes into the part of the record that may differ between equal runs. ``release`` gives the lease
        back, when the shot is committed.
        """
        self.held = held
        self._part = part
        self._chain = chain
        self._joiner = joiner
        self._host = host
        self._may_publish = may_publish
        self._release = release
        self._abandoned = threading.Event()
        self._outcome: Future[Saved] = Future()
        story_id, shot_id = held.shot.story.story_id, held.shot.shot.shot_id
        part.observers.notify(StageStarted(stage="save", story_id=story_id, shot_id=shot_id))
        threading.Thread(target=self._run, args=(rendered,), name="save-shot", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether the outcome is there."""
        return self._outcome.done()

    @property
    def has_crashed(self) -> bool:
        """Whether it ended with something that is not the fault of one shot: ``outcome`` would raise it."""
        return self.has_ended and self._outcome.exception() is not None

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the end, for at most ``timeout_seconds``."""
        concurrent.futures.wait([self._outcome], timeout_seconds)

    def outcome(self) -> Saved:
        """Wait for the end and return it, or raise what no shot is to blame for."""
        return self._outcome.result()

    def abandon(self) -> None:
        """Give up before the next frame or file, unless it is published already."""
        self._abandoned.set()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self, rendered: RenderedShot) -> None:
        try:
            self._outcome.set_result(self._commit(rendered))
        except BaseException as error:  # raised again by who asks for the outcome
            self._outcome.set_exception(error)

    def _commit(self, rendered: RenderedShot) -> Saved:
        held, part = self.held, self._part
        shot, observers = held.shot, self._part.observers
        folder = part.run.shot(shot.story.story_id, shot.shot.shot_id)
        began = time.monotonic()
        try:
            record = save_shot(
                folder, part, shot, rendered, attempt_id=held.attempt_id, host=self._host, check=self._check
            )
            self._check()
            published = folder.publish(record, may_publish=self._may_publish)
        except OSError as error:
            folder.discard_attempt(held.attempt_id)
            return Saved(end=SaveEnd.FAILED, error=error)
        except _Abandoned:
            folder.discard_attempt(held.attempt_id)
            return Saved(end=SaveEnd.ABANDONED)
        if not published:
            return Saved(end=SaveEnd.LOST)
        now = time.monotonic()
        seconds = {**rendered.stage_seconds, "save": now - began}
        elapsed = now - held.began
        observers.notify(
            StageFinished(stage="save", elapsed_seconds=now - began, story_id=record.story_id, shot_id=record.shot_id)
        )
        self._finish(record)
        self._release()
        observers.notify(announcing.shot_finished(record, part, elapsed, seconds))
        damaged = self._join() if shot is self._chain.shots[-1] else ()
        return Saved(end=SaveEnd.COMMITTED, elapsed_seconds=elapsed, stage_seconds=seconds, damaged=damaged)

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    def _finish(self, record: ShotRecord) -> None:
        try:
            self._part.run.finish_commit(record)
        except OSError as error:
            where = f"{record.story_id}:{record.shot_id}"
            self._warn(f"{where} is committed, but not everything is in its place: {error}", "save")

    def _join(self) -> Sequence[PlannedShot]:
        """Join the story; return the shots that turned out to be damaged."""
        damaged: list[PlannedShot] = []
        try:
            self._joiner.join(self._chain, damaged.append)
        except OSError as error:  # tried again before the end
            self._warn(f"{self._chain.story_id} cannot be joined now: {error}", "join")
        return damaged

    def _warn(self, message: str, source: str) -> None:
        self._part.observers.notify(WarningIssued(message=message, source=source))


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
    frame and image; what it raises ends the writing. Raises ``OSError``.
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
        story_id=shot.story.story_id,
        shot_id=shot.shot.shot_id,
        shot_index=shot.shot.index,
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
        },
        host=json_ready({"attempt_id": attempt_id, "host": socket.gethostname(), **part.host, **host}),
    )
