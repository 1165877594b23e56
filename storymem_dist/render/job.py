"""One render job on one rank: from settings to an exit code.

The order matters: storyboards, layout, weight files and run folders are checked before the first weight is read.
Knows how the parts fit together, not how they work.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.config.points import Point
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.stop import StopSwitch, own_stop_files
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryboardError
from storymem_dist.events import Observer, ThroughputSampled, WarningIssued, timed_stage
from storymem_dist.hardware import machine_fault
from storymem_dist.memory.scorers import ScorerShelf
from storymem_dist.models.attention import cudnn_attention_off
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.observe.start import RankInfo, start_observers
from storymem_dist.parallel.ending import ending_after_error
from storymem_dist.parallel.progress import ProgressBoard
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.watch import Watch
from storymem_dist.render.attention import decide_attention
from storymem_dist.render.batch import render_batch
from storymem_dist.render.build import Engine
from storymem_dist.render.check import CheckedJob, check_job
from storymem_dist.render.compilation import decide_compile
from storymem_dist.render.debugging import debugging, logged
from storymem_dist.render.identity import device_name, group_identity, job_identity, package_versions
from storymem_dist.render.inputs import config_hash, cost_model, pixel_inputs
from storymem_dist.render.outcome import announce, print_outcome, report_loading
from storymem_dist.render.prompts import CachedPrompts, prompts_left, shots_left, work_left
from storymem_dist.render.shot import ShotRules, StoryShotRenderer, negative_prompts
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.modes import KINDS
from storymem_dist.weights.bundle import Weights
from storymem_dist.weights.text_encoder import text_encoder_identity

logger = logging.getLogger(__name__)


def render_job(points: Sequence[Point], *, sweep: str | None = None) -> int:
    """Render everything that ``points`` ask for on this rank, together with the other ranks; return the exit code.

    Several points must share weights and layout (``can_join``). They become parts of one job, each with its own run
    folder, stories, sampler, memory, video and tracking; all other settings are those of the first point. ``sweep`` is
    the name of their sweep.

    Raises ``StoryMemError`` for what is wrong with the job, and ``MachineError`` for faults of the machine. Most
    mistakes are found before weights are read; scorers and the contents of the run folders are checked after that.
    """
    board = ProgressBoard()
    try:
        with _stop_switch(points, board).listening() as stop:
            return _render_job(points, sweep, stop, board)
    except Exception as error:
        if fault := machine_fault(error):
            raise fault from error
        raise


def _render_job(points: Sequence[Point], sweep: str | None, stop: StopSwitch, board: ProgressBoard) -> int:
    checked = check_job(points)
    settings, weights = points[0].settings, checked.weights
    with (
        debugging(settings.debug),
        start_session(settings.parallel, num_heads=weights.any_checkpoint.dit_config.num_heads) as session,
        ending_after_error(may_hang=session.end_may_hang),
        ExitStack() as closing,
    ):
        runs = [RunFolder(point.settings.output) for point in points]
        run_ids = session.leader_decides(lambda: [run.open() for run in runs])
        rank_info = RankInfo(
            job=group_identity(),
            rank=session.rank,
            replica=session.replica,
            num_replicas=session.layout.replica,
            is_leader=session.is_leader,
        )
        logger.info(
            "rank %d of %d, replica %d, device %s, backend %s, layout %s",
            session.rank,
            session.world_size,
            session.replica,
            session.device,
            session.backend,
            session.layout,
        )
        model, attention = decide_attention(
            checked.model,
            session,
            weights.any_checkpoint.dit_config,
            num_tokens=checked.num_tokens,
        )
        checked = replace(checked, model=model)
        parts, all_observers = [], []
        for point, batch, run in zip(points, checked.batches, runs, strict=True):
            tracking = tracking_of_part(point.settings.tracking, num_parts=len(points))
            observers = closing.enter_context(start_observers(tracking, run.root, rank_info, sweep=sweep))
            all_observers.append(observers)
            parts.append(_part(point, batch, run, weights, board.watching(logged(observers.observer)), session))
        parallel, compiles = decide_compile(
            settings.parallel, session, weights.any_checkpoint.dit_config, partial(work_left, parts)
        )
        parts = [replace(part, host={**part.host, "compile": compiles}) for part in parts]
        for part, batch, run_id in zip(parts, checked.batches, run_ids, strict=True):
            announce(part, batch, run_id, session, attention=attention, compiles=compiles)
            for message in weights.lora_warnings() if session.rank == 0 else ():
                part.observers.notify(WarningIssued(message=message, source="weights"))
            if session.rank == 0 and model.attention != "sdpa_cudnn" and (slower := cudnn_attention_off()):
                part.observers.notify(WarningIssued(message=slower, source="attention"))

        def warn(message: str) -> None:
            for observers in all_observers:
                observers.warn(message, "parallel")

        with Watch(session, settings.parallel, look=board.look, tell=warn) as watch:
            summary = _render_parts(parts, points, checked, parallel, session, stop, watch)
    print_outcome(points, checked.batches, summary, session)
    rejected = any(batch.rejected for batch in checked.batches)
    return summary.exit_code or (StoryboardError.exit_code if rejected else 0)


def tracking_of_part(tracking: TrackingSettings, *, num_parts: int) -> TrackingSettings:
    """Return the tracking settings of one of ``num_parts`` parts: only a single part may redraw the terminal."""
    if num_parts == 1 or tracking.console.mode == "off":
        return tracking
    return replace(tracking, console=replace(tracking.console, mode="plain"))


def _stop_switch(points: Sequence[Point], board: ProgressBoard) -> StopSwitch:
    """What asks this job to stop. Made before weights are read: a stop file that appears meanwhile counts."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    files = [RunFolder(point.settings.output).stop_file for point in points]
    stop = StopSwitch(files, own_files=own_stop_files(), restarted=restarted, on_ask=board.sign)
    stop.start_watching()
    return stop


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
        memory=settings.memory,
        config_hash=config_hash(point.plain),
        config_text=json.dumps(point.plain, indent=2, ensure_ascii=False, sort_keys=True),
        observers=observer,
        host={
            "versions": package_versions(),
            "device": device_name(session.device),
            "layout": str(session.layout),
            "loras": weights.lora_facts(),
        },
        num_refused=len(batch.rejected),
    )


