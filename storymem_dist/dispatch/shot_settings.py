"""A shot's own settings: the sampler that it is rendered with, and what it adds to the inputs of its fingerprint.

A shot that sets nothing has the job's sampler and adds nothing. Reads the files that a shot names, for their digests;
knows nothing of graphs, run folders or weights.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.errors import ConfigError, StoryboardError, StoryMemError
from storymem_dist.files import file_digest
from storymem_dist.memory.settings import SELECTION_KEYS
from storymem_dist.story.images import pixel_rule
from storymem_dist.story.modes import GIVEN, NO_CONTINUATION
from storymem_dist.story.schema import Shot
from storymem_dist.weights.lora import lora_inputs

PIXEL_SAMPLER_KEYS = (
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
"""The settings of a sampler that change the pixels of a shot of any kind."""

_GIVEN_INPUTS = (
    "sampler.height",
    "sampler.width",
    "sampler.fps",
    *(f"memory.{key}" for key in SELECTION_KEYS),
    "pixel_version",
)
"""What a given clip has in common with the job, next to the settings of ``video``."""


def shot_sampler(shot: Shot, sampler: SamplerSettings) -> SamplerSettings:
    """Return the settings that ``shot`` is sampled with: the job's ``sampler`` with the shot's own values over it.

    A length in seconds or frames becomes the nearest 4n+1 frames. Returns ``sampler`` itself where the shot sets none
    of them. The shot's seed is not part of it: see ``dispatch.plan``. Raises ``StoryboardError``, with the shot's id,
    for values that ``SamplerSettings`` refuses.
    """
    options, changes = shot.options, dict[str, Any]()
    if (asked := asked_frames(shot, sampler.fps)) is not None:
        changes["num_frames"] = 4 * math.floor((max(asked, 1.0) - 1.0) / 4.0 + 0.5) + 1
    if options.num_inference_steps is not None:
        changes["num_inference_steps"] = options.num_inference_steps
    if options.guidance_scale is not None:
        high, low = options.guidance_scale
        changes |= {"guidance_scale_high": float(high), "guidance_scale_low": float(low)}
    if options.negative_prompt is not None:
        changes["negative_prompt"] = options.negative_prompt
    if not changes or shot.video is not None:
        return sampler
    continues = not shot.cut and shot.index > 0
    try:
        own = replace(sampler, **changes, continuation=sampler.continuation if continues else NO_CONTINUATION)
    except ConfigError as error:
        raise StoryboardError(f"{shot.shot_id}: {error}") from error
    own.continuation = sampler.continuation
    return own


def asked_frames(shot: Shot, fps: int) -> float | None:
    """Return the length that the shot asks for, in frames, before it is rounded; None where it asks for none."""
    if shot.options.num_frames is not None:
        return float(shot.options.num_frames)
    return None if shot.options.duration is None else shot.options.duration * fps


def rounding(shot: Shot, sampler: SamplerSettings) -> str:
    """Return how the shot's length is rounded, as a phrase; empty where it is used as it is written.

    ``sampler`` is that of the shot.
    """
    asked = asked_frames(shot, sampler.fps)
    if asked is None or asked == sampler.num_frames or shot.video is not None:
        return ""
    written = f"{asked:g} frames"
    if shot.options.duration is not None and shot.options.num_frames is None:
        written = f"{shot.options.duration:g} s at {sampler.fps} frames per second, {written},"
    return f"{written} became {sampler.num_frames} frames (4n+1)"


def own_settings(shot: Shot, sampler: SamplerSettings) -> dict[str, Any]:
    """Return what the storyboard sets for this shot alone, as JSON values for its record; files by their names.

    ``sampler`` is that of the shot. Empty for a shot that sets nothing.
    """
    own: dict[str, Any] = {key: value for key, value in asdict(shot.options).items() if value is not None}
    if shot.options.loras is not None:
        own["loras"] = [{**lora, "path": Path(str(lora.get("path", ""))).name} for lora in shot.options.loras]
    if rounded := rounding(shot, sampler):
        own["rounding"] = rounded
    if shot.name:
        own["name"] = shot.name
    for key, path in (("start_image", shot.start_image), ("video", shot.video)):
        if path is not None:
            own[key] = path.name
    if shot.references:
        own["references"] = [{"path": one.path.name, "sink": one.is_sink} for one in shot.references]
    if not shot.remember:
        own["remember"] = False
    if shot.entities:
        own["entities"] = list(shot.entities)
    if shot.recall is not None:
        own["recall"] = list(shot.recall)
    return own


def sampler_inputs(kind: str, sampler: SamplerSettings) -> dict[str, Any]:
    """Return what of ``sampler`` changes the pixels of a ``kind`` shot, except its seed; keys begin with "sampler."."""
    inputs: dict[str, Any] = {f"sampler.{key}": getattr(sampler, key) for key in PIXEL_SAMPLER_KEYS}
    inputs["sampler.flow_shift"] = sampler.flow_shift(kind)
    inputs["sampler.boundary_ratio"] = sampler.boundary_ratio(kind)
    if sampler.needs_negative_prompt:
        inputs["sampler.negative_prompt"] = sampler.negative_prompt
        if sampler.guidance_interval:
            inputs["sampler.guidance_interval"] = list(sampler.guidance_interval)
    return inputs


def shot_inputs(
    shot: Shot,
    *,
    kind: str,
    mode: str,
    seed: int,
    sampler: SamplerSettings,
    job_sampler: SamplerSettings,
    job_inputs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return everything that changes the pixels and keyframes of a shot, except the shots before it; JSON values.

    ``sampler`` is the shot's own, ``job_sampler`` the job's, ``job_inputs`` those of the job by kind
    (``BatchPart.inputs``). Under "sampler." are the shot's own values. Files are there by the digest of their content.
    A given clip has no prompt, seed and weights among its inputs. Raises ``StoryboardError``, with the shot's id, when
    a file cannot be read.
    """
    if shot.video is not None:
        return _given_inputs(shot, job_inputs)
    of_job = dict(job_inputs[kind])
    if sampler is not job_sampler:
        for key in sampler_inputs(kind, job_sampler):
            of_job.pop(key, None)
        of_job |= sampler_inputs(kind, sampler)
    inputs = {"prompt": shot.prompt, "seed": seed, "mode": mode, **of_job}
    if shot.start_image is not None:
        inputs["start_image"] = _image_digest(shot, "start_image", shot.start_image)
    if loras := shot_lora_inputs(shot):
        inputs["loras"] = loras
    return inputs | _memory_inputs(shot)


