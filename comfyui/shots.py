"""Nodes that render one shot."""

import logging
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.pipeline import StoryMemory, check_shot, frames_to_images, render_shot

from .host import Models, Watcher
from .loading import STORYMEM_MEMORY, STORYMEM_MODELS

MODES = ["M2V", "MI2V", "MM2V"]
UNCONNECTED = object()  # an input that has no link; ComfyUI validates a linked one as None

logger = logging.getLogger(__name__)


def prompt_input() -> io.String.Input:
    """The text of a shot."""
    return io.String.Input(
        "prompt", multiline=True, default="", tooltip="What this shot shows: one paragraph, as for a film crew."
    )


def num_frames_input() -> io.Int.Input:
    """Its length."""
    return io.Int.Input(
        "num_frames", default=81, min=5, max=161, step=4, tooltip="Length in frames, 4n+1. 81 frames are 5 s at 16 fps."
    )


def size_inputs(*, optional: bool) -> list[io.Int.Input]:
    """Its size."""
    return [
        io.Int.Input(
            "width",
            optional=optional,
            default=832,
            min=16,
            max=4096,
            step=16,
            tooltip="Multiple of 16. One story, one size.",
        ),
        io.Int.Input(
            "height",
            optional=optional,
            default=480,
            min=16,
            max=4096,
            step=16,
            tooltip="Multiple of 16. One story, one size.",
        ),
    ]


def sampling_inputs() -> list[Any]:
    """How it is sampled."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="The same seed, prompt, memory and settings give the same clip.",
        ),
        io.Int.Input("steps", default=40, min=1, max=100, tooltip="Denoising steps; StoryMem uses 40."),
        io.Float.Input(
            "cfg_scale",
            default=3.5,
            min=1.0,
            max=20.0,
            step=0.5,
            tooltip="Guidance: how strictly the clip follows the prompt. StoryMem uses 3.5; 1 turns guidance off and "
            "is twice as fast.",
        ),
    ]


def keyframes_input() -> io.Int.Input:
    """What it leaves in memory."""
    return io.Int.Input(
        "keyframes_to_extract",
        optional=True,
        default=3,
        min=1,
        max=10,
        tooltip="Most keyframes that this shot adds to the memory.",
    )


def shot_outputs() -> list[Any]:
    """What a shot gives."""
    return [
        io.Image.Output("video", display_name="video", tooltip="The frames of the clip."),
        STORYMEM_MEMORY.Output("memory_out", display_name="memory", tooltip="The memory with this shot's keyframes."),
        io.Image.Output("last_frame", display_name="last_frame", tooltip="For a shot that continues this one (MI2V)."),
    ]


def render(models: Models, prompt: str, memory: StoryMemory, mode: str, **options: Any) -> io.NodeOutput:
    """Render one shot, with a progress bar; an interruption ends it after the running step."""
    check_shot(mode=mode, continuation=models.models.continuation)
    watcher = Watcher()
    models.make_room(mode)
    shot = render_shot(
        models.models,
        prompt,
        memory=memory,
        mode=mode,
        **options,
        on_step=watcher.show,
        on_load=lambda what, done, total: watcher.show(done, total),
        should_stop=watcher.raise_if_interrupted,
    )
    for warning in shot.warnings:
        logger.warning("StoryMem: %s", warning)
    return io.NodeOutput(shot.images(), shot.memory, frames_to_images(shot.last_frame))


class FirstShot(io.ComfyNode):
    """The first shot of a story."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemFirstShot",
            display_name="StoryMem First Shot",
            category="StoryMem/generation",
            description="Renders the first shot of a story: from text, from reference images in the memory, or from an "
            "image that the clip begins with.",
            inputs=[
                STORYMEM_MODELS.Input("models", tooltip="From the Model Loader."),
                STORYMEM_MEMORY.Input("memory", tooltip="An empty memory, or one with reference images."),
                prompt_input(),
                num_frames_input(),
                *size_inputs(optional=False),
                *sampling_inputs(),
                io.Boolean.Input(
                    "use_t2v",
                    default=True,
                    tooltip="On: the clip comes from text (T2V), or from text and reference images if the memory has "
                    "some (MR2V); init_image is not used. Off: it begins with init_image, or remembers what is in the "
                    "memory.",
                ),
                io.Image.Input(
                    "init_image",
                    optional=True,
                    tooltip="The image that the clip begins with. Needs use_t2v off, and the MI2V LoRA.",
                ),
                keyframes_input(),
            ],
            outputs=shot_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls, num_frames: int | None, width: int | None, height: int | None, steps: int | None, cfg_scale: float | None
    ) -> bool | str:
        return _checked(num_frames=num_frames, width=width, height=height, steps=steps, cfg_scale=cfg_scale)

    @classmethod
    def execute(
        cls,
        models: Models,
        memory: StoryMemory,
        prompt: str,
        num_frames: int,
        width: int,
        height: int,
        seed: int,
        steps: int,
        cfg_scale: float,
        use_t2v: bool,
        init_image: Tensor | None = None,
        keyframes_to_extract: int = 3,
    ) -> io.NodeOutput:
        if use_t2v:
            mode = "m2v" if any(one.shot_index < 0 for one in memory.keyframes) else "t2v"
            if init_image is not None:
                logger.warning("StoryMem First Shot: init_image is not used, because use_t2v is on")
                init_image = None
        elif init_image is not None:
            mode = "mi2v"
        elif len(memory):
            mode = "m2v"
        else:
            raise ConfigError(
                "use_t2v is off, but no init_image is connected and the memory is empty; connect one, or turn it on"
            )
        return render(
            models,
            prompt,
            memory,
            mode,
            num_frames=num_frames,
            width=width,
            height=height,
            seed=seed,
            steps=steps,
            cfg_scale=cfg_scale,
            first_frame=init_image,
            is_continuation=False,
            extract_count=keyframes_to_extract,
        )


