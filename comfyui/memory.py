"""Nodes about the memory of a story. A memory is a value: every node that changes it returns a new one."""

import logging

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from storymem_dist.errors import WeightsNotFound
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.pipeline import StoryMemory, frames_to_images, to_frames

from .host import device_of
from .loading import STORYMEM_MEMORY

MAX_SIZE = 50
LEAST_SIMILARITY = 1e-6  # what 0, which the widget has and the settings have not, means

logger = logging.getLogger(__name__)


class MemoryBuffer(io.ComfyNode):
    """An empty memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemMemoryBuffer",
            display_name="StoryMem Memory Buffer",
            category="StoryMem/memory",
            description="An empty memory. It keeps all keyframes of a story; these numbers say which a shot is shown.",
            inputs=[
                io.Int.Input(
                    "max_memory_size",
                    default=10,
                    min=1,
                    max=MAX_SIZE,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Most keyframes that a shot is shown. StoryMem is trained with at most ten.",
                ),
                io.Int.Input(
                    "fixed_frames",
                    default=3,
                    min=0,
                    max=10,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How many of them are the oldest ones of the story; the others are the newest.",
                ),
            ],
            outputs=[STORYMEM_MEMORY.Output("memory_out", display_name="memory", tooltip="For the first shot.")],
        )

    @classmethod
    def validate_inputs(cls, max_memory_size: int | None, fixed_frames: int | None) -> bool | str:
        if max_memory_size is not None and not 1 <= max_memory_size <= MAX_SIZE:
            return f"max_memory_size={max_memory_size} is not allowed; it must be between 1 and {MAX_SIZE}"
        if fixed_frames is not None and not 0 <= fixed_frames <= (max_memory_size or MAX_SIZE):
            most = str(MAX_SIZE) if max_memory_size is None else f"max_memory_size={max_memory_size}"
            return f"fixed_frames={fixed_frames} is not allowed; it must be at least 0 and at most {most}"
        return True

    @classmethod
    def execute(cls, max_memory_size: int, fixed_frames: int) -> io.NodeOutput:
        return io.NodeOutput(StoryMemory(max_keyframes=max_memory_size, num_fixed=fixed_frames))


class ReferenceImages(io.ComfyNode):
    """Pictures as initial memory (MR2V)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemReferenceImages",
            display_name="StoryMem Reference Images",
            category="StoryMem/memory",
            description="Puts your own pictures into the memory before the first shot (MR2V): the people, things and "
            "places of the story. The first shot then remembers them.",
            inputs=[
                STORYMEM_MEMORY.Input("memory", tooltip="The memory that the pictures join."),
                io.Image.Input("images", tooltip="One or more pictures. They may have any size."),
            ],
            outputs=[
                STORYMEM_MEMORY.Output("memory_out", display_name="memory", tooltip="The memory with the pictures.")
            ],
        )

    @classmethod
    def execute(cls, memory: StoryMemory, images: Tensor) -> io.NodeOutput:
        return io.NodeOutput(memory.with_references(images))


class UpdateMemory(io.ComfyNode):
    """Adds the keyframes of a video to a memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemUpdateMemory",
            display_name="StoryMem Update Memory",
            category="StoryMem/memory",
            description="Chooses keyframes of a video by StoryMem's rules and adds those that the memory has not got. "
            "Shots do this themselves: this node is for videos from elsewhere.",
            inputs=[
                STORYMEM_MEMORY.Input("memory", tooltip="The memory so far; it is not changed."),
                io.Image.Input("video", tooltip="The frames of the video."),
                io.Int.Input(
                    "extract_count", optional=True, default=3, min=1, max=10, tooltip="Most keyframes of this video."
                ),
                io.Float.Input(
                    "similarity_threshold",
                    optional=True,
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A frame is new if it is less similar than this to the keyframe before it, and already "
                    "known if it is more similar than this to one in memory.",
                ),
            ],
            outputs=[
                STORYMEM_MEMORY.Output("updated_memory", display_name="updated_memory", tooltip="For the next shot."),
                io.Image.Output(
                    "keyframes",
                    display_name="keyframes",
                    tooltip="The new keyframes; if all are known already, those that were chosen. Nothing after this "
                    "output runs if no frame is good enough.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, memory: StoryMemory, video: Tensor, extract_count: int = 3, similarity_threshold: float = 0.9
    ) -> io.NodeOutput:
        frames = to_frames(video)
        options = {
            "extract_count": extract_count,
            "similarity_threshold": max(similarity_threshold, LEAST_SIMILARITY),
            "device": device_of("auto"),
        }
        try:
            found = memory.remember(frames, **options)
        except WeightsNotFound as error:
            if memory.selection is not None:  # the models of this memory need them
                raise
            logger.warning("keyframes are compared by colour (memory.similarity=hsv): %s", error)
            found = memory.remember(frames, **options, selection=MemorySettings(similarity="hsv"))
        known = [one["frame_index"] for one in found.decisions if one["verdict"] == "duplicate"]
        chosen = found.keyframes if len(found.keyframes) else frames[known]
        if not len(chosen):
            logger.warning("StoryMem Update Memory: no frame of this video passes the quality test")
        return io.NodeOutput(found.memory, frames_to_images(chosen) if len(chosen) else ExecutionBlocker(None))


class MemoryVisualizer(io.ComfyNode):
    """A picture of a memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemMemoryVisualizer",
            display_name="StoryMem Memory Visualizer",
            category="StoryMem/utils",
            description="One picture of all keyframes in a memory, with the shots they come from.",
            inputs=[STORYMEM_MEMORY.Input("memory", tooltip="The memory to show.")],
            outputs=[io.Image.Output("visualization", display_name="visualization", tooltip="One picture.")],
        )

    @classmethod
    def execute(cls, memory: StoryMemory) -> io.NodeOutput:
        return io.NodeOutput(frames_to_images(memory.contact_sheet()[None]))