def _render_parts(
    parts: Sequence[BatchPart],
    points: Sequence[Point],
    checked: CheckedJob,
    parallel: ParallelSettings,
    session: Session,
    stop: StopSwitch,
    watch: Watch,
) -> BatchSummary:
    settings, weights = points[0].settings, checked.weights
    engine = Engine.start(
        checked.model,
        weights,
        parallel,
        settings.sampler,
        session=session,
        progress=report_loading(parts[0].observers),
        on_read=lambda num_bytes: parts[0].observers.notify(ThroughputSampled(bytes_read=num_bytes)),
        loras=checked.loras,
        num_tokens=checked.num_tokens,
    )
    rules = [
        ShotRules(sampler=part.sampler, memory=point.settings.memory, observer=part.observers)
        for part, point in zip(parts, points, strict=True)
    ]
    scorers = ScorerShelf(session.device)
    for rule in rules:
        session.leader_decides(partial(scorers.check, rule.memory))
    cache = parts[0].run.cache_folder / "prompts"
    prompts = CachedPrompts(
        PromptCache(cache, text_encoder_identity(weights.any_checkpoint, engine.text_dtype)),
        engine.load_text_encoder,
        team=session.team,
        replica=session.replica,
        num_replicas=session.layout.replica,
        make_room=engine.make_room_for_text_encoder,
    )
    with timed_stage(parts[0].observers, "text"):
        prompts.begin(partial(prompts_left, parts, session.layout.replica), negative_prompts(rules), session)
    renderer = StoryShotRenderer(
        clips=engine.clips,
        prompts=prompts,
        scorers=scorers,
        rules=rules,
        leader_decides=session.leader_decides,
        measure=engine.measure,
        retries_in_place=session.layout.ranks_per_replica == 1,
    )
    loaded = _load_together(parts, engine, session, stop, share_reads=settings.parallel.share_reads)
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
        check_contents=settings.debug.verify_checksums,
        loaded=loaded,
        on_crash=watch.note,
    )


def _load_together(
    parts: Sequence[BatchPart], engine: Engine, session: Session, stop: StopSwitch, *, share_reads: bool
) -> str | None:
    """Load the first experts on all replicas of this node together, so that one rank reads them for all.

    Returns their kind. None where ranks do not share reads: each replica then loads at its first shot, and so do all
    later loads.
    """
    if session.readers.size == 1 or not share_reads:
        return None
    # Two agreements, since other jobs may commit shots meanwhile. First all readers of this node take the answer of one
    # of them, then all ranks of a replica, on any node, take the answer of their leader.
    on_node: str | None = session.readers.decide(lambda: None if stop.reason() else first_kind_left(parts))
    kind = session.leader_decides(lambda: on_node)
    if kind is not None:
        with timed_stage(parts[0].observers, "load"), engine.experts.reading_together():
            engine.clips.prepare(kind)
    return kind


def first_kind_left(parts: Sequence[BatchPart]) -> str | None:
    """Return the kind of experts that the first ready shots need; None when none needs any."""
    rendered = [[shot for shot in shots if shot.kind in KINDS] for shots in shots_left(parts)]
    graph = ShotGraph([shots for shots in rendered if shots])
    return next((kind for kind in KINDS if graph.num_ready(kind)), None)
