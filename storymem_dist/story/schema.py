"""A storyboard after reading and checking, as plain frozen values. Knows nothing about files or rendering.

A story is a list of scenes, a scene a list of shots. For rendering, a story is all its shots, in order; scene
boundaries matter only for seeds (as in StoryMem) and for display.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TEXT_KEYS = ("prompt", "video_prompt", "text")
"""Keys of the text in a prompt that is written as an object."""


REFERENCES = -1
"""In ``Shot.recall``: the story's reference images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotOptions:
    """What a shot sets over the job's settings; None is the job's value.

    ``duration`` is in seconds of the clip, ``num_frames`` in frames; at most one of them is given. ``guidance_scale``
    is for the high-noise and the low-noise expert. ``loras`` are what ``weights.lora.settings.lora_settings`` reads,
    with absolute paths; None is no LoRA of its own.
    """

    duration: float | None = None
    num_frames: int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: tuple[float, float] | None = None
    negative_prompt: str | None = None
    loras: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotReference:
    """An image that joins the memory before a shot: always shown after that (``is_sink``), or as the newest one."""

    path: Path
    is_sink: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Entity:
    """A character, place or object of a story. ``references`` are absolute paths of its images."""

    name: str
    description: str = ""
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One clip of a story.

    ``index`` is the position in the story and ``index_in_scene`` the position in its scene, both from 0.
    ``scene_num`` is the number written in the storyboard. ``prompt`` is the full text given to the text encoder (the
    story's style prefix included). ``cut`` is False when the shot continues the one before it.

    ``name`` is empty where none is written, and unique in the story unless it is another program's ``shot_id``.
    ``start_image`` is the picture that the clip begins with, and ``video`` the given clip that is used instead of
    rendering one; both are absolute paths. ``references`` join the memory before this shot. With ``remember=False`` its
    keyframes do not enter the memory. ``entities`` are names in ``Story.entities``. ``recall``: the indices of the
    earlier shots (and ``REFERENCES``) that its memory comes from alone, in ascending order; None is the job's rule.
    """

    index: int
    index_in_scene: int
    scene_num: int
    prompt: str
    cut: bool
    name: str = ""
    options: ShotOptions = ShotOptions()
    start_image: Path | None = None
    video: Path | None = None
    references: tuple[ShotReference, ...] = ()
    remember: bool = True
    entities: tuple[str, ...] = ()
    recall: tuple[int, ...] | None = None

    @property
    def shot_id(self) -> str:
        """Name of the shot in its story, for messages and paths: ``shot_01`` for the first."""
        return f"shot_{self.index + 1:02d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Consecutive shots under one number."""

    scene_num: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A storyboard. ``story_id`` is unique in a job and safe as a folder name (from the file's stem).

    ``reference_images`` (MR2V) are absolute paths; they are the initial memory. ``seed`` overrides the job's seed.
    ``source`` is the file the story came from, None when it was built in Python. ``warnings`` say, a sentence each,
    what was read although it is not the format, and what is not rendered as it is written. Stories of a lower
    ``priority`` start first. ``entities`` are those that shots name, in the order of the storyboard.
    """

    story_id: str
    name: str
    overview: str
    scenes: tuple[Scene, ...]
    reference_images: tuple[Path, ...] = ()
    seed: int | None = None
    style: str = ""
    source: Path | None = None
    warnings: tuple[str, ...] = ()
    priority: int = 0
    entities: tuple[Entity, ...] = ()

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All shots, in order."""
        return tuple(shot for scene in self.scenes for shot in scene.shots)
