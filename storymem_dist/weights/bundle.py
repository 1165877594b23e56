"""Finds and checks all weights that a job needs. Loads nothing; knows nothing about devices or ranks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from storymem_dist.errors import ConfigError, WeightsNotFound
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.story.modes import T2V
from storymem_dist.weights.checkpoints import BASE_OF_KIND, WanCheckpoint, download_command, open_checkpoint
from storymem_dist.weights.lora import STORYMEM_REPO, ScaledLora, open_loras, storymem_lora
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint


def cache_folder() -> Path:
    """The user's cache for this project: ``$STORYMEM_CACHE``, else ``storymem_dist`` under the usual cache folder."""
    if chosen := os.environ.get("STORYMEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "storymem_dist"


def with_generated_weights(settings: ModelSettings) -> ModelSettings:
    """``settings`` with the paths of the checkpoint that ``generate`` names, written to the cache on first use.

    Raises ``ConfigError`` for a name other than ``tiny``.
    """
    if settings.generate is None:
        return settings
    if settings.generate != "tiny":
        raise ConfigError(f"model.generate={settings.generate!r} is not allowed; use tiny or null")
    folder = cache_folder() / f"tiny-seed{settings.generate_seed}"
    tiny = generate_tiny_checkpoint(folder, settings.generate_seed)
    return replace(
        settings,
        generate=None,
        t2v_checkpoint=str(tiny.t2v_dir),
        i2v_checkpoint=str(tiny.i2v_dir),
        storymem_lora=str(tiny.lora_dir),
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Checked weights of the kinds a job needs ("t2v", "m2v"), with the LoRAs of both experts of each; nothing loaded.

    The M2V experts are the I2V base model with the StoryMem LoRA of the chosen continuation.
    """

    checkpoints: dict[str, WanCheckpoint]
    loras: dict[str, dict[str, Sequence[ScaledLora]]]

    @property
    def any_checkpoint(self) -> WanCheckpoint:
        """One of the checkpoints: both base models hold the same text encoder and VAE."""
        return next(iter(self.checkpoints.values()))

    def identity(self, kind: str) -> str:
        """A text that changes when any weight for rendering ``kind`` changes."""
        parts = [self.checkpoints[kind].identity]
        parts += [f"{name}:{lora.identity}" for name in EXPERTS for lora in self.loras[kind][name]]
        return " ".join(parts)


def open_weights(settings: ModelSettings, kinds: Sequence[str], continuation: str) -> Weights:
    """Find and check all weights that rendering ``kinds`` needs; reads headers only.

    A prepared folder has its LoRAs merged already; this checks that they are those of the job.

    Raises:
        WeightsNotFound: a path is not set, missing or incomplete; the message names the command that fetches it.
        CheckpointError: files are damaged or of another model.
    """
    checkpoints: dict[str, WanCheckpoint] = {}
    loras: dict[str, dict[str, Sequence[ScaledLora]]] = {}
    for kind in kinds:
        base = BASE_OF_KIND[kind]
        path = getattr(settings, f"{base}_checkpoint")
        if not path:
            suggestion = download_command(Path(f"weights/Wan2.2-{base.upper()}-A14B"), base)
            raise WeightsNotFound(f"model.{base}_checkpoint is not set; point it at a folder made by: {suggestion}")
        checkpoint = open_checkpoint(path, base)
        checkpoints[kind] = checkpoint
        further = {name: open_loras(settings.loras, name) for name in EXPERTS}
        if checkpoint.prepared is not None:
            checkpoint.prepared.check_request(checkpoint.root, None if kind == T2V else continuation, further)
            loras[kind] = {name: [] for name in EXPERTS}
            continue
        storymem = {name: [] for name in EXPERTS} if kind == T2V else _storymem_loras(settings, continuation)
        for name in EXPERTS:
            checkpoint.check_loras([*storymem[name], *further[name]])
        loras[kind] = {name: [*storymem[name], *further[name]] for name in EXPERTS}
    return Weights(checkpoints=checkpoints, loras=loras)


def _storymem_loras(settings: ModelSettings, continuation: str) -> dict[str, list[ScaledLora]]:
    if not settings.storymem_lora:
        raise WeightsNotFound(
            "model.storymem_lora is not set; point it at a folder made by: "
            f"hf download {STORYMEM_REPO} --local-dir weights/StoryMem"
        )
    return {name: [lora] for name, lora in storymem_lora(settings.storymem_lora, continuation).items()}
