"""One render job on one rank: from settings to an exit code.

The order matters: storyboards, layout, weight files and run folders are checked before the first weight is read.
Knows how the parts fit together, not how they work.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.config.points import Point
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.pace import Pace
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.stop import StopSwitch, own_stop_files
from storymem_dist.dispatch.summary import STOPPED, BatchSummary, Replica
from storymem_dist.errors import StoryboardError
from storymem_dist.evaluation.on_finish import score_finished_run
from storymem_dist.events import Observer, ThroughputSampled, WarningIssued, timed_stage
from storymem_dist.hardware import machine_fault
from storymem_dist.models.attention import cudnn_attention_off
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.observe.start import RankInfo, start_observers
from storymem_dist.parallel.choice import Choice
from storymem_dist.parallel.ending import ending_after_error
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.merging import Teams
from storymem_dist.parallel.progress import ProgressBoard
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.watch import Watch
from storymem_dist.render.attention import decide_attention
from storymem_dist.render.batch import render_batch
from storymem_dist.render.build import Engine
from storymem_dist.render.check import CheckedJob, admission, check_job
from storymem_dist.render.choice import chooser
from storymem_dist.render.compilation import keep_compiled_code
from storymem_dist.render.debugging import debugging, logged
from storymem_dist.render.feedback import feedback_of
from storymem_dist.render.identity import (
    device_name,
    group_identity,
    job_identity,
    package_versions,
    start_identity,
)
from storymem_dist.render.inputs import config_hash, cost_model, pixel_inputs
from storymem_dist.render.merged import MergedCrews, opened_teams, speedups_of
from storymem_dist.render.outcome import announce, print_outcome, report_loading
from storymem_dist.render.process import JobProcess, Unwatched
from storymem_dist.render.prompts import CachedPrompts, prompts_left, shots_left
from storymem_dist.render.scoring import scorer_shelf
from storymem_dist.render.shot import ShotRules, StoryShotRenderer, negative_prompts
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.modes import KINDS
from storymem_dist.weights.text_encoder import text_encoder_identity

logger = logging.getLogger(__name__)


def render_job(
    points: Sequence[Point], *, sweep: str | None = None, on_start: Callable[[Layout], None] = lambda layout: None
) -> int:
    """Render everything that ``points`` ask for on this rank, together with the other ranks; return the exit code.

    Several points must share weights and layout (``can_join``). They become parts of one job, each with its own run
    folder, stories, sampler, memory, video and tracking; all other settings are those of the first point. ``sweep`` is
    the name of their sweep. ``on_start`` is called with the layout when it is known.

    Raises ``StoryMemError`` for what is wrong with the job, and ``MachineError`` for faults of the machine. Most
    mistakes are found before weights are read; scorers and the contents of the run folders are checked after that.
    """
    outcome = run_job(points, sweep=sweep, on_start=on_start)
    print_outcome(points, outcome.batches, outcome.summary, outcome.session)
    if outcome.session.is_leader and outcome.summary.state != STOPPED:
        for settings in (point.settings for point in points):
            score_finished_run(Path(settings.output), settings.evaluation, settings.tracking)
    return outcome.exit_code


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How a job ended on this rank. ``batches`` has the stories of each point; ``session`` is closed."""

    batches: Sequence[StoryBatch]
    summary: BatchSummary
    session: Session

    @property
    def exit_code(self) -> int:
        """That of the command: stories that could not be read count, too."""
        rejected = any(batch.rejected for batch in self.batches)
        return self.summary.exit_code or (StoryboardError.exit_code if rejected else 0)


def run_job(
    points: Sequence[Point],
    *,
    sweep: str | None = None,
    on_start: Callable[[Layout], None] = lambda layout: None,
    process: JobProcess | None = None,
) -> JobOutcome:
    """Do the same as ``render_job``, printing no outcome, in ``process``: by default, one that is the job's own."""
    process, board = process or JobProcess(), ProgressBoard()
    try:
        stop = _stop_switch(points, board, process)
        with stop.listening() if process.is_own else nullcontext():
            return _run_job(points, sweep, stop, board, on_start, process)
    except Exception as error:
        if fault := machine_fault(error):
            raise fault from error
        raise


