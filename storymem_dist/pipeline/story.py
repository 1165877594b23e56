"""A whole storyboard into a run folder: in this process, or on several GPUs in a process of its own.

The same job as ``storymem-render`` with the same settings, so fingerprints and bytes are the same, and either can
continue what the other began.
"""

import hashlib
import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.shot_names import shot_ids
from storymem_dist.artifacts.video import read_clip, read_png, write_png
from storymem_dist.config.points import Point
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_check import check_shots
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import FAILED, STOPPED
from storymem_dist.errors import ConfigError, RunFolderError, ShotError, StoryboardError, require_whole
from storymem_dist.events import Event, Observer, StampedEvent
from storymem_dist.files import canonical_json, write_bytes
from storymem_dist.memory.bank import Keyframe, reference_keyframes
from storymem_dist.observe.run.files import RunFiles, StoryFiles
from storymem_dist.pipeline.child import ChildFailed, render_in_child
from storymem_dist.pipeline.choosing import compose, joined, own_overrides, quoted_value
from storymem_dist.pipeline.memory import StoryMemory
from storymem_dist.pipeline.models import StoryModels
from storymem_dist.pipeline.progress import Progress, ProgressFold
from storymem_dist.pipeline.sheet import Labelled, picture_grid
from storymem_dist.pipeline.shot import check_clip_fits
from storymem_dist.pipeline.stopping import Interrupted, StopAsker
from storymem_dist.render.given import given_image
from storymem_dist.render.inputs import kinds_of
from storymem_dist.render.job import run_job
from storymem_dist.render.process import JobProcess
from storymem_dist.story.loading import StoryBatch, load_storyboard, load_storyboard_text
from storymem_dist.story.parsing import PROMPTS_SUFFIX, STORYBOARD_SUFFIXES
from storymem_dist.story.schema import Story
from storymem_dist.story.writing import story_document

