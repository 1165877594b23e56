"""Models by name or by folder: found and checked at once, loaded by the first render, kept until ``unload``."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.config.points import Point
from storymem_dist.config.schema import RenderConfig
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_loras import OpenedLoras
from storymem_dist.errors import StoryMemError, require_one_of
from storymem_dist.hardware import device_memory_bytes
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.precision import vae_dtype
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import WeightMemory, weight_memory
from storymem_dist.parallel.working_memory import RESERVE_BYTES, VAE_BYTES, decode_bytes, forward_bytes
from storymem_dist.pipeline.choosing import compose, joined, model_overrides, own_overrides
from storymem_dist.pipeline.host import RENDERING, as_guest, choose_guest_device
from storymem_dist.render.attention import decide_attention
from storymem_dist.render.build import Engine, LoadProgress
from storymem_dist.render.loras import adapter_memory
from storymem_dist.render.scoring import open_scorers, scorer_shelf
from storymem_dist.story.modes import M2V, MI2V, MM2V, T2V
from storymem_dist.weights.bundle import Weights, open_weights, with_generated_weights
from storymem_dist.weights.prompt_lengths import cut_text_of
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.text_encoder import text_encoder_bytes

_KEPT_TEXTS = 256
_ALIVE: "weakref.WeakSet[StoryModels]" = weakref.WeakSet()


@dataclass(kw_only=True)
class _Held:
    """An engine in memory, and what it was started for."""

    engine: Engine
    model: ModelSettings
    identities: dict[str, str]
    parallel: ParallelSettings
    adapters: WeightMemory
    scorer_bytes: int


class StoryModels:
    """Checked weights of both base models with the StoryMem LoRA of one continuation; loaded by the first render.

    Made by ``open_models``. ``settings`` are those that ``storymem-render`` would have with ``overrides``. A render
    loads what it needs and keeps it; ``unload`` frees it at once, and dropping the last reference when Python next
    collects its garbage.
    """

    def __init__(self, name: str, overrides: Sequence[str], device: torch.device, *, keeps_text_encoder: bool) -> None:
        self.name = name
        self.overrides = tuple(overrides)
        self.device = device
        self.point = compose(self.overrides)
        self.settings: RenderConfig = self.point.settings
        self._model = with_generated_weights(self.settings.model)
        self.weights: Weights = open_weights(self._model, _kinds(self._model), self.continuation)
        self._keeps_text_encoder = keeps_text_encoder
        self._held: _Held | None = None
        self._is_busy = False
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()
        self._cut_text = cut_text_of(self.weights.any_checkpoint)
        self._opened_scorers = open_scorers([self.settings.memory])
        self.scorers = scorer_shelf(device, self._opened_scorers)
        self.stopped: DenoiseState | None = None
        """Where the last shot was interrupted; the same shot continues there."""
        _ALIVE.add(self)

    @property
    def continuation(self) -> str:
        """The continuation whose StoryMem LoRA these models have: ``mi2v`` or ``mm2v``."""
        return self.settings.sampler.continuation

    @property
    def sampler(self) -> SamplerSettings:
        """What a shot has that says nothing else."""
        return self.settings.sampler

    @property
    def memory_settings(self) -> MemorySettings:
        """How keyframes are chosen, and the limits of a memory that ``storymem-render`` would have."""
        return self.settings.memory

    @property
    def is_loaded(self) -> bool:
        """Whether weights are in memory."""
        return self._held is not None

    def bytes_needed(self, mode: str | None = None) -> int:
        """Bytes of the device that loading and one shot of the settings' size take; 0 once loaded, and on a CPU.

        ``mode``: that of the shot, None for any. At most what the device has: experts that do not fit are streamed.
        """
        total = device_memory_bytes(self.device)
        if self.is_loaded or total is None:
            return 0
        config, sampler = self.weights.any_checkpoint.dit_config, self.sampler
        model = replace(self._model, experts="resident") if self._model.experts == "auto" else self._model
        experts = weight_memory(model, self.settings.parallel, config).on_device
        tokens = self._num_tokens(sampler, num_memory=0 if mode == T2V else self.memory_settings.max_keyframes)
        decoding = decode_bytes(sampler.height, sampler.width, vae_dtype(model.vae_precision))
        work = max(forward_bytes(config, tokens, linears=model.linears), decoding)
        texts = 0
        if self._model.text_encoder_device != "cpu":
            dtype = getattr(torch, self._model.text_encoder_dtype)
            texts = text_encoder_bytes(self.weights.any_checkpoint, dtype)
        return min(max(experts + VAE_BYTES + work, texts) + RESERVE_BYTES, total)

    def unload(self) -> None:
        """Free all memory; the next render loads again. Waits for a render of another thread.

        Raises ``StoryMemError`` when these models are rendering in this thread (in one of its callbacks).
        """
        with RENDERING:
            if self._is_busy:
                raise StoryMemError("the models are rendering; unload them when the render has ended")
            self._release()
            self._embeds.clear()
            self.scorers = scorer_shelf(self.device, self._opened_scorers)

    def describe(self) -> dict[str, str]:
        """Plain facts, for people."""
        model = self._model
        return {
            "model": self.name,
            **{key: str(value) for key in ("t2v_checkpoint", "i2v_checkpoint") if (value := getattr(model, key))},
            "storymem_lora": f"{model.storymem_lora} ({self.continuation})",
            "dtype": model.dtype,
            "linears": model.linears,
            "device": str(self.device),
            "loaded": "yes" if self.is_loaded else "no",
        }

    # -- for the renders of this package -------------------------------------------------------------------------------

    @contextmanager
    def rendering(self) -> Iterator[None]:
        """Be a guest in this process, with these models, while the body renders."""
        precision, threads = self._model.vae_precision, self.settings.parallel.cpu_threads
        with as_guest(self.device, cpu_threads=threads, vae_precision=precision):
            if self._is_busy:
                raise StoryMemError("the models are rendering; a callback cannot start another render")
            self._is_busy = True
            try:
                yield
            except Exception as error:
                if not isinstance(error, StoryMemError):
                    self._release()  # whatever state the error leaves behind is not used again
                raise
            finally:
                self._is_busy = False
                if self._held is not None:
                    self._held.engine.serve(self.opened_loras())  # forget whom the last render reported to

    def engine_for(self, sampler: SamplerSettings, loras: OpenedLoras, progress: LoadProgress | None) -> Engine:
        """The engine for a shot, while ``rendering``. Raises as ``Engine.start``."""
        parallel, config = self.settings.parallel, self.weights.any_checkpoint.dit_config
        session = start_session(parallel, num_heads=config.num_heads, device=self.device)
        num_tokens = self._num_tokens(sampler, self.memory_settings.max_keyframes if M2V in self.weights.loras else 0)
        model, _ = decide_attention(self._model, session, config, num_tokens=num_tokens)
        return self.start_engine(
            model,
            self.weights,
            parallel,
            sampler,
            session=session,
            progress=progress,
            loras=loras,
            num_tokens=num_tokens,
            scorer_bytes=sum(files.num_bytes() for files in self._opened_scorers.values()),
        )

    def start_engine(
        self,
        model: ModelSettings,
        weights: Weights,
        parallel: ParallelSettings,
        sampler: SamplerSettings,
        *,
        loras: OpenedLoras,
        scorer_bytes: int = 0,
        **others: Any,
    ) -> Engine:
        """``Engine.start`` that returns the loaded engine where it serves; the others are freed first."""
        identities = {kind: weights.identity(kind) for kind in weights.checkpoints}
        adapters = adapter_memory(loras, compiled=parallel.may_compile)
        held = self._held
        if held is not None and _serves(held, model, identities, parallel, adapters, scorer_bytes):
            held.engine.serve(loras, progress=others.get("progress"), on_read=others.get("on_read"))
            return held.engine
        self._release()
        own = {kind: self.weights.identity(kind) for kind in self.weights.checkpoints}
        if all(own.get(kind) == identity for kind, identity in identities.items()):
            weights, identities = self.weights, own  # so that later renders of the other kind find it
        engine = Engine.start(model, weights, parallel, sampler, loras=loras, scorer_bytes=scorer_bytes, **others)
        self._held = _Held(
            engine=engine,
            model=engine.model,
            identities=identities,
            parallel=parallel,
            adapters=adapters,
            scorer_bytes=scorer_bytes,
        )
        return engine

    def with_loaded_experts(self, point: Point) -> Point:
        """``point`` with the experts where they lie now, so that a job does not decide it by what they leave free."""
        held = self._held
        if held is None or point.settings.model.experts != "auto":
            return point
        model = replace(point.settings.model, experts=held.model.experts)
        return replace(point, settings=replace(point.settings, model=model))

    def embeds(self, engine: Engine, text: str) -> Tensor:
        """The embedding of a text; the last few hundred are kept."""
        if text not in self._embeds:
            self._embeds |= engine.encode_texts([text], keep_encoder=self._keeps_text_encoder)
            while len(self._embeds) > _KEPT_TEXTS:
                self._embeds.popitem(last=False)
        self._embeds.move_to_end(text)
        return self._embeds[text]

    def warnings_of(self, text: str) -> list[str]:
        """A sentence if the text encoder cuts ``text``."""
        problem = self._cut_text(text)
        return [] if problem is None else [f"the prompt {text[:40]!r}... has {problem}"]

    def opened_loras(self) -> OpenedLoras:
        """The opener of LoRAs of single shots."""
        return OpenedLoras(self.weights, getattr(torch, self._model.dtype))

    def _num_tokens(self, sampler: SamplerSettings, num_memory: int) -> int:
        return LatentGrid(
            num_frames=sampler.num_frames, height=sampler.height, width=sampler.width, num_memory=num_memory
        ).num_tokens

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.engine.close()
            del held
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def open_models(
    t2v_model: str | Path | None,
    i2v_model: str | Path | None = None,
    storymem_lora: str | Path | None = None,
    *,
    continuation: str = MI2V,
    device: "str | torch.device" = "auto",
    offload: bool = True,
    overrides: Sequence[str] = (),
) -> StoryModels:
    """Find and check models; load nothing.

    Args:
        t2v_model: one of ``model_names()``, or the folder of Wan2.2-T2V-A14B; None: no shot is made from text alone.
        i2v_model: the folder of Wan2.2-I2V-A14B; None: all shots are made from text alone. A name: the same one.
        storymem_lora: the folder of the StoryMem LoRAs; a model with a name has its own.
        continuation: ``mi2v`` or ``mm2v``: the LoRA, and how shots continue each other.
        device: ``auto``, ``cpu``, ``cuda`` or a ``torch.device``.
        offload: False keeps all experts and the text encoder in memory.
        overrides: settings as on the command line of ``storymem-render``, such as ``sampler.num_frames=17``.

    Raises:
        ConfigError: a value is not allowed, or the models do not go together.
        WeightsNotFound: a folder or a file is missing; the message has the command that downloads it.
        CheckpointError: a folder holds another model, or damaged files.
    """
    require_one_of("continuation", continuation, (MI2V, MM2V))
    name, chosen = model_overrides(t2v_model, i2v_model, storymem_lora)
    where = choose_guest_device(device)
    if not offload:
        chosen.append("model.experts=resident")
    continued = f"sampler.continuation={continuation}"
    ours = [continued, "parallel=single", "parallel.compile=false", "tracking=none"]
    given = joined(chosen, ours, own_overrides(overrides))
    return StoryModels(name, given, where, keeps_text_encoder=not offload)


def check_models(
    t2v_model: str | Path | None,
    i2v_model: str | Path | None = None,
    storymem_lora: str | Path | None = None,
    *,
    continuation: str = MI2V,
    overrides: Sequence[str] = (),
) -> None:
    """Raise what ``open_models`` would raise. Reads headers only and keeps nothing."""
    open_models(t2v_model, i2v_model, storymem_lora, continuation=continuation, device="cpu", overrides=overrides)


def loaded_models() -> list[StoryModels]:
    """All models of this process that hold weights."""
    return [models for models in list(_ALIVE) if models.is_loaded]


def unload_all() -> None:
    """Free the memory of all models of this process. Waits for a render of another thread."""
    for models in loaded_models():
        models.unload()


def _serves(
    held: _Held,
    model: ModelSettings,
    identities: dict[str, str],
    parallel: ParallelSettings,
    adapters: WeightMemory,
    scorer_bytes: int,
) -> bool:
    if model.experts in ("auto", held.model.experts):
        model = replace(model, experts=held.model.experts)
    has_room = (
        held.adapters.on_device >= adapters.on_device
        and held.adapters.on_host >= adapters.on_host
        and held.scorer_bytes >= scorer_bytes
    )
    is_same = model == held.model and parallel == held.parallel
    return is_same and has_room and all(held.identities.get(kind) == one for kind, one in identities.items())


def _kinds(model: ModelSettings) -> list[str]:
    """The kinds of shots that these models can render."""
    has = {T2V: model.t2v_checkpoint or model.t2v_high_noise, M2V: model.i2v_checkpoint or model.i2v_high_noise}
    return [kind for kind, path in has.items() if path]
