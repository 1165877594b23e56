"""Makes the video of a complete story when it is missing or was made of other clips.

    stories/<story>/story.mp4      the clips of all shots, concatenated without encoding again
    stories/<story>/story.json     the fingerprints of its records, its size, hashes and frames; written after it

A video that has changed since then is set aside and made again. One process at a time makes the video of a story: it
holds a separate lease. Knows run folders, leases and graphs; nothing of rendering.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import concat_clips
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.dispatch.scanning import FolderView, video_key
from storymem_dist.dispatch.story_graph import StoryGraph
from storymem_dist.errors import RunFolderError
from storymem_dist.events import StoryFinished, WarningIssued, timed_stage
from storymem_dist.files import (
    UnsafePath,
    canonical_json,
    file_digest,
    quick_digest,
    read_json,
    temporaries_in,
    write_bytes,
)


class StoryVideoState(Enum):
    """The result of an attempt to make a story video."""

    MADE = "made"  # now or before
    ELSEWHERE = "elsewhere"  # another process is making it
    DAMAGED = "damaged"  # the record of a shot is unusable
    IMPOSSIBLE = "impossible"  # the clips exist but cannot be concatenated


@dataclass(frozen=True, kw_only=True)
class StoryVideoMaker:
    """Makes the videos of complete stories. Thread-safe.

    ``check_contents`` compares all bytes of an existing video with its hash, not only a sample.
    """

    parts: Sequence[BatchPart]
    view: FolderView
    check_contents: bool = False

    def make(self, story: StoryGraph, note_damaged: Callable[[PlannedShot], None]) -> StoryVideoState:
        """Make the video of a complete story unless it exists; notify the observers.

        ``note_damaged`` is called with a shot whose record is unusable: it must be rendered again. Raises ``OSError``.
        """
        state = self._make_or_find(story, note_damaged)
        if state is StoryVideoState.MADE:
            self.view.logs[story.part].note(video_key(story))
        return state

    def _make_or_find(self, story: StoryGraph, note_damaged: Callable[[PlannedShot], None]) -> StoryVideoState:
        part, leases = self.parts[story.part], self.view.leases[story.part]
        fingerprints = [shot.fingerprint for shot in story.shots]
        if has_story_video(part.run, story.story_id, fingerprints, check_contents=self.check_contents):
            return StoryVideoState.MADE
        key = f"{story.story_id}.story.{fingerprints[-1][:16]}"
        lease = leases.try_claim(key, leases.generation_of(key))
        if lease is None:
            return StoryVideoState.ELSEWHERE
        try:
            if has_story_video(part.run, story.story_id, fingerprints, check_contents=self.check_contents):
                return StoryVideoState.MADE
            if aside := set_aside_changed_video(part.run, story.story_id, fingerprints):
                message = f"{aside}: this video of {story.story_id} was set aside, its contents have changed"
                part.observers.notify(WarningIssued(message=f"{message}; it is made again", source="join"))
            return self._make(story, part, note_damaged)
        finally:
            leases.release(lease)

    def make_missing(self, stories: Sequence[StoryGraph], note_damaged: Callable[[PlannedShot], None]) -> bool:
        """Make the videos of complete ``stories`` that have none; False when the batch may not be finished after that.

        Raises ``OSError``.
        """
        states = [self.make(story, note_damaged) for story in stories if story.is_complete]
        return not any(state in (StoryVideoState.ELSEWHERE, StoryVideoState.DAMAGED) for state in states)

    def _make(self, story: StoryGraph, part: BatchPart, note_damaged: Callable[[PlannedShot], None]) -> StoryVideoState:
        began = time.monotonic()
        records = self._records(story, part, note_damaged)
        if records is None:
            return StoryVideoState.DAMAGED
        with timed_stage(part.observers, "join", story_id=story.story_id):
            try:
                make_story_video(part.run, story.story_id, records)
            except RunFolderError as error:
                message = f"the clips of {story.story_id} exist but cannot be concatenated: {error}"
                part.observers.notify(WarningIssued(message=message, source="join"))
                return StoryVideoState.IMPOSSIBLE
        notify_story_finished(part, story, elapsed_seconds=time.monotonic() - began)
        return StoryVideoState.MADE

    @staticmethod
    def _records(
        story: StoryGraph, part: BatchPart, note_damaged: Callable[[PlannedShot], None]
    ) -> list[ShotRecord] | None:
        records = []
        for shot in story.shots:
            try:
                folder = part.run.shot(story.story_id, shot.shot_id)
                record = folder.require_record(shot.fingerprint, check_contents=True)  # all bytes are read now anyway
            except DamagedRecord as damage:
                message = f"{damage}; the shot is rendered again"
                part.observers.notify(WarningIssued(message=message, source="join"))
                note_damaged(shot)
                return None
            records.append(record)
        return records


def has_story_video(
    run: RunFolder, story_id: str, fingerprints: Sequence[str], *, check_contents: bool = False
) -> bool:
    """Whether ``story.mp4`` exists, was made of the records with these fingerprints, in order, and is as it was made.

    Compares size and a sample of the contents; with ``check_contents`` all of them. (A ``story.json`` of an earlier
    version has the size alone.) Raises ``OSError`` when one of them cannot be read.
    """
    video = run.story_video(story_id)
    try:
        made_of = read_json(video.with_name("story.json"))
        return bool(
            made_of["fingerprints"] == list(fingerprints)
            and made_of["num_bytes"] == video.stat().st_size
            and made_of.get("sample") in (None, quick_digest(video))
            and (not check_contents or made_of.get("sha256") in (None, file_digest(video)))
        )
    except (FileNotFoundError, NotADirectoryError, UnsafePath, ValueError, KeyError, TypeError, AttributeError):
        return False


def set_aside_changed_video(run: RunFolder, story_id: str, fingerprints: Sequence[str]) -> Path | None:
    """Rename a ``story.mp4`` that was made of these records but has changed since; return its new path, if any.

    Only for the holder of the story's lease who found that ``has_story_video`` is false.
    """
    video = run.story_video(story_id)
    try:
        if read_json(video.with_name("story.json"))["fingerprints"] != list(fingerprints):
            return None
        return video.rename(video.with_name(f"story.damaged-{secrets.token_hex(4)}"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_story_video(run: RunFolder, story_id: str, records: Sequence[ShotRecord]) -> int:
    """Concatenate the clips of all ``records``, in order; return the number of frames.

    Only for the holder of the story's lease. Raises ``OSError``, and ``RunFolderError`` when the clips do not match.
    """
    video = run.story_video(story_id)
    for path in temporaries_in(video.parent, video.name):
        path.unlink(missing_ok=True)
    clips = [run.shot(story_id, record.shot_id).files_of(record) / record.clip for record in records]
    num_frames = concat_clips(clips, video)
    made_of = {
        "fingerprints": [record.fingerprint for record in records],
        "num_bytes": video.stat().st_size,
        "sha256": file_digest(video),
        "sample": quick_digest(video),
        "num_frames": num_frames,
    }
    write_bytes(video.with_name("story.json"), canonical_json(made_of))
    return num_frames


def notify_story_finished(part: BatchPart, story: StoryGraph, *, elapsed_seconds: float = 0.0) -> None:
    """Notify the observers that the video of a story exists."""
    part.observers.notify(
        StoryFinished(
            story_id=story.story_id,
            video=part.run.story_video(story.story_id).relative_to(part.run.root).as_posix(),
            num_shots=len(story.shots),
            elapsed_seconds=elapsed_seconds,
        )
    )