def _run_job(
    points: Sequence[Point],
    sweep: str | None,
    stop: StopSwitch,
    board: ProgressBoard,
    on_start: Callable[[Layout], None],
    process: JobProcess,
) -> JobOutcome:
    checked = check_job(points, job=start_identity())
    settings, weights = points[0].settings, checked.weights
    with (
        debugging(settings.debug, writes_log=process.is_own),
        start_session(
            settings.parallel,
            num_heads=weights.any_checkpoint.dit_config.num_heads,
            choose=chooser(points, checked),
            device=process.device,
        ) as session,
        ending_after_error(may_hang=session.end_may_hang),
        ExitStack() as closing,
    ):
        choice = session.choice
        assert choice is not None, "start_session asked for it"
        if not session.is_leader:
            stop.look_no_more()
        on_start(session.layout)
        runs = [RunFolder(point.settings.output) for point in points]
        num_stories = [len(batch.stories) for batch in checked.batches]
        run_ids = session.leader_decides(lambda: [run.open(n) for run, n in zip(runs, num_stories, strict=True)])
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
        if choice.parallel.compile:
            keep_compiled_code()
        model, attention = decide_attention(
            replace(checked.model, experts=choice.experts),
            session,
            weights.any_checkpoint.dit_config,
            num_tokens=checked.num_tokens,
        )
        checked = replace(checked, model=model)
        parts, all_observers = [], []
        feedback = feedback_of(points, checked, session, choice) if process.is_own else None
        for number, (point, run) in enumerate(zip(points, runs, strict=True)):
            tracking = tracking_of_part(point.settings.tracking, number, num_parts=len(points))
            observers = closing.enter_context(start_observers(tracking, run.root, rank_info, sweep=sweep))
            all_observers.append(observers)
            observer = board.watching(process.observed(logged(observers.observer)))
            observer = observer if feedback is None else feedback.watching(observer)
            parts.append(_part(point, number, run, checked, observer, session, choice))
        for part, batch, run_id in zip(parts, checked.batches, run_ids, strict=True):
            announce(part, batch, run_id, session, choice, attention=attention)
            for message in weights.lora_warnings() if session.rank == 0 else ():
                part.observers.notify(WarningIssued(message=message, source="weights"))
            if session.rank == 0 and model.attention != "sdpa_cudnn" and (slower := cudnn_attention_off()):
                part.observers.notify(WarningIssued(message=slower, source="attention"))

        def warn(message: str) -> None:
            for observers in all_observers:
                observers.warn(message, "parallel")

        with (
            opened_teams(points, checked, session, choice.parallel, warn, board) as teams,
            process.watch(session, choice.parallel, board, warn) as watch,
        ):
            summary = _render_parts(
                parts, points, checked, choice.parallel, session, stop, watch, process.start_engine, teams
            )
        if feedback is not None:
            feedback.close()
    return JobOutcome(batches=checked.batches, summary=summary, session=session)


def tracking_of_part(tracking: TrackingSettings, number: int, *, num_parts: int) -> TrackingSettings:
    """Return the tracking settings of part ``number`` of ``num_parts``: only a single part may redraw the terminal, and
    each writes a file of its own for Prometheus.
    """
    if num_parts == 1:
        return tracking
    console = tracking.console
    if console.mode != "off":
        console = replace(console, mode="plain")
    return replace(tracking, console=console, prometheus=tracking.prometheus.of_part(number))


def _stop_switch(points: Sequence[Point], board: ProgressBoard, process: JobProcess) -> StopSwitch:
    """What asks this job to stop. Made before weights are read: a stop file that appears meanwhile counts."""
    restarted = process.is_own and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    num_ranks = os.environ.get("WORLD_SIZE", "") if process.is_own else ""
    pace = Pace(int(num_ranks) if num_ranks.isdecimal() else 1)
    files = [RunFolder(point.settings.output).stop_file for point in points]

    def on_ask() -> None:
        board.sign()
        process.ask(stop)

    own_files = own_stop_files() if process.is_own else ()
    stop = StopSwitch(files, own_files=own_files, restarted=restarted, pace=pace, on_ask=on_ask)
    stop.start_watching()
    return stop


def _part(
    point: Point,
    index: int,
    run: RunFolder,
    checked: CheckedJob,
    observer: Observer,
    session: Session,
    choice: Choice,
) -> BatchPart:
    settings, batch, weights = point.settings, checked.batches[index], checked.weights
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
            "weights": choice.parallel.weights,
            "experts": choice.experts,
            "compile": choice.compile_reason,
            "loras": weights.lora_facts(),
        },
        num_refused=len(batch.rejected),
        requests_before=checked.requests_before[index],
        admit=admission(point, checked),
    )


def _render_parts(
    parts: Sequence[BatchPart],
    points: Sequence[Point],
    checked: CheckedJob,
    parallel: ParallelSettings,
    session: Session,
    stop: StopSwitch,
    watch: Watch | Unwatched,
    start_engine: Callable[..., Engine],
    teams: Teams | None,
) -> BatchSummary:
    settings, weights = points[0].settings, checked.weights
    engine = start_engine(
        checked.model,
        weights,
        parallel,
        settings.sampler,
        session=session,
        progress=report_loading(parts[0].observers),
        on_read=lambda num_bytes: parts[0].observers.notify(ThroughputSampled(bytes_read=num_bytes)),
        loras=checked.loras,
        num_tokens=checked.num_tokens,
        scorer_bytes=checked.scorer_bytes,
    )
    rules = [
        ShotRules(sampler=part.sampler, memory=point.settings.memory, observer=part.observers)
        for part, point in zip(parts, points, strict=True)
    ]

    def warn(message: str) -> None:
        for part in parts:
            part.observers.notify(WarningIssued(message=message, source="memory"))

    scorers = scorer_shelf(session.device, checked.scorers, place=engine.scorer_place, warn=warn)
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
    crews = None
    if teams is not None:
        crews = MergedCrews(
            teams=teams,
            engine=engine,
            prompts=prompts,
            scorers=scorers,
            parts=parts,
            shot_rules=rules,
            renderer=renderer,
            peers=watch,
            speedups=speedups_of(teams, settings, checked, session, parallel),
        )
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
        crews=crews,
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