def shot_lora_inputs(shot: Shot) -> list[dict[str, Any]]:
    """Return the LoRAs of a shot as JSON values; empty without any, and for a given clip.

    Raises ``StoryboardError``, with the shot's id, when a file is missing or cannot be read.
    """
    if shot.video is not None:
        return []
    try:
        return lora_inputs(shot.options.loras)
    except StoryMemError as error:
        raise StoryboardError(f"{shot.shot_id}: {error}") from None


def _given_inputs(shot: Shot, job_inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    assert shot.video is not None
    of_job = next(iter(job_inputs.values()))
    kept = {key: value for key, value in of_job.items() if key in _GIVEN_INPUTS or key.startswith("video.")}
    return {"mode": GIVEN, **kept, "given_clip": _digest(shot, "video", shot.video)} | _memory_inputs(shot)


def _memory_inputs(shot: Shot) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if shot.references:
        inputs["references"] = [
            {"image": _image_digest(shot, "references", reference.path), "sink": reference.is_sink}
            for reference in shot.references
        ]
    if not shot.remember:
        inputs["remember"] = False
    return inputs


def shot_cost(cost: CostModel, sampler: SamplerSettings, job_sampler: SamplerSettings) -> CostModel:
    """Return the cost model of a shot with its own ``sampler``. ``cost`` is the job's model."""
    if sampler is job_sampler:
        return cost
    return replace(
        cost,
        num_frames=sampler.num_frames,
        num_inference_steps=sampler.num_inference_steps,
        passes_per_step=sampler.passes_per_step,
    )


def _image_digest(shot: Shot, key: str, path: Path) -> str:
    return _digest(shot, key, path, is_image=True)


def _digest(shot: Shot, key: str, path: Path, *, is_image: bool = False) -> str:
    """SHA-256 of a file that a shot names under ``key``, for images with the pixel rule. Raises ``StoryboardError``."""
    try:
        found = path.stat()
        return _digest_of(path, (found.st_size, found.st_mtime_ns, found.st_ino), is_image)
    except OSError as error:
        raise StoryboardError(f"{shot.shot_id}: {key}: {path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=4096)
def _digest_of(path: Path, state: tuple[int, int, int], is_image: bool) -> str:
    """The digest of a file in this state: a job plans its stories several times, and clips have gigabytes."""
    return file_digest(path) + (pixel_rule(path) if is_image else "")
