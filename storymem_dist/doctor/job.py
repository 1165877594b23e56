"""Checks of a configuration on this machine: its layers' format, weights, disks, memory, tracking.

Each check returns findings; an error that a render would raise becomes a problem with the same text.
Starts no ranks and renders nothing.
"""

import contextlib
import importlib.metadata
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from storymem_dist.config.schema import RenderConfig
from storymem_dist.dispatch.needs import story_needs
from storymem_dist.dispatch.shot_check import check_shots
from storymem_dist.dispatch.shot_loras import OpenedLoras, check_loras
from storymem_dist.doctor.finding import Finding, ok, problem, warning
from storymem_dist.doctor.scorer import scorer_bytes_if_known, scorer_words
from storymem_dist.errors import ConfigError, StoryMemError, WeightsNotFound
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import check_linears
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.observe.prometheus import check_textfile
from storymem_dist.observe.run.format import count
from storymem_dist.observe.wandb.process import check_settings, has_api_key
from storymem_dist.parallel.layout import axes_that_fit, check_guidance
from storymem_dist.parallel.settings import AUTO, ParallelSettings
from storymem_dist.parallel.weight_memory import (
    ON_DEVICE,
    WeightMemory,
    check_weight_memory,
    decide_experts,
    place_scorer,
    weight_memory,
)
from storymem_dist.story.loading import StoryBatch, load_storyboards
from storymem_dist.story.modes import KINDS, T2V
from storymem_dist.story.schema import ShotOptions
from storymem_dist.weights.bundle import Weights, open_weights, with_generated_weights
from storymem_dist.weights.checkpoints import WanCheckpoint
from storymem_dist.weights.prompt_lengths import check_prompt_lengths, cut_text_of
from storymem_dist.weights.prompt_words import check_prompt_words
from storymem_dist.weights.settings import ModelSettings

_READ_BYTES = 512 * 2**20
_READ_SECONDS = 2.0
_READ_BLOCK = 16 * 2**20
_SLOW_BYTES_PER_SECOND = 500e6
_MIN_OUTPUT_BYTES = 5 * GIB


def check_stories(settings: RenderConfig) -> Iterator[Finding]:
    """Whether the storyboards that ``stories=`` names can be read; nothing when it names none."""
    if settings.stories.path is None:
        return
    try:
        batch = load_storyboards(settings.stories.paths())
    except StoryMemError as error:
        yield problem("stories", "files", "none can be rendered", str(error))
        return
    batch = check_shots(batch, settings.sampler, settings.memory, partial(check_guidance, settings.parallel))
    batch = _check_loras(settings, batch)
    if batch.stories:
        yield ok("stories", "files", _contents(batch))
    yield from _check_prompts(settings, batch)
    for rejected in batch.rejected:
        yield problem("stories", str(rejected.source), "refused", rejected.message)


def _contents(batch: StoryBatch) -> str:
    """How many stories and shots there are; and how many shots are given, or rendered with settings of their own."""
    shots = [shot for story in batch.stories for shot in story.shots]
    num_given = sum(shot.video is not None for shot in shots)
    num_own = sum(shot.video is None and shot.options != ShotOptions() for shot in shots)
    parts = [count(len(batch.stories), "story", "stories"), count(len(shots), "shot")]
    parts += [f"{num_given} of them given"] if num_given else []
    parts += [f"{num_own} with settings of their own"] if num_own else []
    return ", ".join(parts)


def _check_loras(settings: RenderConfig, batch: StoryBatch) -> StoryBatch:
    """``batch`` without the stories whose LoRAs do not fit the experts, if these are there."""
    with_loras = [story for story in batch.stories if any(shot.options.loras for shot in story.shots)]
    needed = {need.kind for story in with_loras for need in story_needs(story, settings.sampler, settings.memory)}
    kinds = [kind for kind in KINDS if kind in needed]
    if not kinds:
        return batch
    try:
        weights = open_weights(with_generated_weights(settings.model), kinds, settings.sampler.continuation)
    except StoryMemError:  # weights have their own check
        return batch
    opened = OpenedLoras(weights, getattr(torch, settings.model.dtype))
    return check_loras(batch, settings.sampler, settings.memory, opened)


def _memory_of_loras(settings: RenderConfig, weights: Weights) -> WeightMemory:
    """What the LoRAs of a shot for the experts of ``weights`` need at most; those that cannot be used are left out."""
    opened = OpenedLoras(weights, getattr(torch, settings.model.dtype))
    if settings.stories.path is not None:
        with contextlib.suppress(StoryMemError):  # storyboards have their own check
            check_loras(load_storyboards(settings.stories.paths()), settings.sampler, settings.memory, opened)
    largest = opened.most_bytes(compiled=settings.parallel.may_compile)
    return WeightMemory(on_device=largest.on_device, on_host=largest.on_host)


