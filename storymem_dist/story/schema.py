"""A storyboard after reading and checking, as plain frozen values. Knows nothing about files or rendering.

A story is a list of scenes, a scene a list of shots. For rendering, all shots of a story form one *chain*, in order;
scene boundaries matter only for seeds (as in StoryMem) and for display.
"""

from dataclasses import dataclass
from pathlib import Path

PROMPT_TEXT_KEYS = ("prompt", "video_prompt", "text")
"""Keys of the text in a prompt that is written as an object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One clip of a story.

    ``index`` is the position in the story's chain and ``index_in_scene`` the position in its scene, both from 0.
    ``scene_num`` is the number written in the storyboard. ``prompt`` is the full text given to the text encoder (the
    story's style prefix included). ``cut`` is False when the shot continues the one before it.
    """

    index: int
    index_in_scene: int
    scene_num: int
    prompt: str
    cut: bool

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
    what was read although it is not the format, and what is not rendered as it is written.
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

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All shots, in chain order."""
        return tuple(shot for scene in self.scenes for shot in scene.shots)
