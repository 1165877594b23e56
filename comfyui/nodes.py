"""All StoryMem nodes. Each module says what its nodes do; rendering itself is the package ``storymem_dist``."""

from comfy_api.latest import ComfyExtension, io

from .loading import Info, ModelLoader
from .memory import MemoryBuffer, MemoryVisualizer, ReferenceImages, UpdateMemory
from .shots import ContinuationShot, FirstShot
from .story import RenderStory, Storyboard
from .video import GetMotionFrames, VideoCombine

NODES: list[type[io.ComfyNode]] = [
    ModelLoader,
    MemoryBuffer,
    ReferenceImages,
    UpdateMemory,
    FirstShot,
    ContinuationShot,
    Storyboard,
    RenderStory,
    VideoCombine,
    GetMotionFrames,
    MemoryVisualizer,
    Info,
]


class StoryMemExtension(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all nodes."""
        return NODES
