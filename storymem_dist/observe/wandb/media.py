"""A run's pictures and tables as Weights & Biases media: ``memory_frames``, ``story/ID``, ``failures``,
``requests``, videos.

Knows W&B's media types and the folded events; ``feed`` decides when something is logged.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

import storymem_dist.events as ev
from storymem_dist.artifacts.mp4 import is_mp4
from storymem_dist.errors import RunFolderError
from storymem_dist.files import resolve_inside, write_bytes
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.thumbnails import Thumbnails
from storymem_dist.observe.run.values import AppliedRequest, Failure, StoryState
from storymem_dist.observe.settings import WandbSettings

MEMORY_COLUMNS = (
    "frame",
    "story",
    "shot",
    "verdict",
    "source_shot",
    "source_frame",
    "slot",
    "position",
    "similarity",
    "bank_similarity",
    "against",
    "quality",
    "why",
    "wall_time",
)
"""Columns of the ``memory_frames`` table: one row per memory decision, in the order of the event files."""

STORY_COLUMNS = (
    *("frame", "shot", "mode", "seed", "prompt", "status", "seconds", "seconds_per_step", "recalled", "kept"),
    "waits_for",
)
FAILURE_COLUMNS = ("wall_time", "story", "shot", "stage", "reason", "tried_again")
REQUEST_COLUMNS = ("number", "asked_at", "action", "story", "shots", "who", "seconds_to_effect", "effect")


class Media:
    """Makes W&B media from one run folder. ``num_videos`` counts the videos so far, by kind; ``video`` updates it."""

    def __init__(self, run_folder: Path, settings: WandbSettings, state: RunState, num_videos: dict[str, int]) -> None:
        self._run_folder = run_folder
        self._settings = settings
        self._state = state
        self._thumbnails = Thumbnails(run_folder, settings.thumbnail_height)
        self.num_videos = num_videos

    def video(self, kind: str, limit: int, path: str | None, caption: str) -> Any:
        """The video as W&B media, or None if it exceeds a limit or is missing."""
        try:
            file = resolve_inside(self._run_folder, path or "")
            if not is_mp4(file) or file.stat().st_size > self._settings.max_video_mib * 2**20:
                return None
        except OSError:
            return None
        if 0 <= limit <= self.num_videos.get(kind, 0):
            return None
        self.num_videos[kind] = self.num_videos.get(kind, 0) + 1
        return wandb.Video(str(file), caption=caption, format="mp4")

    def memory_table(self, decisions: Sequence[tuple[float, ev.MemoryDecided]]) -> wandb.Table:
        """One row for each decision, given with its wall time."""
        table = wandb.Table(columns=list(MEMORY_COLUMNS))
        frames = self._memory_frames([event for _, event in decisions])
        for (when, event), frame in zip(decisions, frames, strict=True):
            scored = self._state.with_scores(event)
            table.add_data(
                frame,
                event.story_id,
                event.shot_id,
                event.verdict,
                _source_name(event.source_shot_index),
                event.source_frame_index,
                event.slot,
                event.position,
                scored.similarity,
                scored.bank_similarity,
                scored.against,
                scored.quality,
                event.why,
                when,
            )
        return table

    def story_table(self, story: StoryState) -> wandb.Table:
        """One row for each shot of a story."""
        table = wandb.Table(columns=list(STORY_COLUMNS))
        for shot in sorted(story.shots.values(), key=lambda shot: shot.shot_index):
            attempt = shot.last
            if attempt is None:
                table.add_data(None, shot.shot_id, "", None, "", shot.status, None, None, "", "", story.waits_of(shot))
                continue
            clip = attempt.finished.clip if attempt.finished is not None else ""
            seconds = attempt.end - attempt.start if attempt.end is not None else None
            table.add_data(
                self._image(self._thumbnails.frame(clip, 0)) if clip else None,
                shot.shot_id,
                attempt.started.mode,
                attempt.started.seed,
                attempt.started.prompt,
                shot.status if shot.status != "failed" else f"failed: {shot.reason}",
                seconds,
                attempt.seconds_per_step,
                ", ".join(_frame_name(d) for d in attempt.decisions if d.verdict == "recalled"),
                ", ".join(_frame_name(d) for d in attempt.decisions if d.verdict.startswith("kept")),
                story.waits_of(shot),
            )
        return table

    @staticmethod
    def failure_table(failures: Sequence[Failure]) -> wandb.Table:
        """One row for each failure."""
        table = wandb.Table(columns=list(FAILURE_COLUMNS))
        for failure in failures:
            table.add_data(
                failure.wall_time,
                failure.story_id,
                failure.shot_id,
                failure.stage,
                failure.reason,
                failure.will_retry,
            )
        return table

    @staticmethod
    def request_table(requests: Mapping[int, AppliedRequest]) -> wandb.Table:
        """One row for each request to the queue."""
        table = wandb.Table(columns=list(REQUEST_COLUMNS))
        for number, one in sorted(requests.items()):
            asked = one.request
            texts = (asked.action, asked.story_id, ", ".join(asked.shots), asked.who)
            table.add_data(number, asked.asked_at, *texts, one.seconds_to_effect, "; ".join(one.messages))
        return table

    def _image(self, jpeg: bytes | None) -> Any:
        """The thumbnail as W&B media. Its file lies in the run folder, which offline runs are uploaded from."""
        if jpeg is None:
            return None
        folder = self._run_folder / "wandb" / "thumbnails"
        folder.mkdir(exist_ok=True)
        path = resolve_inside(self._run_folder, "wandb/thumbnails") / f"{hashlib.sha256(jpeg).hexdigest()[:16]}.jpg"
        if path.is_symlink() or not path.is_file() or path.stat().st_size != len(jpeg):
            write_bytes(path, jpeg, durable=False)
        return wandb.Image(str(path))

    def _memory_frames(self, decisions: Sequence[ev.MemoryDecided]) -> list[Any]:
        """One image (or None) per memory row. If images are limited, keyframes of the bank come first."""
        limit = self._settings.num_memory_images
        images: dict[tuple[str, int, int], Any] = {}
        by_clip: dict[str, list[int]] = {}
        order = sorted(range(len(decisions)), key=lambda i: decisions[i].slot is None)
        for index in order:
            clip = self._clip_of(decisions[index])
            if clip is not None:
                by_clip.setdefault(clip, []).append(decisions[index].source_frame_index)
        for clip, indices in by_clip.items():
            self._thumbnails.decode(clip, indices)
        for index in order:
            event = decisions[index]
            key = _picture_of(event)
            clip = self._clip_of(event)
            if key in images or (0 <= limit <= len(images)):
                continue
            jpeg = self._reference(event) if clip is None else self._thumbnails.frame(clip, event.source_frame_index)
            if jpeg is not None:
                images[key] = self._image(jpeg)
        return [images.get(_picture_of(event)) for event in decisions]

    def _clip_of(self, event: ev.MemoryDecided) -> str | None:
        """Path of the clip that the frame of this decision comes from; None for a picture of the storyboard."""
        if _is_given(event):
            return None
        story = self._state.stories.get(event.story_id)
        for shot in story.shots.values() if story is not None else ():
            if shot.shot_index == event.source_shot_index:
                done = [a.finished for a in shot.attempts if a.finished is not None]
                return done[-1].clip if done and done[-1].clip else None
        return None

    def _reference(self, event: ev.MemoryDecided) -> bytes | None:
        """Thumbnail of a picture that the storyboard gives, from its copy in the run folder."""
        if event.slot is None or not _is_given(event):
            return None
        is_sharded = False
        with contextlib.suppress(RunFolderError):
            is_sharded = RunFiles(self._run_folder).is_sharded
        path = RunFiles.reference_path(event.story_id, event.source_shot_index, event.slot, is_sharded=is_sharded)
        return self._thumbnails.image(path)


def _source_name(shot_index: int) -> str:
    return "reference" if shot_index < 0 else f"shot_{shot_index + 1:02d}"


def _frame_name(event: ev.MemoryDecided) -> str:
    return f"{_source_name(event.source_shot_index)} #{event.slot}"


def _is_given(event: ev.MemoryDecided) -> bool:
    """Whether the decision is about a picture that the storyboard gives."""
    return event.slot is not None and (event.source_shot_index < 0 or event.slot < 0)


def _picture_of(event: ev.MemoryDecided) -> tuple[str, int, int]:
    """Equal for decisions about the same picture: a frame of a clip (0 or more), or one of the storyboard's."""
    number = event.source_frame_index
    if _is_given(event) and event.slot is not None:
        number = -1 - abs(event.slot)
    return event.story_id, event.source_shot_index, number
