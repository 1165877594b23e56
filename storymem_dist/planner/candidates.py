"""Which layouts a plan looks at: every choice of what is free, with what is pinned left as it is. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from storymem_dist.errors import LayoutError
from storymem_dist.parallel.layout import axes_that_fit, check_guidance
from storymem_dist.parallel.settings import AUTO, ParallelSettings
from storymem_dist.parallel.weight_memory import check_streaming
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.job import PlanJob
from storymem_dist.weights.settings import ModelSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to render a job: ``parallel`` has numbers for all axes, ``model.experts`` is not ``auto``."""

    parallel: ParallelSettings
    model: ModelSettings
    num_replicas: int


def candidates(job: PlanJob, hardware: Hardware, parallel: ParallelSettings) -> list[Candidate]:
    """Return every way to render ``job`` on all devices of ``hardware`` that ``parallel`` leaves open.

    Free is what is ``"auto"``: axes, ``weights``, ``compile`` and ``model.experts``. Replicas stay within a node,
    unless ``parallel.across_nodes`` is set or there are fewer stories than nodes. The two guidance passes are split
    only where all shots have both in all steps.

    Raises ``LayoutError`` when what is pinned cannot be formed, ``ConfigError`` when pins exclude each other.
    """
    check_streaming(job.model, parallel)
    return [
        Candidate(parallel=one, model=model, num_replicas=hardware.num_gpus // one.ranks_per_replica)
        for axes in _all_axes(job, hardware, parallel)
        for weights in _weights(axes, hardware)
        for model in _models(job.model, weights)
        for one in _compiled(weights, hardware)
    ]


def pins(job: PlanJob, parallel: ParallelSettings) -> tuple[str, ...]:
    """The settings that are pinned, of those that a plan could choose."""
    names = ("cfg", "ring", "ulysses", "weights", "compile")
    pinned = [f"parallel.{name}={_word(getattr(parallel, name))}" for name in names if getattr(parallel, name) != AUTO]
    return tuple(pinned + ([f"model.experts={job.model.experts}"] if job.model.experts != AUTO else []))


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _all_axes(job: PlanJob, hardware: Hardware, parallel: ParallelSettings) -> list[ParallelSettings]:
    """The axes that the devices can form and that the shots' guidance allows."""
    heads, per_node = job.dit_config.num_heads, hardware.gpus_per_node
    world = hardware.num_gpus if parallel.across_nodes else per_node
    found = axes_that_fit(parallel, world_size=world, ranks_per_node=per_node, num_heads=heads)
    if not parallel.across_nodes and parallel.free and len(job.stories) < hardware.nodes:
        wide = replace(parallel, across_nodes=True)
        spread = axes_that_fit(wide, world_size=hardware.num_gpus, ranks_per_node=per_node, num_heads=heads)
        found += [one for one in spread if one.ranks_per_replica > per_node]
    allowed, refused = [], None
    for one in found:
        try:
            for sampler in {id(shot.sampler): shot.sampler for shots in job.stories for shot in shots}.values():
                check_guidance(one, sampler)
        except LayoutError as error:
            refused = error
        else:
            allowed.append(one)
    if not allowed:
        assert refused is not None, "axes_that_fit raises where nothing fits"
        raise refused
    return allowed


def _weights(axes: ParallelSettings, hardware: Hardware) -> Iterator[ParallelSettings]:
    """``axes`` with each way to hold the weights. A rank alone has nothing to share, and streams by its experts."""
    if axes.weights != AUTO:
        yield axes
        return
    yield replace(axes, weights="replicated")
    if axes.ranks_per_replica > 1:
        yield replace(axes, weights="fsdp")
        if hardware.memory_bytes is not None:
            yield replace(axes, weights="fsdp_offload")


def _models(model: ModelSettings, parallel: ParallelSettings) -> Iterator[ModelSettings]:
    """``model`` with each residency of the experts that goes with where the weights live."""
    if parallel.streams_blocks:
        yield replace(model, experts="stream")
    elif model.experts != AUTO:
        if not (model.experts == "stream" and parallel.weights == "fsdp"):
            yield model
    elif parallel.weights == "replicated":
        yield from (replace(model, experts=one) for one in ("resident", "stream", "swap"))
    elif parallel.weights == "fsdp":
        yield from (replace(model, experts=one) for one in ("resident", "swap"))
    else:
        yield replace(model, experts="resident")


def _compiled(parallel: ParallelSettings, hardware: Hardware) -> Iterator[ParallelSettings]:
    """``parallel`` with and without compiled blocks, where that is free and possible."""
    if parallel.compile != AUTO:
        yield parallel
        return
    yield replace(parallel, compile=False)
    if parallel.weights != "zero3" and hardware.memory_bytes is not None:
        yield replace(parallel, compile=True)
