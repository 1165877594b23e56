"""Settings into objects: the one place that knows every class.

Decides once who does what (device, layout, residency); the code it wires together has no such tests. Nothing here
computes a pixel.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.diffusion.experts import EXPERTS, HIGH_NOISE, LOW_NOISE, ExpertPair
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError, WeightsNotFound
from storymem_dist.models.attention import start_backend
from storymem_dist.models.loading import LoadReport
from storymem_dist.models.precision import set_fp32_precision
from storymem_dist.models.quantized_linear import check_linears
from storymem_dist.models.settings import ModelSettings
from storymem_dist.models.wan.checkpoints import WanCheckpoint, download_command, open_checkpoint
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.lora import STORYMEM_REPO, ScaledLora, open_loras, storymem_lora
from storymem_dist.models.wan.text_encoder import TextEncoder, load_text_encoder
from storymem_dist.models.wan.tiny_checkpoint import generate_tiny_checkpoint
from storymem_dist.models.wan.vae import load_vae
from storymem_dist.observe.events import ThroughputSampled
from storymem_dist.observe.system import current_device, device_memory
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.loading import build_expert, place_experts
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae
from storymem_dist.render_clip import ClipSampler
from storymem_dist.weight_memory import check_weight_memory, decide_experts, host_has_room

LoadProgress = Callable[[str, int, int], None]
"""Called while weights load: what, bytes done, bytes in all."""

BytesRead = Callable[[int], None]
"""Called on all ranks after a load with the bytes that the ranks of the replica have read for it together."""


def cache_folder() -> Path:
    """The user's cache for this project: ``$STORYMEM_CACHE``, else ``storymem_dist`` under the usual cache folder."""
    if chosen := os.environ.get("STORYMEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "storymem_dist"


def with_generated_weights(settings: ModelSettings) -> ModelSettings:
    """Settings whose paths point at weights: a generated checkpoint is written to the user's cache on first use."""
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
        """Where text encoder and VAE are taken from: both base models hold the same."""
        return next(iter(self.checkpoints.values()))

    def identity(self, kind: str) -> str:
        """Changes when any weight that ``kind`` renders with changes."""
        parts = [self.checkpoints[kind].identity]
        parts += [f"{name}:{lora.identity}" for name in EXPERTS for lora in self.loras[kind][name]]
        return " ".join(parts)


def open_weights(settings: ModelSettings, kinds: Sequence[str], continuation: str) -> Weights:
    """Find and check all weights that rendering ``kinds`` needs; reads headers only.

    A prepared folder has its LoRAs merged; it is checked to be prepared for this job, and no LoRA is opened for it.

    Raises:
        WeightsNotFound: a path is not given, or what it names is incomplete; the message has the command.
        CheckpointError: files are damaged or of another model.
    """
    checkpoints: dict[str, WanCheckpoint] = {}
    loras: dict[str, dict[str, Sequence[ScaledLora]]] = {}
    for kind in kinds:
        base = "t2v" if kind == "t2v" else "i2v"
        path = getattr(settings, f"{base}_checkpoint")
        if not path:
            suggestion = download_command(Path(f"weights/Wan2.2-{base.upper()}-A14B"), base)
            raise WeightsNotFound(f"model.{base}_checkpoint is not set; point it at a folder made by: {suggestion}")
        checkpoint = open_checkpoint(path, base)
        checkpoints[kind] = checkpoint
        further = {name: open_loras(settings.loras, name) for name in EXPERTS}
        if checkpoint.prepared is not None:
            checkpoint.prepared.check_request(checkpoint.root, None if kind == "t2v" else continuation, further)
            loras[kind] = {name: [] for name in EXPERTS}
            continue
        storymem = {name: [] for name in EXPERTS} if kind == "t2v" else _storymem_loras(settings, continuation)
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


class ExpertLoader:
    """Loads the two experts of a kind onto this session's ranks; the callable that a ``ClipSampler`` is given."""

    def __init__(
        self,
        model: ModelSettings,
        weights: Weights,
        parallel: ParallelSettings,
        sampler: SamplerSettings,
        session: Session,
        progress: LoadProgress | None = None,
        on_read: BytesRead | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._parallel = parallel
        self._sampler = sampler
        self._session = session
        self._progress = progress
        self._on_read = on_read
        self._reads_together = False
        self.num_loads: dict[str, int] = {}

    def __call__(self, kind: str) -> ExpertPair:
        """The experts of ``kind`` ("t2v" or "m2v"), ready to run. Collective over the replica."""
        num_bytes = 0

        def build() -> Iterator[tuple[str, WanDiT]]:
            nonlocal num_bytes
            for name in EXPERTS:
                expert, report = self._build(kind, name)
                num_bytes += report.bytes_read
                yield name, expert

        modules, residency = place_experts(
            build(),
            device=self._session.device,
            weights=self._parallel.weights,
            swap=self._model.experts == "swap",
            may_swap=host_has_room(
                self._model,
                self._parallel,
                self._weights.checkpoints[kind].dit_config,
                ranks_per_node=self._session.layout.ranks_per_node,
            ),
        )
        self._tell_read(num_bytes)
        self.num_loads[kind] = self.num_loads.get(kind, 0) + 1
        return ExpertPair(
            high_noise=modules[HIGH_NOISE],
            low_noise=modules[LOW_NOISE],
            boundary_ratio=self._sampler.boundary_ratio(kind),
            guidance_scale_high=self._sampler.guidance_scale_high,
            guidance_scale_low=self._sampler.guidance_scale_low,
            residency=residency,
        )

    def _build(self, kind: str, name: str) -> tuple[WanDiT, LoadReport]:
        checkpoint = self._weights.checkpoints[kind]
        return build_expert(
            checkpoint.dit_config,
            checkpoint.expert(name),
            self._weights.loras[kind][name],
            session=self._session,
            settings=self._parallel,
            dtype=getattr(torch, self._model.dtype),
            attention=self._model.attention,
            linears=self._model.linears,
            cache_text_keys=self._model.cache_text_keys,
            share_reads=None if self._reads_together else False,
            progress=self._named_progress(f"{kind} {name}"),
        )

    @contextmanager
    def reading_together(self) -> Iterator[None]:
        """While the body runs, all replicas of a node load the same experts, and one rank may read them for all."""
        self._reads_together = True
        try:
            yield
        finally:
            self._reads_together = False

    def _tell_read(self, num_bytes: int) -> None:
        if self._on_read is not None:
            mine = torch.tensor([num_bytes], device=self._session.device)
            self._on_read(int(self._session.mesh.shard.sum(mine)))

    def _named_progress(self, what: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done, total: progress(what, done, total)


@dataclass(kw_only=True)
class Engine:
    """One rank's means to render clips: its session, and a sampler whose experts load on first use."""

    session: Session
    clips: ClipSampler
    experts: ExpertLoader
    _model: ModelSettings
    _weights: Weights
    _text_encoder: TextEncoder | None = field(default=None)

    @classmethod
    def start(
        cls,
        model: ModelSettings,
        weights: Weights,
        parallel: ParallelSettings,
        sampler: SamplerSettings,
        *,
        session: Session | None = None,
        progress: LoadProgress | None = None,
        on_read: BytesRead | None = None,
    ) -> "Engine":
        """Start the ranks (unless ``session`` is given) and load the VAE. Collective over all started ranks.

        Raises, before weights are read, ``LayoutError`` when layout, ranks and guidance do not go together, and
        ``ConfigError`` when the experts do not fit, or the attention kernel or the linear layers cannot be used.
        """
        check_guidance(
            parallel, guidance_scale_high=sampler.guidance_scale_high, guidance_scale_low=sampler.guidance_scale_low
        )
        session = session or start_session(parallel, num_heads=weights.any_checkpoint.dit_config.num_heads)
        model = decide_experts(model, parallel, weights.any_checkpoint.dit_config, session.device)
        session.all_or_none(partial(_check_start, model, weights, parallel, session))
        set_fp32_precision(convolutions=model.vae_precision)
        vae = load_vae(weights.any_checkpoint.vae_path, session.device)
        if session.mesh.shard.size > 1:
            assert session.mesh.shard.group is not None
            parallelize_vae(vae, session.mesh.shard.group, session.mesh.clock)
        experts = ExpertLoader(model, weights, parallel, sampler, session, progress, on_read)
        clips = ClipSampler(load_experts=experts, guidance=make_guidance(session.mesh), vae=vae, device=session.device)
        return cls(session=session, clips=clips, experts=experts, _model=model, _weights=weights)

    def measure(self) -> ThroughputSampled:
        """What this process knows of itself: memory now, and time in collectives since it was last asked."""
        clock, memory = self.session.mesh.clock, device_memory(current_device())
        return ThroughputSampled(
            collective_seconds=None if clock is None else clock.take(),
            gpu_memory_gib=memory.held_gib,
            peak_gpu_memory_gib=memory.peak_gib,
        )

    @property
    def text_dtype(self) -> torch.dtype:
        """The number format of the text encoder."""
        return getattr(torch, self._model.text_encoder_dtype)  # type: ignore[no-any-return]

    def load_text_encoder(self) -> TextEncoder:
        """Load the text encoder onto the device that the settings name."""
        choice = self._model.text_encoder_device
        device = self.session.device if choice == "auto" else torch.device(choice)
        return load_text_encoder(self._weights.any_checkpoint, device, self.text_dtype)

    def encode_texts(self, texts: Sequence[str], *, keep_encoder: bool = False) -> dict[str, Tensor]:
        """Embeddings ``[L <= 512, text_dim]`` on the CPU, by text; every rank encodes all of them."""
        encoder = self._text_encoder or self.load_text_encoder()
        self._text_encoder = encoder if keep_encoder else None
        return {text: embed.cpu() for text, embed in zip(texts, encoder.encode(texts), strict=True)}

    def close(self) -> None:
        """Drop all weights and end the session."""
        self.clips.release()
        self._text_encoder = None
        self.session.close()


def _check_start(model: ModelSettings, weights: Weights, parallel: ParallelSettings, session: Session) -> None:
    """Raise ``ConfigError`` unless the experts fit this rank, and the kernels that the settings name work on it."""
    config, device = weights.any_checkpoint.dit_config, session.device
    check_weight_memory(model, parallel, config, device=device, ranks_per_node=session.layout.ranks_per_node)
    start_backend(model.attention, device=device, dtype=getattr(torch, model.dtype), head_dim=config.head_dim)
    check_linears(model.linears, device)
