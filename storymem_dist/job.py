"""One render job on one rank: from settings to an exit code.

The order is the point: everything that can be wrong with storyboards, layout, weights and folder is found out before
the first byte of weights is read. Knows how the parts go together; what they do is theirs.
"""

import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist import __version__
from storymem_dist.artifacts.prompt_cache import PromptCache, text_encoder_identity
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.build import Engine, Weights, open_weights, with_generated_weights
from storymem_dist.config import Point, RenderConfig, StoriesSettings
from storymem_dist.dispatch.plan import BatchPart, plan_part, shot_mode
from storymem_dist.dispatch.planner import CostModel
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryboardError
from storymem_dist.launch.group_folder import STOP_FILES_VARIABLE
from storymem_dist.memory.scorers import Quality, Similarity, build_quality, build_similarity
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.settings import ModelSettings
from storymem_dist.observe.events import JobStarted, Observer, StoryboardRejected, WeightsProgress, timed_stage
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.observe.start import Place, start_observers
from storymem_dist.observe.system import peak_tflops
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.text import Encoder, encode_prompts
from storymem_dist.render_batch import render_batch
from storymem_dist.render_shot import ShotRules, StoryShotRenderer, negative_prompts
from storymem_dist.story.loading import StoryBatch, load_storyboards
from storymem_dist.story.schema import Scene, Story

PIXEL_VERSION = 1
"""Part of every fingerprint: raised when a change of this program changes pixels."""

KINDS = ("t2v", "m2v")
"""The kinds of experts, in the order in which a job needs them."""

_REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "av", "accelerate")
_PROGRESS_SECONDS = 0.25
_PIXEL_SAMPLER_KEYS = (
    "num_inference_steps",
    "solver",
    "sigmas",
    "num_frames",
    "height",
    "width",
    "fps",
    "guidance_scale_high",
    "guidance_scale_low",
    "noise_device",
    "step_cache_threshold",
)
_SELECTION_KEYS = (
    "max_per_shot",
    "similarity",
    "similarity_threshold",
    "threshold_step",
    "quality",
    "quality_threshold",
    "clip_model",
    "hpsv3_checkpoint",
)
_RECALL_KEYS = ("max_keyframes", "num_fixed")


