"""What is still to compute of each clip, and its computing: one decode, then every value that is asked for.

A task reads the run folder and leaves its values in the cache, so tasks can be computed by any process, in any order.
Knows clips, models and the cache; nothing of metrics.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.artifacts.video import read_clip, read_png
from storymem_dist.errors import RunFolderError
from storymem_dist.evaluation.cache import FeatureCache, Key, joint
from storymem_dist.evaluation.clips import CHANGED, ShotClip, StoryClips
from storymem_dist.evaluation.frames import middle_frames, small_frames
from storymem_dist.evaluation.measures import ClipDescription, colour_shares, describe
from storymem_dist.evaluation.models import AESTHETIC, VICLIP, Models
from storymem_dist.files import UnsafePath, read_limited, resolve_inside

Progress = Callable[[int, int], None]
"""Called with the number of clips done and of all that are computed."""

_MAX_KEYFRAME_BYTES = 256 * 2**20

DESCRIPTION, KEYFRAMES, STORY, STORY_FRAMES, TEXT = "description", "keyframes", "story", "story_frames", "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to compute of one clip: ``kinds``, and the frames of it that the whole story's feature needs.

    Plain values: a task is sent to other processes as JSON. ``keyframes`` are (path, SHA-256).
    """

    name: str
    clip: str
    sha256: str
    kinds: tuple[str, ...]
    story_frames: tuple[int, ...] = ()
    keyframes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> "Task":
        """The task that ``dataclasses.asdict`` and JSON made ``value`` of."""
        lists = {key: tuple(value[key]) for key in ("kinds", "story_frames")}
        return cls(**{**value, **lists, "keyframes": tuple((path, sha256) for path, sha256 in value["keyframes"])})


def description_key(sha256: str) -> Key:
    """Key of a clip's weights-free description."""
    return DESCRIPTION, sha256


def keyframes_key(hashes: Sequence[str]) -> Key:
    """Key of the colours of a shot's keyframes."""
    return KEYFRAMES, joint(hashes)


def model_key(kind: str, content: str, identity: str) -> Key:
    """Key of what a model with this identity made of a content."""
    return kind, content, identity


def story_key(story: StoryClips, identity: str) -> Key:
    """Key of the feature of a whole story."""
    return model_key(STORY, joint([shot.sha256 for shot in story.shots]), identity)


def story_frames_key(sha256: str, frames: Sequence[int]) -> Key:
    """Key of the frames of a clip that the feature of a whole story is computed from, at the size that ViCLIP sees."""
    return STORY_FRAMES, sha256, ",".join(map(str, frames))


def frames_of_story(story: StoryClips) -> list[tuple[ShotClip, tuple[int, ...]]]:
    """The 8 middle frames of the whole story, by the clips that they lie in, in order."""
    found = []
    chosen = middle_frames(sum(shot.record.num_frames for shot in story.shots))
    first = 0
    for shot in story.shots:
        end = first + shot.record.num_frames
        inside = tuple(frame - first for frame in chosen if first <= frame < end)
        if inside:
            found.append((shot, inside))
        first = end
    return found


def open_tasks(stories: Sequence[StoryClips], models: Models, cache: FeatureCache) -> list[Task]:
    """What the cache lacks of these stories, a task for each clip that something is missing of."""
    tasks = []
    identity = models.identities.get(VICLIP)
    for story in stories:
        frames: dict[str, tuple[int, ...]] = {}
        if identity and story.is_whole and story.overview and cache.get(story_key(story, identity)) is None:
            frames = {
                shot.name: inside
                for shot, inside in frames_of_story(story)
                if cache.get(story_frames_key(shot.sha256, inside)) is None
            }
        for shot in story.shots:
            kinds = [DESCRIPTION] if cache.get(description_key(shot.sha256)) is None else []
            kinds += [
                name
                for name in models.usable
                if cache.get(model_key(name, shot.sha256, models.identities[name])) is None
            ]
            hashes = [image.sha256 for image in shot.keyframes]
            images: tuple[tuple[str, str], ...] = ()
            if hashes and cache.get(keyframes_key(hashes)) is None:
                images = tuple((image.path, image.sha256) for image in shot.keyframes)
            if kinds or images or shot.name in frames:
                tasks.append(
                    Task(
                        name=shot.name,
                        clip=shot.clip,
                        sha256=shot.sha256,
                        kinds=tuple(kinds),
                        story_frames=frames.get(shot.name, ()),
                        keyframes=images,
                    )
                )
    return tasks


