"""Nodes that read and render a whole storyboard."""

import hashlib
import logging
import uuid
from pathlib import Path

import folder_paths
from comfy_api.latest import InputImpl, io, ui

from storymem_dist import Story
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.pipeline import StoryMemory, check_story, frames_to_images, render_story, story_files

from .host import Models, Watcher, output_folder
from .loading import STORYMEM_MEMORY, STORYMEM_MODELS

STORYMEM_STORY = io.Custom("STORYMEM_STORY")

TYPED = "(text)"
SUFFIXES = (".json", ".yaml", ".yml", ".txt")

logger = logging.getLogger(__name__)


def read(file: str, text: str) -> Story:
    """Return the story that the two widgets of the Storyboard node name; raises ``StoryMemError``."""
    folder = Path(folder_paths.get_input_directory())
    if file == TYPED:
        return check_story(text, base_folder=folder)
    if text.strip():
        raise ConfigError(f"both a file and a text are given; choose {TYPED} as file, or empty the text")
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"file={file!r} is not allowed; it names a file inside ComfyUI's input folder")
    return check_story(path)


class Storyboard(io.ComfyNode):
    """A storyboard, read and checked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = Path(folder_paths.get_input_directory())
        files = sorted(
            path.relative_to(folder).as_posix()
            for path in (folder.rglob("*") if folder.is_dir() else ())
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        return io.Schema(
            node_id="StoryMemStoryboard",
            display_name="StoryMem Storyboard",
            category="StoryMem/story",
            description="Reads a storyboard: StoryMem's JSON, YAML, or plain prompts. Mistakes are shown before "
            "anything is rendered.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[TYPED, *files],
                    default=TYPED,
                    tooltip=f"A storyboard in ComfyUI's input folder, or {TYPED} for the text below.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    placeholder="A storyboard as JSON or YAML",
                    tooltip=f"The storyboard itself, if file is {TYPED}. Paths in it are relative to the input folder.",
                ),
            ],
            outputs=[
                STORYMEM_STORY.Output("story", display_name="story", tooltip="For Render Story."),
                io.Int.Output("shots", display_name="shots", tooltip="How many shots it has."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None, text: str | None) -> bool | str:
        if file is None or text is None:
            return True
        try:
            read(file, text)
        except StoryMemError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, text: str | None = None) -> str:
        """A digest of the storyboard and of the sizes and times of all files that it names."""
        if file is None or text is None:
            return ""
        digest = hashlib.sha256()
        chosen = [] if file == TYPED else [Path(folder_paths.get_input_directory(), file)]
        for path in (*chosen, *story_files(read(file, text))):
            status = path.stat()
            digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @classmethod
    def execute(cls, file: str, text: str) -> io.NodeOutput:
        story = read(file, text)
        for warning in story.warnings:
            logger.warning("StoryMem Storyboard: %s", warning)
        return io.NodeOutput(story, len(story.shots))


class RenderStory(io.ComfyNode):
    """A whole story, rendered into a run folder that can be resumed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemRenderStory",
            display_name="StoryMem Render Story",
            category="StoryMem/story",
            description="Renders all shots of a storyboard into a folder of ComfyUI's output folder. Interrupted, it "
            "keeps everything and goes on when it is queued again; an edited shot is rendered again with those that "
            "remember it, and nothing else.",
            is_output_node=True,
            inputs=[
                STORYMEM_MODELS.Input("models", tooltip="From the Model Loader."),
                STORYMEM_STORY.Input("story", tooltip="From the Storyboard."),
                STORYMEM_MEMORY.Input(
                    "memory", optional=True, tooltip="Its keyframes become the story's first reference images (MR2V)."
                ),
                io.String.Input(
                    "output_name",
                    default="storymem/story",
                    tooltip="Folder inside ComfyUI's output folder. The same folder again resumes what is in it.",
                ),
                io.Int.Input(
                    "gpus",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="1: in this process. More: a process of its own on that many GPUs, which render different "
                    "shots at the same time, or one shot together with the loader's use_fsdp.",
                ),
                io.String.Input(
                    "rerender",
                    default="",
                    tooltip="Shots to render again although nothing has changed, with those that remember them: 3, "
                    "shot_03 or the shot's name; several with commas.",
                ),
                io.String.Input(
                    "settings",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="sampler.num_inference_steps=20",
                    tooltip="Settings as of storymem-render, one in a line, such as sampler.height=480.",
                ),
            ],
            outputs=[
                io.Video.Output("story_video", display_name="story", tooltip="The whole story as a video."),
                io.String.Output("run_folder", display_name="run_folder", tooltip="Folder with clips and records."),
                io.Image.Output("contact_sheet", display_name="contact_sheet", tooltip="All keyframes in one picture."),
                STORYMEM_MEMORY.Output("memory_out", display_name="memory", tooltip="All keyframes, for more shots."),
            ],
        )

    @classmethod
    def validate_inputs(cls, output_name: str | None) -> bool | str:
        try:
            if output_name is not None:
                output_folder(output_name)
        except StoryMemError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, output_name: str | None = None, **_: object) -> str:
        """The same as long as the run folder is as this server has left it, so that a lost video is made again."""
        left = None if output_name is None else _left.get(output_folder(output_name))
        return "" if left is None or left == _identity(left[0]) else uuid.uuid4().hex

    @classmethod
    def execute(
        cls,
        models: Models,
        story: Story,
        output_name: str,
        gpus: int,
        rerender: str,
        memory: StoryMemory | None = None,
        settings: str = "",
    ) -> io.NodeOutput:
        folder, watcher = output_folder(output_name), Watcher()
        if gpus == 1:
            models.make_room("m2v")
        request = _requests.setdefault((folder, rerender), uuid.uuid4().hex)
        done = render_story(
            models.models,
            story,
            folder,
            memory=memory,
            rerender=rerender,
            rerender_id=request,
            gpus=gpus,
            fsdp=models.fsdp,
            overrides=tuple(line.strip() for line in settings.splitlines() if line.strip()),
            on_progress=lambda at: watcher.show(at.done_steps, at.total_steps, at.preview),
            should_stop=watcher.raise_if_interrupted,
        )
        del _requests[folder, rerender]
        _left[folder] = _identity(done.video)
        logger.info("StoryMem Render Story: %d shots rendered, %d found", done.num_rendered, done.num_found)
        place = done.video.relative_to(Path(folder_paths.get_output_directory()).resolve())
        shown = ui.SavedResult(place.name, place.parent.as_posix(), io.FolderType.output)
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(done.video)),
            str(done.run_folder),
            frames_to_images(done.contact_sheet[None]),
            done.memory,
            ui=ui.PreviewVideo([shown]),
        )


_Identity = tuple[Path, int, int, int]

_left: dict[Path, _Identity] = {}
"""The video of each run folder as this server has left it."""

_requests: dict[tuple[Path, str], str] = {}
"""Renders that have not succeeded yet: an interrupted ``rerender`` that is queued again goes on."""


def _identity(video: Path) -> _Identity | None:
    try:
        status = video.stat()
    except OSError:
        return None
    return video, status.st_ino, status.st_size, status.st_mtime_ns
