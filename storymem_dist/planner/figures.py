"""What one candidate needs: memory of a rank, seconds of steps and shots, and how long the stories take with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.merging import LEAST_SPEEDUP, SLACK, SLACKS, team_sizes
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.hardware import GIB
from storymem_dist.parallel.merging import holds_whole_weights, merged_settings
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.candidates import Candidate
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.job import CONTINUATION, FIRST, Option, PhaseFigures, PlanJob
from storymem_dist.planner.memory import (
    CONDITION,
    DECODE,
    DENOISE,
    KEYFRAMES,
    PARTS,
    TEXT,
    RankMemory,
    num_tokens_of,
    rank_memory,
    resident_blocks,
    streams,
)
from storymem_dist.planner.simulation import Simulated, Work, simulate, work_of
from storymem_dist.planner.tail import Teams, Times
from storymem_dist.planner.teams import as_team
from storymem_dist.planner.timing import ShotTime, TimeModel
from storymem_dist.story.modes import M2V, T2V
from storymem_dist.weights.settings import ModelSettings

_HOUR = 3600.0
_VERBS = {
    TEXT: "encode text",
    CONDITION: "encode what a shot begins with",
    DENOISE: "denoise",
    DECODE: "decode",
    KEYFRAMES: "choose keyframes",
}
_ALL_SLACKS_UP_TO = 5000  # shots of a job, which is simulated once for each slack


def memory_of(
    job: PlanJob,
    hardware: Hardware,
    parallel: ParallelSettings,
    model: ModelSettings,
    sampler: SamplerSettings,
    num_keyframes: int,
) -> RankMemory:
    """Return what a rank needs for a shot of ``sampler`` with ``num_keyframes`` in its memory; 0: a first shot."""
    return rank_memory(
        parallel,
        model,
        job.dit_config,
        sampler,
        num_keyframes=num_keyframes,
        kinds=(M2V,) if num_keyframes else (T2V,),
        text_encoder=job.text_encoder,
        vae=job.vae,
        adapters=job.adapters,
        scorer_bytes=job.scorer_bytes,
        room=hardware.memory_bytes,
        on_gpu=hardware.memory_bytes is not None,
    )


def why_not(memory: RankMemory, hardware: Hardware) -> str:
    """Return why a rank with ``memory`` does not fit, in a sentence; empty where it fits."""
    ranks, room = hardware.gpus_per_node, hardware.memory_bytes
    on_host = ranks * (memory.on_host + (memory.on_device if room is None else 0))
    if room is not None and memory.on_device > room:
        peak = memory.peak
        parts = [f"{part.replace('_', ' ')} {_gib(size)}" for part in PARTS if (size := getattr(peak, part))]
        return (
            f"{_gib(peak.total)} of {_gib(room)} GiB are needed on each device to {_VERBS[peak.phase]} "
            f"({', '.join(parts)})"
        )
    if on_host > hardware.host_memory_bytes:
        return f"{_gib(on_host)} of {_gib(hardware.host_memory_bytes)} GiB of host memory are needed on each node"
    return ""


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"


class Figures:
    """The figures of a job's candidates on ``hardware``, by ``time``. Times of equal shots are computed once."""

    def __init__(self, job: PlanJob, hardware: Hardware, time: TimeModel) -> None:
        self.job, self.hardware, self.time = job, hardware, time
        self._longest: dict[str, SamplerSettings] = {}
        self._examples: list[PlannedShot] = []
        self._class_of: dict[int, int] = {}  # by the identity of a shot: equal ones take equally long
        known: dict[tuple[int, str, float, bool], int] = {}
        for shot in (shot for shots in job.stories for shot in shots):
            phase = FIRST if shot.kind == T2V else CONTINUATION
            longest = self._longest.get(phase)
            if longest is None or num_tokens_of(shot.sampler, 0) > num_tokens_of(longest, 0):
                self._longest[phase] = shot.sampler
            key = (id(shot.sampler), shot.kind, job.keyframes_of(shot), shot.needs.continues)
            if key not in known:
                known[key] = len(self._examples)
                self._examples.append(shot)
            self._class_of[id(shot)] = known[key]
        stories: dict[tuple[Any, ...], list[Sequence[PlannedShot]]] = {}
        for shots in job.stories:
            like = tuple((self._class_of[id(shot)], shot.index, shot.waits_for) for shot in shots)
            stories.setdefault(like, []).append(shots)
        self._kinds = [alike[0] for alike in stories.values()]
        self._counts = [len(alike) for alike in stories.values()]
        self._known: dict[tuple[Any, ...], tuple[Simulated, float]] = {}

    def option(self, candidate: Candidate) -> Option:
        """Return the figures of ``candidate``, with the bound for the time of the job; nothing is simulated."""
        parallel, model = candidate.parallel, candidate.model
        phases = tuple(self._phase(phase, parallel, model) for phase in (FIRST, CONTINUATION) if phase in self._longest)
        reasons = [f"{why}, for {one.phase}" for one in phases if (why := why_not(one.memory, self.hardware))]
        load = self.time.load_seconds(parallel, model, self.job.dit_config)
        compiling = self.time.compile_seconds(parallel, cached=self.job.compiled_before)
        work = self._work(parallel, model)
        teams = self._teams(candidate)
        rendering = work.shortest_possible(candidate.num_replicas)
        if teams is not None:
            rendering = work.shortest_with_teams(candidate.num_replicas, teams.speedups)
        bound = self._start_seconds(parallel) + load + compiling + rendering
        option = Option(
            parallel=parallel,
            model=model,
            num_replicas=candidate.num_replicas,
            phases=phases,
            fits=not reasons,
            reason=reasons[0] if reasons else "",
            load_seconds=load,
            compile_seconds=compiling,
            bound_seconds=bound,
            elastic=teams is not None,
        )
        return self._timed(option, bound)

    def simulated(self, option: Option) -> Option:
        """Return ``option`` with the time of the job as a simulation of its dispatch finds it."""
        times, teams = self._times(option.parallel, option.model), self._teams(option)
        speedups = None if teams is None else tuple(teams.speedups.items())
        same = (option.num_replicas, option.load_seconds, tuple(map(times, self._examples)), speedups)
        if same not in self._known:
            run = partial(
                simulate,
                self.job.stories,
                option.num_replicas,
                times,
                swap_seconds=option.load_seconds,
                overlap=self.job.dispatch.overlap_saving,
                keep_bars=True,
            )
            few = self.job.num_shots <= _ALL_SLACKS_UP_TO
            slacks = SLACKS if teams is not None and few else (SLACK,)
            tries = [(run(teams=teams and replace(teams, slack=one)), one) for one in slacks]
            self._known[same] = min(tries, key=lambda one: one[0].makespan)
        found, slack = self._known[same]
        makespan = self._start_seconds(option.parallel) + option.compile_seconds + found.makespan
        idle = 1.0 - found.busy_seconds / (option.num_replicas * makespan)
        timed = self._timed(option, makespan)
        return replace(timed, simulated=True, idle_share=idle, tail_slack=slack, timeline=found.bars)

    def work_and_path(self, option: Option) -> tuple[float, float]:
        """Return the seconds of one replica's share of all work, and of the longest path of shots."""
        work = self._work(option.parallel, option.model)
        return work.rendering / option.num_replicas, max(work.longest_paths)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _timed(self, option: Option, makespan: float) -> Option:
        gpu_hours = self.hardware.num_gpus * makespan / _HOUR
        price = self.hardware.price_per_gpu_hour
        return replace(
            option,
            makespan_seconds=makespan,
            gpu_hours=gpu_hours,
            clips_per_gpu_hour=self.job.num_shots / gpu_hours,
            cost=None if price is None else price * gpu_hours,
        )

    def _phase(self, phase: str, parallel: ParallelSettings, model: ModelSettings) -> PhaseFigures:
        sampler = self._longest[phase]
        keyframes = 0 if phase == FIRST else self.job.memory.max_keyframes
        blocks = self._resident_blocks(parallel, model, sampler, keyframes)
        num_tokens = num_tokens_of(sampler, keyframes)
        step = self.time.step_seconds(
            parallel,
            model,
            self.job.dit_config,
            num_tokens,
            passes=sampler.passes_per_step,
            resident_blocks=blocks,
        )
        return PhaseFigures(
            phase=phase,
            num_tokens=num_tokens,
            memory=memory_of(self.job, self.hardware, parallel, model, sampler, keyframes),
            step_seconds=step.total,
            shot_seconds=self._shot_time(parallel, model, sampler, T2V if phase == FIRST else M2V, keyframes).total,
        )

    def _work(self, parallel: ParallelSettings, model: ModelSettings) -> Work:
        return work_of(self._kinds, self._counts, self._times(parallel, model))

    def _start_seconds(self, parallel: ParallelSettings) -> float:
        """Reading the text encoder, and the condition that all cuts of a replica share."""
        text = self.time.text_load_seconds(self.job.model, self.job.text_encoder)
        cuts = (shot.sampler for shot in self._examples if shot.kind == M2V and not shot.needs.continues)
        first = next(cuts, None)
        return text + (0.0 if first is None else self.time.cut_seconds(parallel, first, self.job.vae))

    def _teams(self, one: Candidate | Option) -> Teams | None:
        """How replicas of ``one`` render the last shots together; None where they do not."""
        parallel, rest = one.parallel, self.hardware.gpus_per_node % one.parallel.ranks_per_replica
        per_node = self.hardware.gpus_per_node // parallel.ranks_per_replica
        sizes = team_sizes(per_node) if per_node and not rest else ()
        if self.job.dispatch.elastic_tail == "off" or not sizes or not holds_whole_weights(parallel):
            return None
        layouts = {size: self._team_layout(parallel, size) for size in sizes}
        of_size = {size: self._times(layout, one.model) for size, layout in layouts.items()}
        alone = self._times(parallel, one.model)
        largest = max(self._examples, key=lambda shot: shot.cost)
        speedups = {size: alone(largest).render / times(largest).render for size, times in of_size.items()}
        return Teams(
            replicas_per_node=per_node,
            speedups={size: gain for size, gain in speedups.items() if gain >= LEAST_SPEEDUP},
            times=lambda shot, size: of_size[size](shot),
        )

    def _team_layout(self, parallel: ParallelSettings, size: int) -> ParallelSettings:
        """The layout of a team of ``size`` replicas of ``parallel``."""
        may_split = all(shot.sampler.passes_per_step == 2 for shot in self._examples)
        heads = self.job.dit_config.num_heads
        team = merged_settings(parallel, size, num_heads=heads, may_split_guidance=may_split)
        return as_team(team, parallel)

    def _times(self, parallel: ParallelSettings, model: ModelSettings) -> Callable[[PlannedShot], Times]:
        of_class = []
        for shot in self._examples:
            keyframes = self.job.keyframes_of(shot)
            time = self._shot_time(parallel, model, shot.sampler, shot.kind, keyframes, continued=shot.needs.continues)
            of_class.append(Times(render=time.busy, save=time.save))
        return lambda shot: of_class[self._class_of[id(shot)]]

    def _shot_time(
        self,
        parallel: ParallelSettings,
        model: ModelSettings,
        sampler: SamplerSettings,
        kind: str,
        keyframes: float,
        *,
        continued: bool = False,
    ) -> ShotTime:
        return self.time.shot_seconds(
            parallel,
            model,
            self.job.dit_config,
            sampler,
            kind,
            keyframes,
            continued=continued,
            resident_blocks=self._resident_blocks(parallel, model, sampler, math.ceil(keyframes)),
            vae=self.job.vae,
            text_encoder=self.job.text_encoder,
        )

    def _resident_blocks(
        self, parallel: ParallelSettings, model: ModelSettings, sampler: SamplerSettings, keyframes: int
    ) -> int | None:
        if not streams(parallel, model):
            return None
        return resident_blocks(
            parallel,
            model,
            self.job.dit_config,
            sampler,
            num_keyframes=keyframes,
            adapters=self.job.adapters,
            room=self.hardware.memory_bytes,
            vae=self.job.vae,
        )