INPUTS = "inputs"
"""The folder in a run folder for what was given as values: the storyboard, and the pictures of a memory."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoryOutput:
    """A rendered story.

    ``video`` is its ``story.mp4`` and ``clips`` are those of its shots. ``memory`` has the keyframes of all shots,
    ``contact_sheet`` (uint8 ``[H, W, 3]``) a frame of each shot. ``num_rendered`` shots were rendered by this call,
    ``num_found`` were there; ``resumed_at`` is the step at which the first one continued (0: at none).
    """

    run_folder: Path
    video: Path
    clips: tuple[Path, ...]
    memory: StoryMemory
    contact_sheet: Tensor
    num_rendered: int
    num_found: int
    resumed_at: int


def check_story(
    story: Story | str | Path,
    models: StoryModels | None = None,
    *,
    base_folder: str | Path | None = None,
    name: str = "story",
    overrides: Sequence[str] = (),
) -> Story:
    """Read and check one storyboard: a file, or its text. Loads no weights.

    Args:
        story: a path, a text (JSON, YAML, or one prompt), or a story that was read before.
        models: check every shot against their settings, too.
        base_folder: where relative paths in a text are searched; None: the current folder.
        name: gives a text its story's id, and its name if it has none.
        overrides: further settings, as of ``render_story``.

    Raises ``StoryboardError`` with the first thing that is wrong and where, and other ``StoryMemError``.
    """
    if not isinstance(story, Story):
        if _is_path(story):
            story = load_storyboard(Path(story).expanduser())
        else:
            story = load_storyboard_text(str(story), folder=Path(base_folder or ".").absolute(), name=name)
    if models is not None:
        settings = compose(joined(models.overrides, own_overrides(overrides))).settings
        batch = StoryBatch(stories=(story,), rejected=())
        checked = check_shots(batch, settings.sampler, settings.memory, partial(check_clip_fits, models))
        if checked.rejected:
            raise StoryboardError(checked.rejected[0].message)
        story = checked.stories[0]
        for kind in kinds_of([story], settings):
            if kind not in models.weights.checkpoints:
                raise ConfigError(f"the story needs the {kind.upper()} model, which was not opened")
    return story


def story_files(story: Story) -> tuple[Path, ...]:
    """All files that a story names: pictures, clips and LoRAs (which may be folders), each once."""
    paths = [*story.reference_images, *(path for entity in story.entities for path in entity.references)]
    for shot in story.shots:
        paths += [*(reference.path for reference in shot.references)]
        paths += [path for path in (shot.start_image, shot.video) if path is not None]
        paths += [Path(lora["path"]) for lora in shot.options.loras or ()]
    return tuple(dict.fromkeys(paths))


def render_story(
    models: StoryModels,
    story: Story | str | Path,
    output: str | Path,
    *,
    memory: StoryMemory | None = None,
    rerender: str = "",
    rerender_id: str = "",
    gpus: int = 1,
    fsdp: bool = False,
    overrides: Sequence[str] = (),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_event: Callable[[StampedEvent], None] = lambda stamped: None,
    should_stop: Callable[[], object] = lambda: False,
) -> StoryOutput:
    """Render a storyboard into the run folder ``output``; the same call again renders only what is missing.

    Args:
        models: of ``open_models``. With one GPU they are loaded if they are not, and stay loaded.
        story: as of ``check_story``.
        output: the run folder; one that ``storymem-render`` made is continued, and the other way round.
        memory: its keyframes are the story's first reference images (MR2V), before its own.
        rerender: shots to render again with those that need them, with commas: ``3``, ``shot_03`` or a shot's name.
            The same inputs give the same pixels: for another picture give the shot another ``seed``.
        rerender_id: requests with the same id count once, so that an interrupted one continues. Empty: a new one.
        gpus: with more than one, the models are freed here, and ``storymem-render launch=torchrun`` renders as a child.
        fsdp: with several GPUs, each holds a part of the weights.
        overrides: further settings of this call, as on the command line, such as ``sampler.num_frames=17``.
        on_progress: called in this thread when something changed. ``on_event``: with every event.
        should_stop: asked between steps and while it waits; a true value, or an exception, stops the render.

    Raises:
        Interrupted: ``should_stop`` returned a true value; its own exception comes instead of this. The running step is
            finished and saved in either case.
        StoryboardError, ConfigError, WeightsNotFound, CheckpointError, RunFolderError: nothing was begun.
        ShotError: a shot failed; the others are kept, and the same call tries it again.
    """
    require_whole("gpus", gpus, 1, 1024)
    asker, run = StopAsker(should_stop), RunFolder(Path(output).expanduser().absolute())
    given = story
    story = check_story(story, models, overrides=overrides)
    board = Path(given).expanduser() if not isinstance(given, Story) and _is_path(given) else None
    known = [(story.story_id, {shot.shot_id: shot.name for shot in story.shots})]
    again = shot_ids([f"{story.story_id}:{name.strip()}" for name in rerender.split(",") if name.strip()], known)
    asker.check("stopped before the first step")
    run.open()
    if board is None:
        board = _write_story(run.root / INPUTS, story)
    pictures = _write_pictures(run.root / INPUTS, memory)
    if again:
        run.rerender(again, rerender_id or secrets.token_hex(8))
    several = ["parallel=auto", "parallel.compile=auto", *(["parallel.weights=fsdp"] if fsdp else [])]
    settings = joined(
        models.overrides,
        several if gpus > 1 else [],
        ["tracking.report=true", "dispatch.retry_failed=true"],
        overrides,
        [
            f"stories.path={quoted_value(str(board.absolute()))}",
            f"stories.references=[{','.join(quoted_value(str(path)) for path in pictures)}]",
            f"output={quoted_value(str(run.root))}",
        ],
    )
    point = compose(settings)
    watcher = _Watcher(ProgressFold.of(story, point.settings.sampler, run.root), on_progress, on_event, asker)
    if gpus > 1:
        models.unload()
        try:
            render_in_child(models.device, gpus, settings, run.root, watcher.receive, asker)
        except ChildFailed as error:
            _raise_failures(watcher.fold.failures, error)
            raise
    else:
        _render_here(models, point, watcher)
    with models.rendering():
        return _output(run, story, point, memory, watcher.fold)


def _render_here(models: StoryModels, point: Point, watcher: "_Watcher") -> None:
    """Render in this process. Raises as ``render_story``."""
    with models.rendering():
        process = JobProcess(
            device=models.device, ask=watcher.ask, observed=watcher.observing, start_engine=models.start_engine
        )
        outcome = run_job([models.with_loaded_experts(point)], process=process)
    watcher.drain()
    summary = outcome.summary
    if summary.state == STOPPED:
        watcher.asker.check("the render was stopped; the same call continues it")
        raise Interrupted(f"the render in {point.settings.output} was stopped ({summary.reason})")
    if summary.state == FAILED:
        _raise_failures({one.shot_id: one.reason for one in summary.failures})
        raise ShotError(summary.reason)


def _raise_failures(failures: Mapping[str, str], cause: Exception | None = None) -> None:
    """Raise ``ShotError`` with the reason of each shot that failed."""
    if failures:
        reasons = "; ".join(f"{shot_id}: {reason}" for shot_id, reason in failures.items())
        raise ShotError(f"{reasons} (finished shots are kept; the same call continues)") from cause


class _Watcher:
    """Passes events on in the thread that renders, whichever thread they come from."""

    def __init__(
        self,
        fold: ProgressFold,
        on_progress: Callable[[Progress], None],
        on_event: Callable[[StampedEvent], None],
        asker: StopAsker,
    ) -> None:
        self.fold = fold
        self.asker = asker
        self._on_progress = on_progress
        self._on_event = on_event
        self._thread = threading.get_ident()
        self._waiting: deque[StampedEvent] = deque()
        self._is_draining = False

    def ask(self, stop: StopSwitch) -> None:
        """Ask the host whether to stop. Another thread does not ask: hosts know the thread that called."""
        if threading.get_ident() == self._thread:
            self.drain()
            if self.asker.should_stop():
                stop.request("asked by the program")

    def observing(self, observer: Observer) -> Observer:
        """Return an observer that notes every event here and passes it on."""
        return _Noting(self, observer)

    def receive(self, stamped: StampedEvent) -> None:
        """Note an event, and pass on what waits if this is the thread that renders."""
        self._waiting.append(stamped)
        if threading.get_ident() == self._thread:
            self.drain()

    def drain(self) -> None:
        """Call the host with the events that wait. An exception of its own stops the render as an answer would."""
        if self._is_draining:
            return
        self._is_draining = True
        try:
            while self._waiting:
                stamped = self._waiting.popleft()
                progress = self.fold.apply(stamped.event)
                self.asker.guard(partial(self._on_event, stamped))
                if progress is not None:
                    self.asker.guard(partial(self._on_progress, progress))
        finally:
            self._is_draining = False


class _Noting:
    def __init__(self, watcher: _Watcher, observer: Observer) -> None:
        self._watcher = watcher
        self._observer = observer
        self._sequence = 0

    def notify(self, event: Event) -> None:
        self._observer.notify(event)
        self._sequence += 1
        stamped = StampedEvent(event=event, wall_time=time.time(), writer="", replica=0, sequence=self._sequence)
        self._watcher.receive(stamped)


def _is_path(story: str | Path) -> bool:
    if isinstance(story, Path):
        return True
    if not isinstance(story, str):
        raise StoryboardError(f"a story is a {type(story).__name__}; allowed: a Story, a path, or the text of one")
    if story.startswith(("/", "./", "../", "~/")) and "\n" not in story:
        return True
    suffix = os.path.splitext(story)[1].lower()  # noqa: PTH122 - a text may be longer than a path
    return "\n" not in story and suffix in (*STORYBOARD_SUFFIXES, PROMPTS_SUFFIX)


def _write_story(folder: Path, story: Story) -> Path:
    """Write a story that has no file, and make sure that it is read as it is. Raises ``StoryboardError``."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{story.story_id}.json"
    data = json.dumps(story_document(story), ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")
    if not path.exists() or path.read_bytes() != data:
        write_bytes(path, data)
    left_out = {"source": None, "warnings": (), "style": "", "priority": 0}
    if replace(load_storyboard(path), **left_out) != replace(story, **left_out):  # type: ignore[arg-type]
        raise StoryboardError(f"{path}: the story cannot be written as a storyboard; give it as a file")
    return path


def _write_pictures(folder: Path, memory: StoryMemory | None) -> list[Path]:
    """Write the images of a memory, named by their contents."""
    paths = []
    for keyframe in memory.keyframes if memory is not None else ():
        digest = hashlib.sha256(canonical_json(list(keyframe.image.shape)))
        digest.update(keyframe.image.contiguous().numpy().data)
        path = folder / "memory" / f"{digest.hexdigest()[:24]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_png(path, keyframe.image)
        paths.append(path)
    return paths


def _output(run: RunFolder, story: Story, point: Point, memory: StoryMemory | None, fold: ProgressFold) -> StoryOutput:
    video = run.story_video(story.story_id)
    if not video.exists():
        raise RunFolderError(f"{run.root} has no {video.name} of the story; was a shot removed meanwhile?")
    files, found = RunFiles(run.root), {one.story_id: one for one in RunFiles(run.root).stories()}
    of_story = found[story.story_id]
    clips = tuple(run.story_folder(story.story_id) / f"{shot.shot_id}.mp4" for shot in story.shots)
    return StoryOutput(
        run_folder=run.root,
        video=video,
        clips=clips,
        memory=_memory_of(run, files, of_story, story, point, memory),
        contact_sheet=picture_grid(
            [
                Labelled(image_HWC=_middle_frame(clip), label=shot.name or shot.shot_id)
                for clip, shot in zip(clips, story.shots, strict=True)
            ],
            nothing="no shots",
        ),
        num_rendered=fold.num_rendered,
        num_found=len(story.shots) - fold.num_rendered,
        resumed_at=fold.resumed_at,
    )


def _memory_of(
    run: RunFolder, files: RunFiles, of_story: StoryFiles, story: Story, point: Point, before: StoryMemory | None
) -> StoryMemory:
    settings = point.settings
    given = [one.image for one in before.keyframes] if before is not None else []
    references = [*given, *(_reference(path, settings.sampler) for path in story.reference_images)]
    keyframes = list(reference_keyframes(references))
    for shot in story.shots:
        record = of_story.records[shot.shot_id]
        paths = files.keyframe_paths(record)
        keyframes += [
            Keyframe(
                image=read_png(run.root / paths[one.slot]),
                shot_index=shot.index,
                slot=one.slot,
                frame_index=one.frame_index,
            )
            for one in record.keyframes
        ]
    memory = StoryMemory(
        before.max_keyframes if before is not None else settings.memory.max_keyframes,
        before.num_fixed if before is not None else settings.memory.num_fixed,
        settings.memory,
    )
    return replace(memory, keyframes=tuple(keyframes), next_shot=len(story.shots))


def _reference(path: Path, sampler: SamplerSettings) -> Tensor:
    return given_image(path, sampler)


def _middle_frame(clip: Path) -> Tensor:
    frames = read_clip(clip)
    return torch.as_tensor(frames[len(frames) // 2]).permute(1, 2, 0)
