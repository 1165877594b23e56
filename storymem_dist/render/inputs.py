"""The inputs of a job: its stories, cut to size; kinds of experts; everything that changes pixels; expected cost.

Pure functions of settings, stories and checked weights; starts and loads nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from storymem_dist.config.schema import RenderConfig, StoriesSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.needs import story_needs
from storymem_dist.dispatch.shot_check import longest_sampler
from storymem_dist.dispatch.shot_settings import sampler_inputs
from storymem_dist.memory.settings import SELECTION_KEYS
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.modes import KINDS, M2V
from storymem_dist.story.schema import Scene, Story
from storymem_dist.weights.bundle import Weights

PIXEL_VERSION = 1
"""Part of every fingerprint. Increase it when a change of this program changes pixels."""

_RECALL_KEYS = ("max_keyframes", "num_fixed")


def choose_stories(batch: StoryBatch, settings: StoriesSettings) -> StoryBatch:
    """Cut the batch to ``max_stories`` stories, those of the lowest priority, of ``max_shots`` shots.

    The pictures of ``settings.references`` come before each story's own reference images.
    """
    first = sorted(batch.stories, key=lambda story: story.priority)[: settings.max_stories]
    chosen = {story.story_id for story in first}
    stories = tuple(story for story in batch.stories if story.story_id in chosen)
    if settings.max_shots is not None:
        stories = tuple(first_shots(story, settings.max_shots) for story in stories)
    if given := tuple(Path(path).absolute() for path in settings.references):
        stories = tuple(replace(story, reference_images=(*given, *story.reference_images)) for story in stories)
    return replace(batch, stories=stories)


def first_shots(story: Story, max_shots: int) -> Story:
    """Return the story with its first ``max_shots`` shots; scenes that become empty are left out."""
    scenes = [
        Scene(scene_num=scene.scene_num, shots=tuple(shot for shot in scene.shots if shot.index < max_shots))
        for scene in story.scenes
    ]
    return replace(story, scenes=tuple(scene for scene in scenes if scene.shots))


def kinds_of(stories: Sequence[Story], settings: RenderConfig) -> list[str]:
    """Return the kinds of experts that the stories need, in the order in which a job loads them; never none.

    (A job of given clips alone loads none, but encoders and sizes are those of a kind.)
    """
    needed = {needs.kind for story in stories for needs in story_needs(story, settings.sampler, settings.memory)}
    return [kind for kind in KINDS if kind in needed] or [settings.sampler.first_shot]


def pixel_inputs(kind: str, settings: RenderConfig, weights: Weights) -> dict[str, Any]:
    """Return everything that changes the pixels or keyframes of a ``kind`` shot, except prompt, seed and mode."""
    sampler, memory = settings.sampler, settings.memory
    inputs = sampler_inputs(kind, sampler)
    memory_keys = SELECTION_KEYS + (_RECALL_KEYS if kind == M2V else ())
    inputs |= {f"memory.{key}": getattr(memory, key) for key in memory_keys}
    inputs |= {f"video.{key}": value for key, value in asdict(settings.video).items()}
    inputs["model.dtype"] = settings.model.dtype
    inputs["model.linears"] = settings.model.linears
    inputs["model.vae_precision"] = settings.model.vae_precision
    inputs["model.text_encoder_dtype"] = settings.model.text_encoder_dtype
    inputs["weights"] = weights.identity(kind)
    inputs["pixel_version"] = PIXEL_VERSION
    return inputs


def cost_model(settings: RenderConfig, weights: Weights) -> CostModel:
    """Return the cost model of shots with these settings and weights."""
    sampler, sizes = settings.sampler, weights.any_checkpoint.dit_config
    return CostModel(
        num_frames=sampler.num_frames,
        height=sampler.height,
        width=sampler.width,
        num_inference_steps=sampler.num_inference_steps,
        passes_per_step=sampler.passes_per_step,
        max_keyframes=settings.memory.max_keyframes,
        is_a14b=sizes in (WAN22_A14B.t2v, WAN22_A14B.i2v),
    )


def most_tokens(settings: RenderConfig, stories: Sequence[Story], weights: Weights) -> int:
    """Return the tokens of a forward of the longest shots of ``stories``, with as many keyframes as a shot may have."""
    max_keyframes = settings.memory.max_keyframes if M2V in weights.checkpoints else 0
    longest = replace(settings, sampler=longest_sampler(stories, settings.sampler))
    return int(cost_model(longest, weights).num_tokens(max_keyframes))


def config_hash(plain_config: Mapping[str, Any]) -> str:
    """Return 16 hex digits over the groups that say what is rendered, not where or how fast: model, sampler, memory,
    video.
    """
    kept = {key: value for key, value in plain_config.items() if key in ("model", "sampler", "memory", "video")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