def render_job(points: Sequence[Point], *, sweep: str | None = None) -> int:
    """Render everything that ``points`` ask for on this rank, together with the other ranks; return the exit code.

    Several points must share their weights and their layout (``can_join``): they become parts of one job, each with its
    own run folder, and all other settings but the sampler's, memory's, stories' and tracking's are those of the first.
    ``sweep`` names the sweep that they belong to.

    Raises ``StoryMemError`` for whatever is wrong before the first shot.
    """
    checked = check_job(points)
    settings, weights = points[0].settings, checked.weights
    with (
        start_session(settings.parallel, num_heads=weights.any_checkpoint.dit_config.num_heads) as session,
        ExitStack() as closing,
    ):
        runs = [RunFolder(point.settings.output) for point in points]
        run_ids = session.leader_decides(lambda: [run.open() for run in runs])
        place = Place(
            job=group_identity(),
            rank=session.rank,
            replica=session.replica,
            num_replicas=session.layout.replica,
            is_leader=session.is_leader,
        )
        parts = []
        for point, batch, run, run_id in zip(points, checked.batches, runs, run_ids, strict=True):
            tracking = tracking_of_part(point.settings.tracking, num_parts=len(points))
            observers = closing.enter_context(start_observers(tracking, run.root, place, sweep=sweep))
            part = _part(point, batch, run, weights, observers.observer, session)
            _announce(part, batch, run_id, session)
            parts.append(part)
        summary = _render(parts, points, checked, session)
    _print_outcome(points, checked.batches, summary, session)
    rejected = any(batch.rejected for batch in checked.batches)
    return summary.exit_code or (StoryboardError.exit_code if rejected else 0)


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose storyboards are read and whose weights are found; nothing is loaded. One batch for each point."""

    batches: Sequence[StoryBatch]
    model: ModelSettings
    weights: Weights


def check_job(points: Sequence[Point]) -> CheckedJob:
    """Find out what is wrong with a job without starting anything: settings, storyboards, weights. Reads headers only.

    Raises ``StoryMemError``.
    """
    batches = []
    for point in points:
        batch = choose_stories(load_storyboards(point.settings.stories.paths()), point.settings.stories)
        if not batch.stories:
            raise StoryboardError("no storyboard can be rendered: " + "; ".join(one.message for one in batch.rejected))
        sampler = point.settings.sampler
        check_guidance(
            point.settings.parallel,
            guidance_scale_high=sampler.guidance_scale_high,
            guidance_scale_low=sampler.guidance_scale_low,
        )
        batches.append(batch)
    settings = points[0].settings
    needed = {
        kind for point, batch in zip(points, batches, strict=True) for kind in kinds_of(batch.stories, point.settings)
    }
    model = with_generated_weights(settings.model)
    kinds = [kind for kind in KINDS if kind in needed]
    weights = open_weights(model, kinds, settings.sampler.continuation)
    return CheckedJob(batches=batches, model=model, weights=weights)


def can_join(one: RenderConfig, other: RenderConfig) -> bool:
    """Whether two points can be parts of one job: same weights, same layout, same way of working."""

    def shared(settings: RenderConfig) -> tuple[object, ...]:
        # the continuation chooses the StoryMem LoRA, which is merged into the weights
        return settings.model, settings.sampler.continuation, settings.parallel, settings.dispatch, settings.debug

    return shared(one) == shared(other)


def tracking_of_part(tracking: TrackingSettings, *, num_parts: int) -> TrackingSettings:
    """Tracking of one of ``num_parts`` parts: several cannot each redraw the terminal, so they write lines."""
    if num_parts == 1 or tracking.console.mode == "off":
        return tracking
    return replace(tracking, console=replace(tracking.console, mode="plain"))


def _part(
    point: Point, batch: StoryBatch, run: RunFolder, weights: Weights, observer: Observer, session: Session
) -> BatchPart:
    settings = point.settings
    return BatchPart(
        run=run,
        stories=batch.stories,
        sampler=settings.sampler,
        inputs={kind: pixel_inputs(kind, settings, weights) for kind in weights.checkpoints},
        video=settings.video,
        cost=cost_model(settings),
        config_hash=config_hash(point.plain),
        config_text=json.dumps(point.plain, indent=2, ensure_ascii=False, sort_keys=True),
        observers=observer,
        host={"versions": package_versions(), "device": device_name(session), "layout": str(session.layout)},
    )


def _render(parts: Sequence[BatchPart], points: Sequence[Point], checked: CheckedJob, session: Session) -> BatchSummary:
    settings, weights = points[0].settings, checked.weights
    engine = Engine.start(
        checked.model,
        weights,
        settings.parallel,
        settings.sampler,
        session=session,
        progress=_report_loading(parts[0].observers),
    )
    rules = [
        ShotRules(sampler=part.sampler, memory=point.settings.memory, observer=part.observers)
        for part, point in zip(parts, points, strict=True)
    ]
    scorers = ScorerShelf(session.device)
    for one in rules:
        session.leader_decides(partial(scorers.check, one.memory))
    cache = parts[0].run.cache_folder / "prompts"
    prompts = CachedPrompts(
        PromptCache(cache, text_encoder_identity(weights.any_checkpoint, engine.text_dtype)),
        engine.load_text_encoder,
    )
    with timed_stage(parts[0].observers, "text"):
        wanted = [shot.prompt for part in parts for story in part.stories for shot in story.shots]
        prompts.ensure_together(list(dict.fromkeys(wanted)), rules, session)
    renderer = StoryShotRenderer(
        clips=engine.clips,
        prompts=prompts,
        scorers=scorers,
        rules=rules,
        leader_decides=session.leader_decides,
        retries_in_place=session.layout.ranks_per_replica == 1,
    )
    loaded = _load_together(parts, engine, session, share_reads=settings.parallel.share_reads)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    stop_files = [part.run.stop_file for part in parts]
    with StopSwitch(stop_files, own_files=own_stop_files(), restarted=restarted).listening() as stop:
        return render_batch(
            parts=parts,
            renderer=renderer,
            settings=settings.dispatch,
            replica=Replica(
                index=session.replica,
                count=session.layout.replica,
                num_devices=session.layout.ranks_per_replica,
                job_id=job_identity(),
            ),
            stop=stop,
            leader_decides=session.leader_decides,
            check_contents=settings.debug.verify_records,
            loaded=loaded,
        )


def _load_together(parts: Sequence[BatchPart], engine: Engine, session: Session, *, share_reads: bool) -> str | None:
    """Load the first experts on all replicas of this node at once, where one rank reads them for all; return the kind.

    Later loads are each replica's own. So is the first one where nobody shares: it then waits for the first shot.
    """
    if session.readers.size == 1 or not share_reads:
        return None
    # all readers of a node agree on what their first one sees, then every replica on what its leader has heard
    on_node: str | None = session.readers.decide(lambda: first_kind_left(parts))
    kind = session.leader_decides(lambda: on_node)
    if kind is not None:
        with timed_stage(parts[0].observers, "load"), engine.experts.reading_together():
            engine.clips.prepare(kind)
    return kind


def first_kind_left(parts: Sequence[BatchPart]) -> str | None:
    """The kind of experts that the first shots need which are not committed; None when there are no such shots."""
    left = set()
    for number, part in enumerate(parts):
        for _, planned in plan_part(number, part):
            if isinstance(planned, StoryboardError):
                continue
            for shot in planned:
                if not part.run.shot(shot.story.story_id, shot.shot.shot_id).is_committed(shot.fingerprint):
                    left.add(shot.kind)
                    break
    return min(left, key=KINDS.index, default=None)


# -- what is to be rendered --------------------------------------------------------------------------------------------


def choose_stories(batch: StoryBatch, settings: StoriesSettings) -> StoryBatch:
    """Cut the batch to ``max_stories`` stories of ``max_shots`` shots."""
    stories = batch.stories[: settings.max_stories]
    if settings.max_shots is not None:
        stories = tuple(first_shots(story, settings.max_shots) for story in stories)
    return StoryBatch(stories=stories, rejected=batch.rejected)


def first_shots(story: Story, max_shots: int) -> Story:
    """The story up to its first ``max_shots`` shots; scenes that become empty are left out."""
    scenes = [
        Scene(scene_num=scene.scene_num, shots=tuple(shot for shot in scene.shots if shot.index < max_shots))
        for scene in story.scenes
    ]
    kept = tuple(scene for scene in scenes if scene.shots)
    return Story(
        story_id=story.story_id,
        name=story.name,
        overview=story.overview,
        scenes=kept,
        reference_images=story.reference_images,
        seed=story.seed,
        style=story.style,
        source=story.source,
    )


def kinds_of(stories: Sequence[Story], settings: RenderConfig) -> list[str]:
    """The kinds of experts that the stories need, in the order in which a job loads them."""
    needed = {shot_mode(story, shot, settings.sampler)[0] for story in stories for shot in story.shots}
    return [kind for kind in KINDS if kind in needed]


def pixel_inputs(kind: str, settings: RenderConfig, weights: Weights) -> dict[str, Any]:
    """All that changes the pixels of a ``kind`` shot, or what it leaves in memory, beyond prompt, seed and mode."""
    sampler, memory = settings.sampler, settings.memory
    inputs: dict[str, Any] = {f"sampler.{key}": getattr(sampler, key) for key in _PIXEL_SAMPLER_KEYS}
    inputs["sampler.flow_shift"] = sampler.flow_shift(kind)
    inputs["sampler.boundary_ratio"] = sampler.boundary_ratio(kind)
    if sampler.needs_negative_prompt:
        inputs["sampler.negative_prompt"] = sampler.negative_prompt
    memory_keys = _SELECTION_KEYS + (_RECALL_KEYS if kind == "m2v" else ())
    inputs |= {f"memory.{key}": getattr(memory, key) for key in memory_keys}
    inputs |= {f"video.{key}": value for key, value in asdict(settings.video).items()}
    inputs["model.dtype"] = settings.model.dtype
    inputs["model.text_encoder_dtype"] = settings.model.text_encoder_dtype
    inputs["weights"] = weights.identity(kind)
    inputs["pixel_version"] = PIXEL_VERSION
    return inputs


def cost_model(settings: RenderConfig) -> CostModel:
    """What the planner needs to know of the settings."""
    sampler = settings.sampler
    return CostModel(
        num_frames=sampler.num_frames,
        height=sampler.height,
        width=sampler.width,
        num_inference_steps=sampler.num_inference_steps,
        passes_per_step=2 if sampler.needs_negative_prompt else 1,
        max_keyframes=settings.memory.max_keyframes,
    )


# -- what is loaded once -----------------------------------------------------------------------------------------------


class ScorerShelf:
    """Similarity and quality scorers, built once for each choice of settings."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._built: dict[str, tuple[Similarity, Quality]] = {}

    def __call__(self, memory: MemorySettings) -> tuple[Similarity, Quality]:
        """The scorers that ``memory`` names. Raises ``WeightsNotFound`` or ``ExtraNotInstalled``."""
        key = json.dumps({name: getattr(memory, name) for name in _SELECTION_KEYS})
        if key not in self._built:
            self._built[key] = build_similarity(memory, self._device), build_quality(memory, self._device)
        return self._built[key]

    def check(self, memory: MemorySettings) -> None:
        """Build the scorers now, so that what is missing is told before the first shot."""
        self(memory)


