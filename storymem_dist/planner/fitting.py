"""What would make a layout fit that does not: a change of one setting, or the nearest job that fits some layout."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.parallel.settings import AUTO, ParallelSettings
from storymem_dist.planner.candidates import candidates
from storymem_dist.planner.figures import memory_of, why_not
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.job import FIRST, Option, PlanJob
from storymem_dist.planner.memory import num_tokens_of
from storymem_dist.weights.settings import ModelSettings

_MOST_GPUS = 64
_SIDE = 16  # sides of a frame are multiples of this


def shortfall(option: Option, hardware: Hardware) -> float:
    """Return how much more memory ``option`` needs than there is, as a ratio: of a device or a node's host memory."""
    room = hardware.memory_bytes
    ratios = [1.0]
    for one in option.phases:
        on_host = one.memory.on_host + (one.memory.on_device if room is None else 0)
        ratios.append(hardware.gpus_per_node * on_host / hardware.host_memory_bytes)
        if room is not None:
            ratios.append(one.memory.on_device / max(1, room))
    return max(ratios)


def with_remedies(options: Sequence[Option], job: PlanJob, hardware: Hardware) -> list[Option]:
    """Return ``options``, each with what would make it fit: the first change of one setting that does."""
    known: dict[tuple[object, ...], str] = {}
    found = []
    for option in options:
        parallel = option.parallel
        like = (parallel.axes, parallel.across_nodes, parallel.weights, option.model.experts, option.model.linears)
        if like not in known:
            known[like] = _remedy(option, job, hardware)
        found.append(replace(option, remedy=known[like]))
    return found


def _remedy(option: Option, job: PlanJob, hardware: Hardware) -> str:
    has_first = option.phases[0].phase == FIRST
    for what, parallel, model, keyframes, sampler in _changes(option, job):
        if _fits(job, hardware, parallel, model, sampler, keyframes, has_first=has_first):
            return what
    return "no single change helps"


def nearest_possible(job: PlanJob, hardware: Hardware, parallel: ParallelSettings) -> str:
    """Return a sentence with the nearest things that are possible where no layout fits: fewer frames, a smaller size,
    more devices.
    """
    sampler = _longest(job)
    size = f"{sampler.width}x{sampler.height}"
    ways = []
    if frames := _most_frames(job, hardware, parallel, sampler):
        ways.append(f"sampler.num_frames={frames} at {size} fits")
    if smaller := _largest_size(job, hardware, parallel, sampler):
        ways.append(f"{smaller.width}x{smaller.height} fits with {sampler.num_frames} frames")
    if number := _fewest_gpus(job, hardware, parallel):
        ways.append(f"{number} of these devices on a node fit the job as it is")
    if not ways:
        return f"no length and no size of a clip fits {hardware.device}, with up to {_MOST_GPUS} of them on a node"
    return f"the nearest possible: {', or '.join(ways)}"