def compute(task: Task, root: Path, models: Models, cache: FeatureCache) -> str | None:
    """Compute a task and keep its values; return a sentence about what could not be read.

    Raises ``OSError`` when the cache cannot be written.
    """
    problem = None
    if task.keyframes:
        try:
            images = [_keyframe(root, path, sha256) for path, sha256 in task.keyframes]
        except (RunFolderError, OSError) as error:
            problem = f"the keyframes of {task.name} are not used: {error}"
        else:
            shares = torch.cat([colour_shares(image[None]) for image in images])
            cache.put(keyframes_key([sha256 for _, sha256 in task.keyframes]), {"colours": shares})
    if not task.kinds and not task.story_frames:
        return problem
    try:
        frames = read_clip(resolve_inside(root, task.clip))
    except (RunFolderError, OSError, RuntimeError) as error:  # torch: a file without a frame
        return f"{task.clip} is not scored: {error}"
    if DESCRIPTION in task.kinds:
        found = describe(frames)
        cache.put(description_key(task.sha256), {part.name: getattr(found, part.name) for part in fields(found)})
    for name in (VICLIP, AESTHETIC):
        if name in task.kinds and models.load(name):
            value = _judged(name, frames, models)
            cache.put(model_key(name, task.sha256, models.identities[name]), {"value": value})
    if task.story_frames:
        chosen = small_frames(frames[list(task.story_frames)])
        cache.put(story_frames_key(task.sha256, task.story_frames), {"frames": chosen})
    return problem


def _keyframe(root: Path, path: str, sha256: str) -> Tensor:
    """A keyframe as uint8 ``[3, H, W]``. Raises ``RunFolderError`` or ``OSError`` unless it is that of its record."""
    data = read_limited(resolve_inside(root, path), _MAX_KEYFRAME_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UnsafePath(f"{path}: {CHANGED}")
    return read_png(BytesIO(data), name=Path(path))


def _judged(name: str, frames_FCHW: Tensor, models: Models) -> Tensor:
    if name == VICLIP:
        return models.clip_feature(frames_FCHW[middle_frames(len(frames_FCHW))])
    return models.aesthetic_scores(frames_FCHW)


def description(cache: FeatureCache, sha256: str) -> ClipDescription | None:
    """The description of a clip, if it was computed."""
    values = cache.get(description_key(sha256))
    try:
        return ClipDescription(**values) if values is not None else None
    except TypeError:  # a file of another origin
        return None


def story_feature(story: StoryClips, models: Models, cache: FeatureCache) -> Tensor | None:
    """ViCLIP's feature of the whole story; None where its frames or the model are missing.

    Computed from the frames that the tasks have left. Raises ``OSError``.
    """
    key = story_key(story, models.identities[VICLIP])
    if (known := cache.get(key)) is not None:
        return known["value"]
    keys = [story_frames_key(shot.sha256, inside) for shot, inside in frames_of_story(story)]
    parts = [cache.get(one) for one in keys]
    if any(part is None for part in parts) or not models.load(VICLIP):
        return None
    value = models.clip_feature(torch.cat([part["frames"] for part in parts if part is not None]))
    cache.put(key, {"value": value})
    return value


def text_features(texts: Sequence[str], models: Models, cache: FeatureCache) -> dict[str, Tensor]:
    """ViCLIP's features of texts, by text; {} where the model is missing. Raises ``OSError``."""
    identity = models.identities.get(VICLIP)
    if identity is None:
        return {}
    found: dict[str, Tensor] = {}
    for text in dict.fromkeys(texts):
        key = model_key(TEXT, joint([text]), identity)
        known = cache.get(key)
        if known is None:
            if not models.load(VICLIP):
                return {}
            known = {"value": models.text_features([text])[0], "is_cut": torch.tensor(models.is_cut(text))}
            cache.put(key, known)
        found[text] = known["value"]
    return found
