"""Nodes about finished clips: the frames that a shot goes on from, and clips joined to one video."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

from storymem_dist.errors import ConfigError
from storymem_dist.pipeline import frames_to_images, save_video, to_frames

NUM_VIDEOS = 10

logger = logging.getLogger(__name__)


class GetMotionFrames(io.ComfyNode):
    """The last frames of a clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemGetMotionFrames",
            display_name="StoryMem Get Motion Frames",
            category="StoryMem/utils",
            description="The last frames of a clip, for a shot that goes on from them (MM2V takes five).",
            inputs=[
                io.Image.Input("video", tooltip="The clip of the shot before."),
                io.Int.Input("num_frames", default=5, min=1, max=10, tooltip="How many frames; MM2V takes five."),
            ],
            outputs=[io.Image.Output("motion_frames", display_name="motion_frames", tooltip="For a shot with MM2V.")],
        )

    @classmethod
    def execute(cls, video: Tensor, num_frames: int) -> io.NodeOutput:
        frames = to_frames(video)
        if len(frames) < num_frames:
            raise ConfigError(f"num_frames={num_frames} is not allowed; the video has only {len(frames)} frames")
        return io.NodeOutput(frames_to_images(frames[-num_frames:]))


class VideoCombine(io.ComfyNode):
    """Clips one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        clips = [
            io.Image.Input(f"video{number}", optional=number > 1, tooltip=f"Clip {number}.")
            for number in range(1, NUM_VIDEOS + 1)
        ]
        fps = io.Int.Input(
            "fps", optional=True, default=16, min=1, max=120, tooltip="Frames per second; 16 for Wan, 12 for nano."
        )
        return io.Schema(
            node_id="StoryMemVideoCombine",
            display_name="StoryMem Video Combine",
            category="StoryMem/utils",
            description="Joins clips of one size: as frames, and as a video for Save Video.",
            inputs=[*clips, fps],
            outputs=[
                io.Image.Output("combined_video", display_name="combined_video", tooltip="All frames."),
                io.Video.Output("video", display_name="video", tooltip="The same as an MP4, for Save Video."),
            ],
        )

    @classmethod
    def execute(cls, video1: Tensor, fps: int = 16, **videos: Any) -> io.NodeOutput:
        more = (videos.get(f"video{number}") for number in range(2, NUM_VIDEOS + 1))
        clips = [to_frames(video) for video in (video1, *more) if video is not None]
        sizes = list(dict.fromkeys(f"{clip.shape[2]}x{clip.shape[1]}" for clip in clips))
        if len(sizes) > 1:
            raise ConfigError(f"the videos have the sizes {', '.join(sizes)}; only clips of one size can be joined")
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix="storymem_", dir=folder), "combined.mp4")
        height, width = (size // 2 * 2 for size in clips[0].shape[1:3])  # a video has even sizes
        if not (height and width):
            raise ConfigError(f"videos of {sizes[0]} pixels cannot be joined; they must have at least 2x2")
        if sizes[0] != f"{width}x{height}":
            logger.warning("StoryMem Video Combine: the output video has %dx%d of %s pixels", width, height, sizes[0])
        save_video([clip[:, :height, :width] for clip in clips], path, fps=fps)
        images = torch.cat([frames_to_images(clip) for clip in clips])
        return io.NodeOutput(images, InputImpl.VideoFromFile(str(path)))
