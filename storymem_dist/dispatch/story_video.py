"""The end of a chain: all its clips in one ``story.mp4``, made when it is missing or made of other clips.

    stories/<story>/story.mp4      the clips of all shots, joined without encoding again
    stories/<story>/story.json     which records it was made of; written after it

One process joins a story at a time: it holds a lease of its own. Knows run folders, leases and chains; nothing of who
rendered the clips.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import concat_clips
from storymem_dist.dispatch.graph import Chain
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.errors import RunFolderError
from storymem_dist.events import StoryFinished, WarningIssued, timed_stage
from storymem_dist.files import canonical_json, read_json, temporaries_in, write_bytes


class Joined(Enum):
    """How an attempt to join a story ended."""

    YES = "yes"
    ELSEWHERE = "elsewhere"  # another process is at it
    DAMAGED = "damaged"  # a record turned out to be unusable
    IMPOSSIBLE = "impossible"  # the clips are there but do not go together


@dataclass(frozen=True, kw_only=True)
class StoryJoiner:
    """Joins complete chains; ``parts`` and ``leases`` have one entry for each part. Any thread may join."""

    parts: Sequence[BatchPart]
    leases: Sequence[LeaseFolder]

    def join(self, chain: Chain, note_damaged: Callable[[PlannedShot], None]) -> Joined:
        """Join the clips of a complete chain, unless that is done. Tells the observers.

        ``note_damaged`` hears of a shot whose record turned out to be unusable: it is to be rendered again. Raises
        ``OSError``.
        """
        part, leases = self.parts[chain.part], self.leases[chain.part]
        fingerprints = [shot.fingerprint for shot in chain.shots]
        if is_joined(part.run, chain.story_id, fingerprints):
            return Joined.YES
        key = f"{chain.story_id}.story.{fingerprints[-1][:16]}"
        lease = leases.try_claim(key, leases.generation_of(key))
        if lease is None:
            return Joined.ELSEWHERE
        try:
            if is_joined(part.run, chain.story_id, fingerprints):
                return Joined.YES
            return self._join(chain, part, note_damaged)
        finally:
            leases.release(lease)

    def _join(self, chain: Chain, part: BatchPart, note_damaged: Callable[[PlannedShot], None]) -> Joined:
        began = time.monotonic()
        records = self._records(chain, part, note_damaged)
        if records is None:
            return Joined.DAMAGED
        with timed_stage(part.observers, "join", story_id=chain.story_id):
            try:
                join_story(part.run, chain.story_id, records)
            except RunFolderError as error:
                message = f"the clips of {chain.story_id} are there but cannot be joined: {error}"
                part.observers.notify(WarningIssued(message=message, source="join"))
                return Joined.IMPOSSIBLE
        say_finished(part, chain, elapsed_seconds=time.monotonic() - began)
        return Joined.YES

    @staticmethod
    def _records(chain: Chain, part: BatchPart, note_damaged: Callable[[PlannedShot], None]) -> list[ShotRecord] | None:
        records = []
        for shot in chain.shots:
            try:
                record = part.run.shot(chain.story_id, shot.shot.shot_id).require_record(shot.fingerprint)
            except DamagedRecord as damage:
                message = f"{damage}; the shot is rendered again"
                part.observers.notify(WarningIssued(message=message, source="join"))
                note_damaged(shot)
                return None
            records.append(record)
        return records


def is_joined(run: RunFolder, story_id: str, fingerprints: Sequence[str]) -> bool:
    """Whether ``story.mp4`` is there and was made of the records with these fingerprints."""
    try:
        made_of = read_json(run.story_folder(story_id) / "story.json")
        num_bytes = run.story_video(story_id).stat().st_size
        return bool(made_of["fingerprints"] == list(fingerprints) and made_of["num_bytes"] == num_bytes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def join_story(run: RunFolder, story_id: str, records: Sequence[ShotRecord]) -> int:
    """Join the clips of all ``records``, in order; return the number of frames.

    For who holds the story's lease. Raises ``OSError``, and ``RunFolderError`` when the clips do not go together.
    """
    video = run.story_video(story_id)
    for path in temporaries_in(video.parent, video.name):
        path.unlink(missing_ok=True)
    clips = [run.shot(story_id, record.shot_id).files_of(record) / record.clip for record in records]
    num_frames = concat_clips(clips, video)
    made_of = {
        "fingerprints": [record.fingerprint for record in records],
        "num_bytes": video.stat().st_size,
        "num_frames": num_frames,
    }
    write_bytes(video.with_name("story.json"), canonical_json(made_of))
    return num_frames


def say_finished(part: BatchPart, chain: Chain, *, elapsed_seconds: float = 0.0) -> None:
    """Tell the observers that a story is there as a whole."""
    part.observers.notify(
        StoryFinished(
            story_id=chain.story_id,
            video=part.run.story_video(chain.story_id).relative_to(part.run.root).as_posix(),
            num_shots=len(chain.shots),
            elapsed_seconds=elapsed_seconds,
        )
    )