@dataclass(frozen=True, kw_only=False)
class CachedPrompts:
    """A ``PromptSource`` over the prompt cache of a run folder."""

    cache: PromptCache
    load_encoder: Callable[[], Encoder]

    def ensure(self, prompts: Sequence[str]) -> None:
        """See ``PromptSource.ensure``."""
        encode_prompts(prompts, self.cache, self.load_encoder, place=_Alone())

    def ensure_together(self, prompts: Sequence[str], rules: Sequence[ShotRules], session: Session) -> None:
        """Encode all prompts of a job, spread over all its ranks. Collective over all started ranks."""
        encode_prompts([*prompts, *negative_prompts(rules)], self.cache, self.load_encoder, place=session)

    def embeds(self, prompt: str) -> Tensor:
        """See ``PromptSource.embeds``; an entry that was lost meanwhile is made again."""
        embeds = self.cache.find(prompt)
        if embeds is None:
            self.ensure([prompt])
            embeds = self.cache.find(prompt)
            assert embeds is not None, "an entry that was just written is there"
        return embeds


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1


# -- who and where -----------------------------------------------------------------------------------------------------


def job_identity() -> str:
    """A name that all ranks and restarts of this job share, and no other job: empty for a process started by hand.

    ``STORYMEM_JOB_ID`` where a launcher sets it (all nodes of a SLURM job share it); else torchrun's run id; else the
    address at which the ranks met and the process that started them.
    """
    if given := os.environ.get("STORYMEM_JOB_ID"):
        return given
    if "RANK" not in os.environ:
        return ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":
        return f"torchrun-{run_id}"
    return f"ranks-{os.environ.get('MASTER_ADDR', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"


