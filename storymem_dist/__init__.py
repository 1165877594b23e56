"""storymem_dist: a multi-GPU batch renderer for StoryMem on Wan2.2-A14B.

Importing the package does no work; the public names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storymem_dist.errors import StoryMemError, WeightsNotFound
    from storymem_dist.pipeline import StoryMemPipeline, comfyui_to_storymem, is_storymem_available, storymem_to_comfyui
    from storymem_dist.story.loading import load_storyboard
    from storymem_dist.story.schema import Scene, Shot, Story

    __version__: str

_HOMES = {
    "Scene": "story.schema",
    "Shot": "story.schema",
    "Story": "story.schema",
    "StoryMemError": "errors",
    "StoryMemPipeline": "pipeline",
    "WeightsNotFound": "errors",
    "comfyui_to_storymem": "pipeline",
    "is_storymem_available": "pipeline",
    "load_storyboard": "story.loading",
    "storymem_to_comfyui": "pipeline",
}

__all__ = [
    "Scene",
    "Shot",
    "Story",
    "StoryMemError",
    "StoryMemPipeline",
    "WeightsNotFound",
    "comfyui_to_storymem",
    "is_storymem_available",
    "load_storyboard",
    "storymem_to_comfyui",
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
