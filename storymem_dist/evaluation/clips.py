"""The clips of a run folder that can be scored: each with its record, its place and the hash of what lies there.

What cannot be scored (a clip that is missing or changed, a damaged record) is named in one sentence, and the others
stay. Knows run folders; nothing of measures.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.files import UnsafePath, open_regular, resolve_inside
from storymem_dist.observe.run.files import RunFiles, StoryFiles

CHANGED = "its contents have changed since it was rendered"

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """A keyframe of the memory: its path relative to the run folder, and the SHA-256 that its record names."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotClip:
    """A committed shot. ``clip`` is relative to the run folder; ``sha256`` is of the file as it is."""

    record: ShotRecord
    clip: str
    sha256: str
    keyframes: tuple[StoredImage, ...]

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.record.story_id}/{self.record.shot_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryClips:
    """The clips of one story in order. ``num_shots``: of the storyboard, at least those that have a record."""

    story_id: str
    overview: str
    num_shots: int
    shots: Sequence[ShotClip]

    @property
    def is_whole(self) -> bool:
        """Whether every shot of the storyboard can be scored."""
        return len(self.shots) == self.num_shots


def find_clips(files: RunFiles) -> tuple[list[StoryClips], list[str]]:
    """Return all stories with a committed shot, and a sentence for each file that cannot be used."""
    problems: list[str] = []
    stories = [_story(files, folder, problems) for folder in files.stories() if folder.records]
    return stories, [*files.left_out, *problems]


def _story(files: RunFiles, folder: StoryFiles, problems: list[str]) -> StoryClips:
    shots = []
    for record in sorted(folder.records.values(), key=lambda one: (one.shot_index, one.shot_id)):
        clip = files.clip_path(record)
        try:
            digest = _digest(resolve_inside(files.root, clip))
            if digest != record.files[record.clip].sha256:
                raise UnsafePath(CHANGED)
        except OSError as error:
            what = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
            problems.append(f"{clip} is not scored: {what}")
            continue
        paths = files.keyframe_paths(record)
        images = (StoredImage(path=paths[one.slot], sha256=record.files[one.file].sha256) for one in record.keyframes)
        shots.append(ShotClip(record=record, clip=clip, sha256=digest, keyframes=tuple(images)))
    overview = folder.storyboard.get("overview")
    return StoryClips(
        story_id=folder.story_id,
        overview=overview.strip() if isinstance(overview, str) else "",
        num_shots=max(_num_planned(folder), len(folder.records)),
        shots=shots,
    )


def _num_planned(folder: StoryFiles) -> int:
    scenes = folder.storyboard.get("scenes")
    lists = [scene.get("shots") for scene in scenes if isinstance(scene, dict)] if isinstance(scenes, list) else []
    return sum(len(shots) for shots in lists if isinstance(shots, list))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
