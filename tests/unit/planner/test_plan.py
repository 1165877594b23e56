"""A plan: nothing that does not fit wins, nothing better is missed, pins hold, and what fits nowhere gets advice."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shot_workloads import make_chains, make_story, mixed_stories, planned
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.merging import SLACKS
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.settings import AUTO, ParallelSettings
from storymem_dist.planner.calibration import load_constants
from storymem_dist.planner.candidates import candidates
from storymem_dist.planner.figures import Figures, why_not
from storymem_dist.planner.hardware import Hardware, known_hardware
from storymem_dist.planner.job import CONTINUATION, FIRST, sketch_stories
from storymem_dist.planner.plan import PlanJob, make_plan
from storymem_dist.planner.timing import TimeModel
from storymem_dist.weights.settings import ModelSettings

FREE = ParallelSettings(cfg=AUTO, ring=AUTO, ulysses=AUTO, weights=AUTO)


def _job(stories: list[tuple[PlannedShot, ...]], **fields: Any) -> PlanJob:
    values: dict[str, Any] = {"sampler": SamplerSettings(), "model": ModelSettings(), "dit_config": WAN22_A14B.i2v}
    return PlanJob(stories=stories, **{**values, **fields})


def _hardware(name: str = "h100_80g", **changes: Any) -> Hardware:
    return replace(known_hardware(name), **{"nodes": 1, "gpus_per_node": 4, **changes})


def _with_sampler(stories: list[tuple[PlannedShot, ...]], sampler: SamplerSettings) -> list[tuple[PlannedShot, ...]]:
    return [tuple(replace(shot, sampler=sampler) for shot in shots) for shots in stories]


@pytest.fixture(scope="module")
def stories() -> list[tuple[PlannedShot, ...]]:
    return make_chains(2)


@pytest.mark.parametrize("elastic_tail", ["off", "auto"])
def test_no_option_is_better_than_the_winner(stories: list[tuple[PlannedShot, ...]], elastic_tail: str) -> None:
    job, hardware = _job(stories, dispatch=DispatchSettings(elastic_tail=elastic_tail)), _hardware()
    free = replace(FREE, ring=1, weights="replicated")
    best = make_plan(job, hardware, free).best
    assert best is not None
    figures = Figures(job, hardware, TimeModel(hardware=hardware, constants=load_constants(hardware)))
    options = [figures.option(candidate) for candidate in candidates(job, hardware, free)]
    least = min(figures.simulated(option).makespan_seconds for option in options if option.fits)
    assert best.simulated
    assert least <= best.makespan_seconds <= 1.006 * least
    assert len(best.timeline) == job.num_shots


def test_every_makespan_keeps_its_bound(stories: list[tuple[PlannedShot, ...]]) -> None:
    for elastic_tail in ("off", "auto"):
        job = _job(stories, dispatch=DispatchSettings(elastic_tail=elastic_tail))
        plan = make_plan(job, _hardware(gpus_per_node=8), replace(FREE, ring=1, weights="replicated", compile=False))
        assert all(one.makespan_seconds >= 0.9999 * one.bound_seconds for one in plan.options if one.simulated)


@pytest.mark.parametrize("memory_gib", [12, 31, 62])
def test_the_winner_fits_first_shots_and_a_full_memory(
    stories: list[tuple[PlannedShot, ...]], memory_gib: float
) -> None:
    hardware = _hardware(memory_gib=memory_gib)
    plan = make_plan(_job(stories), hardware, replace(FREE, ring=1))
    for option in plan.options:
        assert {one.phase for one in option.phases} == {FIRST, CONTINUATION}
        assert option.fits is not any(why_not(one.memory, hardware) for one in option.phases)
        assert option.fits or (option.reason and option.remedy)
        on_device = max(one.memory.on_device for one in option.phases)
        on_host = max(one.memory.on_host for one in option.phases) * hardware.gpus_per_node
        assert option.fits is (on_device <= memory_gib * 2**30 and on_host <= hardware.host_memory_bytes)
    assert plan.best is None or plan.options[0] is plan.best


def test_a_remedy_makes_the_option_fit(stories: list[tuple[PlannedShot, ...]]) -> None:
    hardware = _hardware("rtx4090_24g")
    plan = make_plan(_job(stories), hardware, FREE)
    resident = [one for one in plan.options if one.model.experts == "resident" and one.parallel.weights == "replicated"]
    assert resident
    for option in resident:
        assert not option.fits
        assert "weights" in option.reason
        assert option.remedy == "model.experts=stream"
        twin = [
            one
            for one in plan.options
            if one.parallel == option.parallel and one.model.experts == "stream" and one.fits
        ]
        assert len(twin) == 1


def test_what_is_pinned_stays(stories: list[tuple[PlannedShot, ...]]) -> None:
    pinned = replace(FREE, cfg=2, compile=False)
    plan = make_plan(_job(stories, model=ModelSettings(experts="swap")), _hardware(), pinned)
    assert {one.parallel.axes[0] for one in plan.options} == {2}
    assert {one.parallel.compile for one in plan.options} == {False}
    assert {one.model.experts for one in plan.options if one.parallel.weights == "replicated"} == {"swap"}
    assert plan.pins == ("parallel.cfg=2", "parallel.compile=false", "model.experts=swap")


@pytest.mark.parametrize("changes", [{"guidance_scale_low": 1.0}, {"guidance_interval": [0.1, 0.8]}])
def test_guidance_that_is_not_in_every_step_is_not_split(
    stories: list[tuple[PlannedShot, ...]], changes: dict[str, Any]
) -> None:
    job = _job(_with_sampler(stories, replace(SamplerSettings(), **changes)))
    assert {one.parallel.axes[0] for one in make_plan(job, _hardware(), FREE).options} == {1}
    with pytest.raises(LayoutError, match=next(iter(changes))):
        make_plan(job, _hardware(), replace(FREE, cfg=2))


def test_pins_that_exclude_each_other_are_one_sentence(stories: list[tuple[PlannedShot, ...]]) -> None:
    job = _job(stories, model=ModelSettings(experts="stream"))
    with pytest.raises(ConfigError, match=r"experts=stream needs whole weights on every rank, but .*weights=fsdp"):
        make_plan(job, _hardware(), replace(FREE, weights="fsdp"))


def test_the_slack_of_the_tail_is_the_best_of_those_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(make_chains(6), dispatch=DispatchSettings(elastic_tail="auto"))
    alone = ParallelSettings(cfg=1, ring=1, ulysses=1, weights="replicated", compile=False)
    found = []
    for slacks in (SLACKS, *((one,) for one in SLACKS)):
        monkeypatch.setattr("storymem_dist.planner.figures.SLACKS", slacks)
        best = make_plan(job, _hardware("l40s_48g", gpus_per_node=8, nodes=2), alone).best
        assert best is not None
        found.append((best.makespan_seconds, best.tail_slack))
    assert found[0] == min(found[1:], key=lambda one: one[0])
    assert len({seconds for seconds, _ in found[1:]}) > 1


def test_ulysses_divides_the_heads_and_replicas_stay_on_their_node(stories: list[tuple[PlannedShot, ...]]) -> None:
    job = _job(stories, dit_config=replace(WAN22_A14B.i2v, num_heads=10))
    plan = make_plan(job, _hardware(nodes=2, gpus_per_node=8), FREE)
    assert {one.parallel.axes[2] for one in plan.options} == {1, 2}
    assert all(one.parallel.ranks_per_replica <= 8 and not one.parallel.across_nodes for one in plan.options)
    assert all(one.num_replicas * one.parallel.ranks_per_replica == 16 for one in plan.options)


def test_fewer_stories_than_nodes_may_span_nodes() -> None:
    plan = make_plan(_job(make_chains(1)), _hardware(nodes=2, gpus_per_node=2), FREE)
    wide = [one for one in plan.options if one.parallel.ranks_per_replica > 2]
    assert wide
    assert all(one.parallel.across_nodes for one in wide)


def test_no_shots_is_one_sentence_with_the_nearest_job() -> None:
    with pytest.raises(ConfigError, match="no shot to plan; the nearest possible thing is a job of one story"):
        make_plan(_job([]), _hardware(), FREE)


def test_a_size_that_fits_nowhere_names_what_does() -> None:
    sampler = SamplerSettings(height=2160, width=3840, num_frames=241)
    job = _job(_with_sampler(make_chains(1), sampler), sampler=sampler)
    plan = make_plan(job, _hardware("rtx4090_24g", gpus_per_node=1), FREE)
    assert plan.best is None
    assert plan.options[0].remedy == plan.reasons[0]
    assert plan.reasons[0].startswith("the nearest possible: ")
    size = plan.reasons[0].split("fits with 241 frames")[0].split()[-1]
    width, height = map(int, size.split("x"))
    smaller = replace(sampler, width=width, height=height)
    fitting = _job(_with_sampler(make_chains(1), smaller), sampler=smaller)
    assert make_plan(fitting, _hardware("rtx4090_24g", gpus_per_node=1), FREE).best is not None


def test_a_sketch_has_the_shots_and_costs_of_a_job() -> None:
    stories = [*mixed_stories(4), make_story(9, 6)]
    sketched = sketch_stories(stories, SamplerSettings(), MemorySettings(), CostModel())
    for sketch, real in zip(sketched, planned(stories), strict=True):
        for one, other in zip(sketch, real, strict=True):
            assert replace(one, seed=other.seed, inputs=other.inputs, fingerprint=other.fingerprint) == replace(
                other, predecessor=None
            )