def group_identity() -> str:
    """A name that the ranks which were started together share, and their restarts: that of the job and the node."""
    node = os.environ.get("STORYMEM_NODE", "")
    return f"{job_identity()}.node{node}" if node else job_identity()


def own_stop_files() -> list[Path]:
    """Files that ask this job alone to stop, as its launchers said."""
    return [Path(path) for path in os.environ.get(STOP_FILES_VARIABLE, "").split(os.pathsep) if path]


def package_versions() -> dict[str, str]:
    """Versions of this project, Python and the packages that shape the result."""
    versions = {"storymem_dist": __version__, "python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_name(session: Session) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"


def config_hash(plain_config: Mapping[str, Any]) -> str:
    """Hash of a configuration without what says where or how fast, but not what."""
    kept = {key: value for key, value in plain_config.items() if key in ("model", "sampler", "memory", "video")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# -- what people see ---------------------------------------------------------------------------------------------------


def _announce(part: BatchPart, batch: StoryBatch, run_id: str, session: Session) -> None:
    part.observers.notify(
        JobStarted(
            run_id=run_id,
            job=group_identity(),
            config_hash=part.config_hash,
            num_stories=len(batch.stories),
            num_shots=sum(len(story.shots) for story in batch.stories),
            num_replicas=session.layout.replica,
            num_devices=session.layout.ranks_per_replica,
            device=device_name(session),
            layout=str(session.layout),
            host=socket.gethostname(),
            process_id=os.getpid(),
            peak_tflops=peak_tflops(device_name(session)),
            versions=package_versions(),
        )
    )
    for rejected in batch.rejected:
        part.observers.notify(StoryboardRejected(source=str(rejected.source), message=rejected.message))


def _report_loading(observer: Observer) -> Callable[[str, int, int], None]:
    """Progress of loading as events, a few a second."""
    began: dict[str, float] = {}
    last = [0.0]

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(what, now)
        if done < total and now - last[0] < _PROGRESS_SECONDS:
            return
        last[0] = now
        if done >= total:
            del began[what]
        observer.notify(WeightsProgress(what=what, bytes_done=done, bytes_total=total, elapsed_seconds=now - start))

    return report


def _print_outcome(
    points: Sequence[Point], batches: Sequence[StoryBatch], summary: BatchSummary, session: Session
) -> None:
    """The end of the job in a few lines on standard output, by its first rank."""
    if session.rank != 0:
        return
    out = sys.stdout.write
    for point, batch in zip(points, batches, strict=True):
        of_point = f"{point.name}: " if point.name else ""
        for story in batch.stories:
            video = RunFolder(point.settings.output).story_video(story.story_id)
            if video.exists():
                out(f"{of_point}{story.name}: {video}\n")
        for rejected in batch.rejected:
            out(f"{of_point}refused: {rejected.message}\n")
    for failure in summary.failures:
        out(f"failed: {failure.story_id} {failure.shot_id}: {failure.reason}\n")
    where = points[0].settings.output if len(points) == 1 else Path(points[0].settings.output).parent
    out(
        f"{summary.state}: {summary.num_stories_done} of {summary.num_stories} stories, {summary.num_rendered} shots "
        f"rendered here, {summary.num_skipped} found finished, {summary.num_failed} failed, "
        f"{summary.num_blocked} waiting for them; everything is in {where}\n"
    )
    sys.stdout.flush()