def _check_prompts(settings: RenderConfig, batch: StoryBatch) -> Iterator[Finding]:
    """What of the stories is not rendered as it is written; prompts are counted if there are weights to count for."""
    with contextlib.suppress(StoryMemError):  # weights have their own check
        weights = open_weights(with_generated_weights(settings.model), (T2V,), settings.sampler.continuation)
        cut_text = cut_text_of(weights.any_checkpoint)
        negative_prompt = settings.sampler.needed_negative_prompt
        batch = check_prompt_lengths(batch, cut_text, negative_prompt=negative_prompt, refuse=False)
        batch = check_prompt_words(batch, weights.any_checkpoint)
    for message in batch.all_warnings:
        yield warning("stories", "text", message, "correct it if this is not what you mean")


def check_layers(settings: RenderConfig) -> Iterator[Finding]:
    """Whether this machine can multiply in the number format of ``model.linears``."""
    linears = settings.model.linears
    on_gpu = settings.parallel.device != "cpu" and torch.cuda.is_available()
    try:
        check_linears(linears, torch.device("cuda" if on_gpu else "cpu"))
    except StoryMemError as error:
        yield problem("model", "linears", f"{linears} cannot be used", str(error))
    else:
        yield ok("model", "linears", linears)


def check_weights(settings: RenderConfig) -> Iterator[Finding]:
    """Whether the weights of this configuration exist, are complete and fit it; and how fast they can be read."""
    try:
        model = with_generated_weights(settings.model)
    except StoryMemError as error:
        yield problem("weights", "small model", "cannot be used", str(error))
        return
    for kind in KINDS:
        try:
            weights = open_weights(model, (kind,), settings.sampler.continuation)
        except WeightsNotFound as error:
            yield problem("weights", kind, "missing", str(error))
            continue
        except StoryMemError as error:
            yield problem("weights", kind, "cannot be used", str(error))
            continue
        checkpoint = weights.checkpoints[kind]
        loras = {name: len(loras) for name, loras in weights.loras[kind].items()}
        yield ok(
            "weights",
            kind,
            f"{checkpoint.layout}, {checkpoint.root}"
            + (f", {max(loras.values())} LoRAs" if any(loras.values()) else ""),
        )
        yield from _check_read_speed(kind, checkpoint)
        yield from _check_memory(settings, kind, checkpoint, _memory_of_loras(settings, weights))


def _check_read_speed(kind: str, checkpoint: WanCheckpoint) -> Iterator[Finding]:
    files = checkpoint.expert_files
    largest = max(files, key=lambda path: path.stat().st_size)
    num_bytes, seconds = _timed_read(largest)
    if num_bytes < _READ_BLOCK:
        return
    speed = num_bytes / seconds
    total = sum(path.stat().st_size for path in files)
    value = f"{speed / 1e9:.2f} GB/s: {total / speed / 60:.1f} min to read {total / 1e9:.0f} GB"
    if speed < _SLOW_BYTES_PER_SECOND:
        fix = "move the weights to a local NVMe disk, or run `storymem-weights prepare` (half the bytes)"
        yield warning("weights", f"{kind} disk", value, fix)
    else:
        yield ok("weights", f"{kind} disk", value)


def _timed_read(path: Path) -> tuple[int, float]:
    """Return bytes read and seconds taken, from the disk itself if the kernel drops its cached pages on request."""
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while num_bytes < _READ_BYTES and time.perf_counter() - start < _READ_SECONDS:
            block = file.read(_READ_BLOCK)
            if not block:
                break
            num_bytes += len(block)
        return num_bytes, max(time.perf_counter() - start, 1e-9)


