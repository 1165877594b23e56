"""What a plan is made for, and what it says of one layout: plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.merging import SLACK
from storymem_dist.dispatch.needs import story_needs, waits_for
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.shot_settings import shot_cost, shot_sampler
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import WAN22_A14B, TextEncoderConfig, VaeConfig
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import WeightMemory
from storymem_dist.planner.memory import NO_ADAPTERS, RankMemory
from storymem_dist.planner.simulation import Bar
from storymem_dist.story.modes import KINDS
from storymem_dist.story.schema import Story
from storymem_dist.weights.settings import ModelSettings

FIRST, CONTINUATION = "first shots", "continuation"
"""The two phases of a job: shots without memory, and shots with up to ``memory.max_keyframes`` keyframes."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What is to be rendered, from sizes alone.

    ``stories``: the shots that are left, story by story, as ``sketch_stories`` or a job's own plan gives them (shots
    that are left out count as done). ``sampler`` is the job's own; a shot's own settings are in its ``PlannedShot``.
    ``dit_config``: of the larger kind of experts that the job needs. ``adapters``: what the LoRAs of a shot need next
    to the experts. ``compiled_before``: whether the compiler's cache holds what compiled blocks need. ``scorer_bytes``:
    weights of a scorer of keyframes that stays on the leader's device between shots.
    """

    stories: Sequence[Sequence[PlannedShot]]
    sampler: SamplerSettings
    model: ModelSettings
    dit_config: DiTConfig
    memory: MemorySettings = field(default_factory=MemorySettings)
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)
    adapters: WeightMemory = NO_ADAPTERS
    compiled_before: bool = False
    scorer_bytes: int = 0
    text_encoder: TextEncoderConfig = WAN22_A14B.text_encoder
    vae: VaeConfig = WAN22_A14B.vae

    @property
    def num_shots(self) -> int:
        """Shots that are left to render."""
        return sum(map(len, self.stories))

    def keyframes_of(self, shot: PlannedShot) -> float:
        """Expected keyframes in the memory of ``shot``."""
        expected = CostModel(max_keyframes=self.memory.max_keyframes).expected_keyframes
        return expected(shot.kind, len(shot.needs.memory), shot.needs.num_references(shot.story, shot.shot))


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseFigures:
    """What one phase (``FIRST`` or ``CONTINUATION``) of a job needs under one option.

    ``memory``: of a rank, at its largest shot. ``step_seconds``: of one denoising step of its largest shot;
    ``shot_seconds``: of that shot, from text to saved video.
    """

    phase: str
    num_tokens: int
    memory: RankMemory
    step_seconds: float
    shot_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One candidate layout with everything decided: all axes are numbers, weights, experts and compile are resolved.

    ``fits`` is whether all phases fit the device and the host; where they do not, ``reason`` is why and ``remedy`` what
    would make them fit. Times are seconds; those of an option that does not fit say what would be.
    ``bound_seconds``: no order of shots ends sooner. ``makespan_seconds`` is simulated, or the bound where
    ``simulated`` is False: such an option cannot be better than those that were simulated. Both include loading and
    compiling. ``idle_share``: of the device time, what is spent waiting for shots or loading. ``elastic``: idle
    replicas merge for the last shots; ``tail_slack`` is the slack with which they do it best (``dispatch.merging``).
    """

    parallel: ParallelSettings
    model: ModelSettings
    num_replicas: int
    phases: tuple[PhaseFigures, ...]
    fits: bool
    reason: str = ""
    remedy: str = ""
    load_seconds: float = 0.0
    compile_seconds: float = 0.0
    makespan_seconds: float = 0.0
    bound_seconds: float = 0.0
    idle_share: float = 0.0
    clips_per_gpu_hour: float = 0.0
    gpu_hours: float = 0.0
    cost: float | None = None
    elastic: bool = False
    tail_slack: float = SLACK
    simulated: bool = False
    timeline: tuple[Bar, ...] = ()

    def memory(self, phase: str) -> RankMemory:
        """The memory of a rank in ``phase``."""
        return next(one.memory for one in self.phases if one.phase == phase)

    @property
    def worst(self) -> PhaseFigures:
        """The phase that needs the most device memory."""
        return max(self.phases, key=lambda one: one.memory.on_device)


def sketch_stories(
    stories: Sequence[Story], sampler: SamplerSettings, memory: MemorySettings, cost: CostModel
) -> list[tuple[PlannedShot, ...]]:
    """Return the shots of ``stories`` as a job plans them, without what only a run folder or weights can say.

    Nothing is read: seeds are 0 and fingerprints empty. Given clips are left out, since they need no experts.
    """
    return [shots for story in stories if (shots := _sketch(story, sampler, memory, cost))]


def _sketch(
    story: Story, job_sampler: SamplerSettings, memory: MemorySettings, cost: CostModel
) -> tuple[PlannedShot, ...]:
    all_needs = story_needs(story, job_sampler, memory)
    planned = []
    for shot, needs, waits in zip(story.shots, all_needs, waits_for(all_needs), strict=True):
        if needs.kind not in KINDS:
            continue
        sampler = shot_sampler(shot, job_sampler)
        own_cost = shot_cost(cost, sampler, job_sampler)
        keyframes = cost.expected_keyframes(needs.kind, len(needs.memory), needs.num_references(story, shot))
        planned.append(
            PlannedShot(
                part=0,
                story=story,
                shot=shot,
                kind=needs.kind,
                mode=needs.mode,
                seed=0,
                sampler=sampler,
                needs=needs,
                waits_for=waits,
                inputs={},
                fingerprint="",
                predecessor=None,
                cost=own_cost.shot_tflop(keyframes),
            )
        )
    return tuple(planned)
