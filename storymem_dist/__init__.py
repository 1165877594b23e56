"""storymem_dist: a multi-GPU batch renderer for StoryMem on Wan2.2-A14B.

Importing the package does no work; the public names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storymem_dist.errors import StoryMemError, WeightsNotFound
    from storymem_dist.pipeline import (
        Interrupted,
        Progress,
        Remembered,
        ShotOutput,
        StoryMemory,
        StoryMemPipeline,
        StoryModels,
        StoryOutput,
        check_models,
        check_shot,
        check_story,
        comfyui_to_storymem,
        frames_to_images,
        is_storymem_available,
        loaded_models,
        model_names,
        open_models,
        render_shot,
        render_story,
        save_video,
        story_files,
        story_seed,
        storymem_to_comfyui,
        to_frames,
        unload_all,
    )
    from storymem_dist.story.loading import load_storyboard
    from storymem_dist.story.schema import Scene, Shot, Story

    __version__: str

_HOMES = {
    "Interrupted": "pipeline",
    "Progress": "pipeline",
    "Remembered": "pipeline",
    "Scene": "story.schema",
    "Shot": "story.schema",
    "ShotOutput": "pipeline",
    "Story": "story.schema",
    "StoryMemError": "errors",
    "StoryMemPipeline": "pipeline",
    "StoryMemory": "pipeline",
    "StoryModels": "pipeline",
    "StoryOutput": "pipeline",
    "WeightsNotFound": "errors",
    "check_models": "pipeline",
    "check_shot": "pipeline",
    "check_story": "pipeline",
    "comfyui_to_storymem": "pipeline",
    "frames_to_images": "pipeline",
    "is_storymem_available": "pipeline",
    "load_storyboard": "story.loading",
    "loaded_models": "pipeline",
    "model_names": "pipeline",
    "open_models": "pipeline",
    "render_shot": "pipeline",
    "render_story": "pipeline",
    "save_video": "pipeline",
    "story_files": "pipeline",
    "story_seed": "pipeline",
    "storymem_to_comfyui": "pipeline",
    "to_frames": "pipeline",
    "unload_all": "pipeline",
}

__all__ = [
    "Interrupted",
    "Progress",
    "Remembered",
    "Scene",
    "Shot",
    "ShotOutput",
    "Story",
    "StoryMemError",
    "StoryMemPipeline",
    "StoryMemory",
    "StoryModels",
    "StoryOutput",
    "WeightsNotFound",
    "check_models",
    "check_shot",
    "check_story",
    "comfyui_to_storymem",
    "frames_to_images",
    "is_storymem_available",
    "load_storyboard",
    "loaded_models",
    "model_names",
    "open_models",
    "render_shot",
    "render_story",
    "save_video",
    "story_files",
    "story_seed",
    "storymem_to_comfyui",
    "to_frames",
    "unload_all",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def _version() -> str:
    """The installed version, from the package's metadata; ``unknown`` in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # costs more than the rest of this module

    try:
        return version("storymem_dist")
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
