"""One render job on one rank: from settings to an exit code.

The order is the point: everything that can be wrong with storyboards, layout, weights and folder is found out before
the first byte of weights is read. Knows how the parts go together; what they do is theirs.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache, text_encoder_identity
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.build import Engine, Weights, open_weights, with_generated_weights
from storymem_dist.config import Point, RenderConfig
from storymem_dist.dispatch.plan import BatchPart, plan_part
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryboardError
from storymem_dist.job_identity import device_name, group_identity, job_identity, own_stop_files, package_versions
from storymem_dist.job_inputs import (
    KINDS,
    SELECTION_KEYS,
    choose_stories,
    config_hash,
    cost_model,
    kinds_of,
    pixel_inputs,
)
from storymem_dist.memory.scorers import Quality, Similarity, build_quality, build_similarity
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.attention import describe_backend
from storymem_dist.models.settings import ModelSettings
from storymem_dist.observe.events import (
    JobStarted,
    Observer,
    StoryboardRejected,
    ThroughputSampled,
    WeightsProgress,
    timed_stage,
)
from storymem_dist.observe.progress import ProgressBoard
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.observe.start import Place, start_observers
from storymem_dist.observe.system import peak_tflops
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.text import Encoder, encode_prompts
from storymem_dist.parallel.text import Place as TextPlace
from storymem_dist.parallel.watch import Watch
from storymem_dist.render_batch import render_batch
from storymem_dist.render_shot import ShotRules, StoryShotRenderer, negative_prompts
from storymem_dist.story.loading import StoryBatch, load_storyboards

_PROGRESS_SECONDS = 0.25


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
        board = ProgressBoard()
        dtype, head_dim = getattr(torch, checked.model.dtype), weights.any_checkpoint.dit_config.head_dim
        attention = describe_backend(checked.model.attention, device=session.device, dtype=dtype, head_dim=head_dim)
        parts, watchers = [], []
        for point, batch, run, run_id in zip(points, checked.batches, runs, run_ids, strict=True):
            tracking = tracking_of_part(point.settings.tracking, num_parts=len(points))
            observers = closing.enter_context(start_observers(tracking, run.root, place, sweep=sweep))
            watchers.append(observers)
            part = _part(point, batch, run, weights, board.watching(observers.observer), session)
            _announce(part, batch, run_id, session, attention)
            parts.append(part)

        def tell(message: str) -> None:
            for observers in watchers:
                observers.warn(message, "parallel")

        with Watch(session, settings.parallel, look=board.look, tell=tell) as watch:
            summary = _render(parts, points, checked, session, board, watch)
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
        cost=cost_model(settings, weights),
        config_hash=config_hash(point.plain),
        config_text=json.dumps(point.plain, indent=2, ensure_ascii=False, sort_keys=True),
        observers=observer,
        host={"versions": package_versions(), "device": device_name(session.device), "layout": str(session.layout)},
    )


def _render(
    parts: Sequence[BatchPart],
    points: Sequence[Point],
    checked: CheckedJob,
    session: Session,
    board: ProgressBoard,
    watch: Watch,
) -> BatchSummary:
    settings, weights = points[0].settings, checked.weights
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    stop_files = [part.run.stop_file for part in parts]
    stop_switch = StopSwitch(stop_files, own_files=own_stop_files(), restarted=restarted, on_ask=board.sign)
    stop_switch.reason()  # the first look, before weights are read: a stop file that is made meanwhile counts
    engine = Engine.start(
        checked.model,
        weights,
        settings.parallel,
        settings.sampler,
        session=session,
        progress=_report_loading(parts[0].observers),
        on_read=lambda num_bytes: parts[0].observers.notify(ThroughputSampled(bytes_read=num_bytes)),
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
        prompts.ensure_together([*dict.fromkeys(wanted), *negative_prompts(rules)], session)
    renderer = StoryShotRenderer(
        clips=engine.clips,
        prompts=prompts,
        scorers=scorers,
        rules=rules,
        leader_decides=session.leader_decides,
        measure=engine.measure,
        retries_in_place=session.layout.ranks_per_replica == 1,
    )
    loaded = _load_together(parts, engine, session, share_reads=settings.parallel.share_reads)
    with stop_switch.listening() as stop:
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
            on_crash=watch.note,
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


# -- what is loaded once -----------------------------------------------------------------------------------------------


class ScorerShelf:
    """Similarity and quality scorers, built once for each choice of settings."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._built: dict[str, tuple[Similarity, Quality]] = {}

    def __call__(self, memory: MemorySettings) -> tuple[Similarity, Quality]:
        """The scorers that ``memory`` names. Raises ``WeightsNotFound`` or ``ExtraNotInstalled``."""
        key = json.dumps({name: getattr(memory, name) for name in SELECTION_KEYS})
        if key not in self._built:
            self._built[key] = build_similarity(memory, self._device), build_quality(memory, self._device)
        return self._built[key]

    def check(self, memory: MemorySettings) -> None:
        """Build the scorers now, so that what is missing is told before the first shot."""
        self(memory)


class CachedPrompts:
    """A ``PromptSource`` over the prompt cache of a run folder."""

    def __init__(self, cache: PromptCache, load_encoder: Callable[[], Encoder]) -> None:
        self._cache = cache
        self._load_encoder = load_encoder

    def ensure_together(self, prompts: Sequence[str], place: TextPlace) -> None:
        """Encode what is not cached of all prompts of a job, spread over its ranks. Collective over all of them."""
        encode_prompts(prompts, self._cache, self._load_encoder, place=place)

    def embeds(self, prompt: str) -> Tensor:
        """See ``PromptSource.embeds``; an entry that was lost meanwhile is made again."""
        embeds = self._cache.find(prompt)
        if embeds is None:
            encode_prompts([prompt], self._cache, self._load_encoder, place=_Alone())
            embeds = self._cache.find(prompt)
            assert embeds is not None, "an entry that was just written is there"
        return embeds


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1


# -- what people see ---------------------------------------------------------------------------------------------------


def _announce(part: BatchPart, batch: StoryBatch, run_id: str, session: Session, attention: str) -> None:
    part.observers.notify(
        JobStarted(
            run_id=run_id,
            job=group_identity(),
            config_hash=part.config_hash,
            num_stories=len(batch.stories),
            num_shots=sum(len(story.shots) for story in batch.stories),
            num_replicas=session.layout.replica,
            num_devices=session.layout.ranks_per_replica,
            device=device_name(session.device),
            layout=str(session.layout),
            attention=attention,
            host=socket.gethostname(),
            process_id=os.getpid(),
            peak_tflops=peak_tflops(device_name(session.device)),
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