def _check_memory(
    settings: RenderConfig, kind: str, checkpoint: WanCheckpoint, adapters: WeightMemory
) -> Iterator[Finding]:
    """Whether the experts and a shot's LoRAs fit, with one rank on each of this machine's devices."""
    on_gpu = settings.parallel.device != "cpu" and torch.cuda.is_available()
    num_ranks = torch.cuda.device_count() if on_gpu else 1
    device, config, parallel = torch.device("cuda" if on_gpu else "cpu"), checkpoint.dit_config, settings.parallel
    refused = None
    try:
        layouts = list(_layouts(parallel, num_ranks, config))
    except StoryMemError as error:
        yield problem("weights", f"{kind} fit", "no layout", str(error))
        return
    scored = scorer_bytes_if_known(settings)
    for one in layouts:
        model = decide_experts(settings.model, one, config, device, adapters=adapters, scorer_bytes=scored)
        place = place_scorer(scored, model, one, config, device, adapters=adapters)
        scorers_on_host = 0 if place == ON_DEVICE else scored * max(1, num_ranks // one.ranks_per_replica)
        value = _memory_words(model, one, config, num_ranks, adapters) + scorer_words(scored, place)
        if parallel.free and num_ranks > 1:
            cfg, ring, ulysses = one.axes
            value += f", for example with cfg {cfg} x ring {ring} x ulysses {ulysses}, weights {one.weights}"
        try:
            check_weight_memory(
                model,
                one,
                config,
                device=device,
                ranks_per_node=num_ranks,
                adapters=adapters,
                scorers_on_host=scorers_on_host,
            )
        except StoryMemError as error:
            refused = refused or problem("weights", f"{kind} fit", value, str(error))
        else:
            yield ok("weights", f"{kind} fit", value)
            return
    assert refused is not None, "there is a layout"
    yield refused


def _layouts(parallel: ParallelSettings, num_ranks: int, config: DiTConfig) -> Iterator[ParallelSettings]:
    """The settings; or, where they leave something to the job, what it can choose from, narrowest first."""
    if not parallel.free:
        yield parallel
        return
    ways = ("replicated", "fsdp", "fsdp_offload") if parallel.weights == AUTO else (parallel.weights,)
    for axes in axes_that_fit(parallel, world_size=num_ranks, num_heads=config.num_heads):
        for weights in ways if axes.ranks_per_replica > 1 else ways[:1]:
            yield replace(axes, weights=weights)


def _memory_words(
    model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, num_ranks: int, adapters: WeightMemory
) -> str:
    needed = weight_memory(model, parallel, config)
    words = (
        f"experts={model.experts}: {needed.on_device / GIB:.1f} GiB on each device, "
        f"{needed.on_host * num_ranks / GIB:.1f} GiB on the host"
    )
    if adapters.on_device:
        words += f", and {adapters.on_device / GIB:.1f} GiB on each device for the LoRAs of a shot"
    return words


def check_output(settings: RenderConfig) -> Iterator[Finding]:
    """Whether the run folder can be written, supports hard links for records, and has space."""
    folder = Path(settings.output).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield problem("output", "folder", f"{existing} cannot be written", "choose another one with output=FOLDER")
        return
    free = shutil.disk_usage(existing).free
    if free < _MIN_OUTPUT_BYTES:
        fix = "free some space, or choose another output=FOLDER"
        yield warning("output", "free space", f"{free / 1e9:.1f} GB on {existing}", fix)
    else:
        yield ok("output", "free space", f"{free / 1e9:.0f} GB on {existing}")
    probe = existing / f".storymem-doctor-{uuid.uuid4().hex}"
    linked = probe.with_suffix(".link")
    try:
        probe.touch()
        os.link(probe, linked)
        yield ok("output", "hard links", "work: shots are committed exactly once")
    except OSError as error:
        fix = "records are published by hard links: choose a POSIX file system with output=FOLDER"
        yield problem("output", "hard links", error.strerror or str(error), fix)
    finally:
        probe.unlink(missing_ok=True)
        linked.unlink(missing_ok=True)


def check_tracking(settings: RenderConfig) -> Iterator[Finding]:
    """Whether Prometheus would find its file and Weights & Biases would upload."""
    if (textfile := settings.tracking.prometheus.textfile) is not None:
        try:
            yield ok("tracking", "prometheus", str(check_textfile(textfile)))
        except ConfigError as error:
            yield problem("tracking", "prometheus", "its file cannot be written", str(error))
    mode = settings.tracking.wandb.mode
    if mode == "off":
        yield ok("tracking", "wandb", "off")
        return
    version = importlib.metadata.version("wandb")
    try:
        check_settings(settings.tracking.wandb)
    except ConfigError as error:
        yield problem("tracking", "wandb", f"{version} refuses a setting", str(error))
        return
    if has_api_key():
        yield ok("tracking", "wandb", f"{version}, mode {mode}, key found")
    elif mode == "online":
        yield problem(
            "tracking", "wandb", f"{version}, mode online, no key", "wandb login, or tracking.wandb.mode=offline"
        )
    else:
        yield ok("tracking", "wandb", f"{version}, mode {mode}, no key: kept in the run folder (wandb sync uploads it)")
