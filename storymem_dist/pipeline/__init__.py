"""The Python API: clips, shots with a memory, and whole storyboards, in the process of another program.

``clips`` renders single clips from pictures that the caller keeps. ``models`` finds, loads and frees weights,
``memory`` is the memory of a story as a value, ``shot`` renders one shot with it, and ``story`` a whole storyboard into
a run folder. ``host`` leaves the process as it was found; ``child`` renders on several GPUs in a process of its own.
"""

from storymem_dist.pipeline.availability import Availability, is_storymem_available
from storymem_dist.pipeline.choosing import model_names
from storymem_dist.pipeline.clips import StoryMemPipeline
from storymem_dist.pipeline.images import (
    comfyui_to_storymem,
    frames_to_images,
    save_video,
    storymem_to_comfyui,
    to_frames,
    to_image_tensor,
)
from storymem_dist.pipeline.memory import Remembered, StoryMemory
from storymem_dist.pipeline.models import (
    StoryModels,
    check_models,
    loaded_models,
    open_models,
    unload_all,
)
from storymem_dist.pipeline.progress import Progress
from storymem_dist.pipeline.shot import ShotOutput, check_shot, render_shot, story_seed
from storymem_dist.pipeline.stopping import Interrupted
from storymem_dist.pipeline.story import StoryOutput, check_story, render_story, story_files

__all__ = [
    "Availability",
    "Interrupted",
    "Progress",
    "Remembered",
    "ShotOutput",
    "StoryMemPipeline",
    "StoryMemory",
    "StoryModels",
    "StoryOutput",
    "check_models",
    "check_shot",
    "check_story",
    "comfyui_to_storymem",
    "frames_to_images",
    "is_storymem_available",
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
    "to_image_tensor",
    "unload_all",
]
