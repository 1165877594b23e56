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
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist import __version__
from storymem_dist.artifacts.prompt_cache import PromptCache, text_encoder_identity
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.build import Engine, Weights, open_weights, with_generated_weights
from storymem_dist.config import RenderConfig, StoriesSettings
from storymem_dist.dispatch.plan import BatchPart, shot_mode
from storymem_dist.dispatch.planner import CostModel
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryboardError
from storymem_dist.memory.scorers import Quality, Similarity, build_quality, build_similarity
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.events import JobStarted, Observer, StoryboardRejected, WeightsProgress, timed_stage
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


def render_job(settings: RenderConfig, plain_config: Mapping[str, Any]) -> int:
    """Render everything that ``settings`` ask for on this rank, together with the other ranks; return the exit code.

    ``plain_config`` is the same configuration as plain values, for the run folder and tracking.

    Raises ``StoryMemError`` for whatever is wrong before the first shot.
    """
    batch = choose_stories(load_storyboards(settings.stories.paths()), settings.stories)
    if not batch.stories:
        raise StoryboardError("no storyboard can be rendered: " + "; ".join(one.message for one in batch.rejected))
    check_guidance(
        settings.parallel,
        guidance_scale_high=settings.sampler.guidance_scale_high,
        guidance_scale_low=settings.sampler.guidance_scale_low,
    )
    model = with_generated_weights(settings.model)
    weights = open_weights(model, kinds_of(batch.stories, settings), settings.sampler.continuation)
    with start_session(settings.parallel, num_heads=weights.any_checkpoint.dit_config.num_heads) as session:
        run = RunFolder(settings.output)
        run_id = session.leader_decides(run.open)
        place = Place(
            job=job_identity(),
            rank=session.rank,
            replica=session.replica,
            num_replicas=session.layout.replica,
            is_leader=session.is_leader,
        )
        with start_observers(settings.tracking, run.root, place) as observers:
            part = BatchPart(
                run=run,
                stories=batch.stories,
                sampler=settings.sampler,
                inputs={kind: pixel_inputs(kind, settings, weights) for kind in weights.checkpoints},
                video=settings.video,
                cost=cost_model(settings),
                config_hash=config_hash(plain_config),
                config_text=json.dumps(plain_config, indent=2, ensure_ascii=False, sort_keys=True),
                observers=observers.observer,
                host={"versions": package_versions(), "device": device_name(session), "layout": str(session.layout)},
            )
            _announce(part, batch, run_id, session)
            summary = _render(part, settings, weights, model, session, place)
    _print_outcome(settings, batch, summary, session)
    return summary.exit_code or (StoryboardError.exit_code if batch.rejected else 0)


def _render(
    part: BatchPart,
    settings: RenderConfig,
    weights: Weights,
    model: Any,
    session: Session,
    place: Place,
) -> BatchSummary:
    engine = Engine.start(
        model,
        weights,
        settings.parallel,
        settings.sampler,
        session=session,
        progress=_report_loading(part.observers),
    )
    rules = [ShotRules(sampler=part.sampler, memory=settings.memory, observer=part.observers)]
    scorers = ScorerShelf(session.device)
    session.leader_decides(lambda: scorers.check(settings.memory))
    prompts = CachedPrompts(
        PromptCache(
            part.run.cache_folder / "prompts", text_encoder_identity(weights.any_checkpoint, engine.text_dtype)
        ),
        engine.load_text_encoder,
    )
    with timed_stage(part.observers, "text"):
        prompts.ensure_together([shot.prompt for story in part.stories for shot in story.shots], rules, session)
    renderer = StoryShotRenderer(
        clips=engine.clips,
        prompts=prompts,
        scorers=scorers,
        rules=rules,
        leader_decides=session.leader_decides,
        retries_in_place=session.layout.ranks_per_replica == 1,
    )
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with StopSwitch([part.run.stop_file], restarted=restarted).listening() as stop:
        return render_batch(
            parts=[part],
            renderer=renderer,
            settings=settings.dispatch,
            replica=Replica(
                index=session.replica,
                count=session.layout.replica,
                num_devices=session.layout.ranks_per_replica,
                job_id=place.job,
            ),
            stop=stop,
            leader_decides=session.leader_decides,
            check_contents=settings.debug.verify_records,
        )


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
    return [kind for kind in ("t2v", "m2v") if kind in needed]


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

    ``STORYMEM_JOB_ID`` where a launcher sets it; else torchrun's run id; else the address at which the ranks met and
    the process that started them.
    """
    if given := os.environ.get("STORYMEM_JOB_ID"):
        return given
    if "RANK" not in os.environ:
        return ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":
        return f"torchrun-{run_id}"
    return f"ranks-{os.environ.get('MASTER_ADDR', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"


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
            job=job_identity(),
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


def _print_outcome(settings: RenderConfig, batch: StoryBatch, summary: BatchSummary, session: Session) -> None:
    """The end of the job in a few lines on standard output, by its first rank."""
    if session.rank != 0:
        return
    out = sys.stdout.write
    root = Path(settings.output)
    for story in batch.stories:
        video = RunFolder(root).story_video(story.story_id)
        if video.exists():
            out(f"{story.name}: {video}\n")
    for rejected in batch.rejected:
        out(f"refused: {rejected.message}\n")
    for failure in summary.failures:
        out(f"failed: {failure.story_id} {failure.shot_id}: {failure.reason}\n")
    out(
        f"{summary.state}: {summary.num_stories_done} of {summary.num_stories} stories, {summary.num_rendered} shots "
        f"rendered here, {summary.num_skipped} found finished, {summary.num_failed} failed, "
        f"{summary.num_blocked} waiting for them; everything is in {root}\n"
    )
