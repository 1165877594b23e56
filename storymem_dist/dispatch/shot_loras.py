"""LoRAs of single shots, before a job starts: whether their files fit the experts that render the shots.

Opens files and reads headers; reads no weights and knows nothing of devices.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.needs import story_needs
from storymem_dist.errors import CheckpointError, StoryboardError, StoryMemError
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.story.loading import RejectedStoryboard, StoryBatch
from storymem_dist.story.schema import Shot, Story
from storymem_dist.weights.bundle import Weights
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.lora import (
    LoraSettings,
    ScaledLora,
    adapter_bytes,
    lora_inputs,
    lora_key,
    lora_warnings,
    open_loras,
    shot_loras,
)

logger = logging.getLogger(__name__)

Loras = Sequence[Mapping[str, Any]]
"""LoRAs of a shot, as ``ShotOptions.loras`` has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraBytes:
    """Bytes of a shot's LoRAs as adapters: of one expert on a device, of both in a rank's host memory."""

    on_device: int = 0
    on_host: int = 0


class OpenedLoras:
    """Opens the LoRAs of shots for the experts of each kind, and remembers what was found. Reads no weights."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self._models: dict[str, nn.Module] = {}
        self._opened: dict[tuple[str, str], dict[str, list[ScaledLora]]] = {}

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds whose experts are known."""
        return list(self._weights.checkpoints)

    def merged(self, kind: str) -> Mapping[str, Sequence[ScaledLora]]:
        """The LoRAs that the experts of ``kind`` have in all shots, by expert."""
        return self._weights.loras[kind]

    def model(self, kind: str) -> nn.Module:
        """The transformer of ``kind`` without memory: names, shapes and dtypes."""
        if kind not in self._models:
            config = self._weights.checkpoints[kind].dit_config
            with torch.device("meta"):
                self._models[kind] = WanDiT(config, dtype=self._dtype)
        return self._models[kind]

    def open(self, kind: str, loras: Loras, key: str) -> Mapping[str, Sequence[ScaledLora]]:
        """The LoRAs of both experts, opened and checked against the experts of ``kind``.

        Raises ``WeightsNotFound``, ``CheckpointError`` and ``ConfigError``.
        """
        if (kind, key) not in self._opened:
            settings = shot_loras(loras)
            shapes = dit_shapes(self._weights.checkpoints[kind].dit_config)
            found = {expert: open_loras(settings, expert, shapes) for expert in EXPERTS}
            _require_use(settings, found)
            self._opened[kind, key] = found
            for expert, of_expert in found.items():
                for lora in of_expert:
                    logger.info("a shot's LoRA for %s %s: %s", kind, expert, lora.summary())
        return self._opened[kind, key]

    def most_bytes(self, *, compiled: bool = False) -> LoraBytes:
        """The most that the LoRAs of one of the shots take. ``compiled``: blocks are, so adapters are filled up."""
        device, host = [0], [0]
        for (kind, _), opened in self._opened.items():
            model = self.model(kind)
            device.append(max(adapter_bytes(opened[expert], model, compiled=compiled) for expert in EXPERTS))
            host.append(sum(adapter_bytes(opened[expert], model) for expert in EXPERTS))
        return LoraBytes(on_device=max(device), on_host=max(host))


def _require_use(settings: Sequence[LoraSettings], found: Mapping[str, Sequence[ScaledLora]]) -> None:
    if settings and not any(found.values()):
        raise CheckpointError(f"{settings[0].path}: none of the shot's LoRAs is for an expert")


def check_loras(batch: StoryBatch, sampler: SamplerSettings, memory: MemorySettings, opened: OpenedLoras) -> StoryBatch:
    """Return ``batch`` with warnings about LoRAs of shots, and without the stories whose LoRAs cannot be used.

    Shots of other kinds than those of ``opened`` are not looked at. Reads headers of files.
    """
    stories, rejected = [], list(batch.rejected)
    for story in batch.stories:
        if not any(shot.options.loras for shot in story.shots):
            stories.append(story)
            continue
        needs, warnings = story_needs(story, sampler, memory), dict[str, None]()
        try:
            for shot, need in zip(story.shots, needs, strict=True):
                if shot.options.loras and need.kind in opened.kinds:
                    warnings |= dict.fromkeys(_check_shot(story, shot, need.kind, opened))
        except StoryboardError as error:
            rejected.append(RejectedStoryboard(source=story.source or story.story_id, message=str(error)))
        else:
            stories.append(replace(story, warnings=(*story.warnings, *warnings)) if warnings else story)
    return replace(batch, stories=tuple(stories), rejected=tuple(rejected))


def _check_shot(story: Story, shot: Shot, kind: str, opened: OpenedLoras) -> list[str]:
    """Open the LoRAs of a shot; return warnings about them. Raises ``StoryboardError`` with the place of the shot."""
    loras = shot.options.loras or ()
    where = f"{story.source or story.story_id}, scene {shot.scene_num}, {shot.shot_id}"
    try:
        found = opened.open(kind, loras, lora_key(lora_inputs(loras)))
    except StoryMemError as error:
        raise StoryboardError(f"{where}: {error}") from None
    messages = [
        message
        for expert, of_expert in found.items()
        for lora in of_expert
        for message in lora_warnings(lora, expert, does="is added to", where="the shot's loras")
    ]
    return [f"{where}: {message}" for message in (*messages, *_repeated(found, opened.merged(kind)))]


def _repeated(shot: Mapping[str, Sequence[ScaledLora]], job: Mapping[str, Sequence[ScaledLora]]) -> list[str]:
    """Warnings about files that one expert gets more than once in a shot: their strengths add up."""
    messages: dict[str, None] = {}
    for expert, of_expert in shot.items():
        merged = {lora.file.path.resolve() for lora in job[expert]}
        seen: set[Path] = set()
        for lora in of_expert:
            path = lora.file.path.resolve()
            if path in seen:
                messages[f"{lora.name}: the shot's loras name it more than once; the strengths add up"] = None
            elif path in merged:
                messages[f"{lora.name}: model.loras has it for all shots too; the strengths add up"] = None
            seen.add(path)
    return list(messages)
