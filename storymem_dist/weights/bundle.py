"""Finds and checks all weights that a job needs. Loads nothing; knows nothing about devices or ranks."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storymem_dist.errors import ConfigError, MachineError, WeightsNotFound
from storymem_dist.files import expand_home
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.resources import packed_weights
from storymem_dist.story.modes import T2V
from storymem_dist.weights.checkpoints import (
    BASE_OF_KIND,
    ModelFolders,
    WanCheckpoint,
    dit_shapes,
    download_command,
    open_checkpoint,
)
from storymem_dist.weights.lora import (
    STORYMEM_REPO,
    ScaledLora,
    lora_facts,
    lora_warnings,
    open_loras,
    storymem_lora,
)
from storymem_dist.weights.packed import unpack_once
from storymem_dist.weights.parts import PARTS
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.single_files import CheckpointFiles
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The user's cache for this project: ``$STORYMEM_CACHE``, else ``storymem_dist`` under the usual cache folder.

    Raises ``ConfigError`` when there is no home folder to find it in.
    """
    if chosen := os.environ.get("STORYMEM_CACHE"):
        return Path(expand_home(chosen, "STORYMEM_CACHE"))
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    if usual.startswith("~"):
        raise ConfigError("there is no home folder for small models; set STORYMEM_CACHE to a folder for them")
    return Path(usual) / "storymem_dist"


@contextmanager
def _writing_cache() -> Iterator[Path]:
    """Yield the cache folder. Raises ``MachineError`` when the body cannot write it."""
    folder = cache_folder()
    try:
        yield folder
    except OSError as error:
        raise MachineError(
            f"small models are written to {folder}, and that fails: {error}; free space there and make it writable, or "
            "set STORYMEM_CACHE to another folder"
        ) from error


def packed_model(name: str) -> ModelFolders:
    """The folders of a packed model: ``name`` is one that comes with the package (``nano``), or a file.

    They are written to the cache on first use. Raises ``WeightsNotFound`` and ``CheckpointError`` as ``unpack_once``,
    ``MachineError`` when the cache cannot be written, and ``ConfigError`` when there is no folder for it.
    """
    own = packed_weights(f"{name}.safetensors")
    with _writing_cache() as cache:
        return unpack_once(own if own.is_file() else Path(name), None, cache)


def with_generated_weights(settings: ModelSettings) -> ModelSettings:
    """``settings`` with the paths of the checkpoint that ``packed`` or ``generate`` names; written on first use.

    Raises:
        ConfigError: ``generate`` is a name other than ``tiny``, or there is no folder for the cache.
        MachineError: the cache cannot be written.
        WeightsNotFound: there is no file ``packed``.
        CheckpointError: ``packed`` is damaged or another file.
    """
    if settings.packed is not None:
        with _writing_cache() as cache:
            folders = unpack_once(Path(settings.packed), settings.packed_sha256, cache)
    elif settings.generate is None:
        return settings
    elif settings.generate != "tiny":
        raise ConfigError(f"model.generate={settings.generate!r} is not allowed; use tiny or null")
    else:
        seed = settings.generate_seed
        with _writing_cache() as cache:
            folders = generate_tiny_checkpoint(cache / f"tiny-seed{seed}", seed)
    return replace(
        settings,
        packed=None,
        generate=None,
        t2v_checkpoint=str(folders.t2v_dir),
        i2v_checkpoint=str(folders.i2v_dir),
        storymem_lora=settings.storymem_lora or str(folders.lora_dir),
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

    def lora_facts(self) -> dict[str, Any]:
        """What is merged, for records: kind, expert, and what was found in each LoRA (``ScaledLora.describe``)."""
        facts: dict[str, Any] = {}
        for kind, checkpoint in self.checkpoints.items():
            merged = checkpoint.prepared.loras if checkpoint.prepared else lora_facts(self.loras[kind])
            facts |= {kind: merged} if any(merged.values()) else {}
        return facts

    def lora_warnings(self) -> list[str]:
        """A message for each LoRA of which keys are left out, and for each whose name speaks of another expert."""
        messages: dict[str, None] = {}
        for by_expert in self.loras.values():
            for expert, loras in by_expert.items():
                for lora in loras:
                    messages |= dict.fromkeys(lora_warnings(lora, expert))
        return list(messages)

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
        path, files = getattr(settings, f"{base}_checkpoint"), _given_files(settings, base)
        if not path and files.experts(base) is None:
            suggestion = download_command(Path(f"weights/Wan2.2-{base.upper()}-A14B"), base)
            raise WeightsNotFound(f"model.{base}_checkpoint is not set; point it at a folder made by: {suggestion}")
        checkpoint = open_checkpoint(path, base, files)
        checkpoints[kind] = checkpoint
        shapes = None if checkpoint.prepared else dit_shapes(checkpoint.dit_config)
        further = {name: open_loras(settings.loras, name, shapes) for name in EXPERTS}
        if checkpoint.prepared is not None:
            mode = None if kind == T2V else continuation
            checkpoint.prepared.check_request(checkpoint.root, mode, further, _given_storymem_lora(settings, mode))
            loras[kind] = {name: [] for name in EXPERTS}
            continue
        storymem = {name: [] for name in EXPERTS} if kind == T2V else _storymem_loras(settings, continuation)
        for name in EXPERTS:
            checkpoint.check_loras([*storymem[name], *further[name]])
        loras[kind] = {name: [*storymem[name], *further[name]] for name in EXPERTS}
        for name in EXPERTS:
            for lora in loras[kind][name]:
                logger.info("%s %s: %s", kind, name, lora.summary())
    return Weights(checkpoints=checkpoints, loras=loras)


def _given_files(settings: ModelSettings, base: str) -> CheckpointFiles:
    """The paths of single files that the settings name."""
    names = {expert: f"{base}_{expert}" for expert in EXPERTS} | {part: part for part in PARTS}
    given = {name: getattr(settings, setting) for name, setting in names.items()}
    return CheckpointFiles(**{name: Path(path) for name, path in given.items() if path})


def _given_storymem_lora(settings: ModelSettings, continuation: str | None) -> dict[str, ScaledLora] | None:
    """The StoryMem LoRA that a job names although its weights are prepared; None if it names none that is there."""
    if continuation is None or not settings.storymem_lora:
        return None
    try:
        return storymem_lora(settings.storymem_lora, continuation, scale_rule=settings.storymem_scale_rule)
    except WeightsNotFound:
        return None


def _storymem_loras(settings: ModelSettings, continuation: str) -> dict[str, list[ScaledLora]]:
    if not settings.storymem_lora:
        raise WeightsNotFound(
            "model.storymem_lora is not set; point it at a folder made by: "
            f"hf download {STORYMEM_REPO} --local-dir weights/StoryMem"
        )
    loras = storymem_lora(settings.storymem_lora, continuation, scale_rule=settings.storymem_scale_rule)
    return {name: [lora] for name, lora in loras.items()}