class ContinuationShot(io.ComfyNode):
    """A later shot of a story."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemContinuationShot",
            display_name="StoryMem Continuation Shot",
            category="StoryMem/generation",
            description="Renders a shot that remembers the shots before it. M2V is a cut; MI2V goes on from the last "
            "frame of the shot before, MM2V from its last five.",
            inputs=[
                STORYMEM_MODELS.Input("models", tooltip="From the Model Loader."),
                STORYMEM_MEMORY.Input("memory", tooltip="The memory that the shot before has left."),
                prompt_input(),
                io.Combo.Input(
                    "generation_mode",
                    options=MODES,
                    default="MI2V",
                    tooltip="M2V: a cut, a new view of the same story. MI2V: goes on from first_frame. MM2V: goes on "
                    "from motion_frames, so that movement goes on. The loader's m2v_lora must be the same.",
                ),
                num_frames_input(),
                *sampling_inputs(),
                io.Boolean.Input(
                    "is_scene_cut",
                    default=False,
                    tooltip="On: a cut, as in the paper: the memory stays, first_frame and motion_frames are not used.",
                ),
                io.Image.Input("first_frame", optional=True, tooltip="MI2V: last_frame of the shot before."),
                io.Image.Input(
                    "motion_frames", optional=True, tooltip="MM2V: the last five frames of the shot before."
                ),
                *size_inputs(optional=True),
                keyframes_input(),
            ],
            outputs=shot_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls,
        generation_mode: str | None,
        is_scene_cut: bool | None,
        num_frames: int | None,
        steps: int | None,
        cfg_scale: float | None,
        width: int | None = None,
        height: int | None = None,
        first_frame: object = UNCONNECTED,
        motion_frames: object = UNCONNECTED,
    ) -> bool | str:
        if generation_mode not in (None, *MODES):
            return f"generation_mode={generation_mode} is not allowed; choose {', '.join(MODES)}"
        if is_scene_cut is False:
            if generation_mode == "MI2V" and first_frame is UNCONNECTED:
                return (
                    "MI2V goes on from first_frame, which is not connected; connect last_frame of the shot before, "
                    "choose M2V, or turn is_scene_cut on"
                )
            if generation_mode == "MM2V" and motion_frames is UNCONNECTED:
                return (
                    "MM2V goes on from motion_frames, which is not connected; connect StoryMem Get Motion Frames, "
                    "choose M2V, or turn is_scene_cut on"
                )
        return _checked(num_frames=num_frames, width=width, height=height, steps=steps, cfg_scale=cfg_scale)

    @classmethod
    def execute(
        cls,
        models: Models,
        memory: StoryMemory,
        prompt: str,
        generation_mode: str,
        num_frames: int,
        seed: int,
        steps: int,
        cfg_scale: float,
        is_scene_cut: bool,
        first_frame: Tensor | None = None,
        motion_frames: Tensor | None = None,
        width: int = 832,
        height: int = 480,
        keyframes_to_extract: int = 3,
    ) -> io.NodeOutput:
        mode = "m2v" if is_scene_cut else generation_mode.lower()
        return render(
            models,
            prompt,
            memory,
            mode,
            num_frames=num_frames,
            width=width,
            height=height,
            seed=seed,
            steps=steps,
            cfg_scale=cfg_scale,
            first_frame=first_frame if mode == "mi2v" else None,
            motion_frames=motion_frames if mode == "mm2v" else None,
            extract_count=keyframes_to_extract,
        )


def _checked(**numbers: Any) -> bool | str:
    """Return True, or the sentence about the first number that no shot can have. None: not known yet."""
    try:
        check_shot(mode="m2v", **numbers)
    except StoryMemError as error:
        return str(error)
    return True