def _changes(
    option: Option, job: PlanJob
) -> Iterator[tuple[str, ParallelSettings, ModelSettings, int, SamplerSettings]]:
    """Changes of one setting each, the mildest first."""
    parallel, model, most, sampler = option.parallel, option.model, job.memory.max_keyframes, _longest(job)
    if model.experts != "stream" and parallel.weights == "replicated":
        for experts in ("stream", "swap"):
            yield f"model.experts={experts}", parallel, replace(model, experts=experts), most, sampler
    if model.experts == "resident" and parallel.weights == "fsdp":
        yield "model.experts=swap", parallel, replace(model, experts="swap"), most, sampler
    if parallel.weights == "replicated" and parallel.ranks_per_replica > 1:
        shared = replace(parallel, weights="fsdp")
        yield "parallel.weights=fsdp", shared, replace(model, experts="resident"), most, sampler
    if parallel.weights in ("fsdp_offload", "zero3") or model.experts != "resident":
        held = replace(parallel, weights="replicated") if parallel.weights != "fsdp" else parallel
        yield "model.experts=resident", held, replace(model, experts="resident"), most, sampler
    _, ring, ulysses = parallel.axes
    if parallel.weights != "zero3":
        for wider in (2, 4, 8):
            if job.dit_config.num_heads % (wider * ulysses) == 0:
                axes = replace(parallel, ulysses=wider * ulysses)
                yield f"parallel.ulysses={wider * ulysses}", axes, model, most, sampler
            else:
                yield f"parallel.ring={wider * ring}", replace(parallel, ring=wider * ring), model, most, sampler
    if model.linears == "exact":
        for linears in ("float8", "int8"):
            yield f"model.linears={linears} (lossy)", parallel, replace(model, linears=linears), most, sampler
    if most > 0:
        yield "memory.max_keyframes=3", parallel, model, min(3, most), sampler
    for share in (4, 2, 1):
        if (shorter := _shortened(sampler, share * (sampler.num_frames - 1) // 20 * 4 + 1)) is not None:
            yield f"sampler.num_frames={shorter.num_frames}", parallel, model, most, shorter


def _shortened(sampler: SamplerSettings, num_frames: int) -> SamplerSettings | None:
    """``sampler`` with fewer frames; None where they are not allowed, as a clip too short for what it continues."""
    try:
        return replace(sampler, num_frames=num_frames)
    except ConfigError:
        return None


def _fits(
    job: PlanJob,
    hardware: Hardware,
    parallel: ParallelSettings,
    model: ModelSettings,
    sampler: SamplerSettings,
    keyframes: int,
    *,
    has_first: bool = True,
) -> bool:
    """Whether first shots and shots with ``keyframes`` in their memory both fit."""
    if model.experts == "stream" and parallel.weights == "fsdp":
        return False
    return not any(
        why_not(memory_of(job, hardware, parallel, model, sampler, one), hardware)
        for one in ({0, keyframes} if has_first else {keyframes})
    )


def _any_fits(job: PlanJob, hardware: Hardware, parallel: ParallelSettings, sampler: SamplerSettings) -> bool:
    one_way = replace(parallel, compile=False) if parallel.compile == AUTO else parallel
    try:
        found = candidates(job, hardware, one_way)
    except LayoutError:
        return False
    keyframes = job.memory.max_keyframes
    return any(_fits(job, hardware, one.parallel, one.model, sampler, keyframes) for one in found)


def _longest(job: PlanJob) -> SamplerSettings:
    samplers = {id(shot.sampler): shot.sampler for shots in job.stories for shot in shots}
    return max(samplers.values(), key=lambda one: num_tokens_of(one, 0))


def _most_frames(job: PlanJob, hardware: Hardware, parallel: ParallelSettings, sampler: SamplerSettings) -> int | None:
    """The most frames (4n+1) at this size that fit some layout; by halving, since memory grows with frames."""
    low, high = -1, (sampler.num_frames - 1) // 4
    while high - low > 1:
        middle = (low + high) // 2
        shorter = _shortened(sampler, 4 * middle + 1)
        fits = shorter is None or _any_fits(job, hardware, parallel, shorter)
        low, high = (middle, high) if fits else (low, middle)
    frames = 4 * low + 1
    return frames if low >= 0 and _shortened(sampler, frames) is not None else None


def _largest_size(
    job: PlanJob, hardware: Hardware, parallel: ParallelSettings, sampler: SamplerSettings
) -> SamplerSettings | None:
    """The largest size of about this shape that fits some layout with all frames."""
    low, high = 0, min(sampler.height, sampler.width) // _SIDE
    found: SamplerSettings | None = None
    while high - low > 1:
        middle = (low + high) // 2
        scale = middle * _SIDE / min(sampler.height, sampler.width)
        height, width = (max(_SIDE, round(scale * side / _SIDE) * _SIDE) for side in (sampler.height, sampler.width))
        smaller = replace(sampler, height=height, width=width)
        if _any_fits(job, hardware, parallel, smaller):
            low, found = middle, smaller
        else:
            high = middle
    return found


def _fewest_gpus(job: PlanJob, hardware: Hardware, parallel: ParallelSettings) -> int | None:
    number = 2 * hardware.gpus_per_node
    if hardware.memory_bytes is None:  # more ranks on the same processors
        return None
    while number <= _MOST_GPUS:
        grown = replace(
            hardware,
            gpus_per_node=number,
            host_memory_gib=hardware.host_memory_gib * number / hardware.gpus_per_node,
        )
        free = replace(parallel, num_replicas=None)
        if _any_fits(job, grown, free, _longest(job)):
            return number
        number *= 2
    return None
