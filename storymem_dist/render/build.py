"""Turns settings into objects: the one module that knows every class.

Decides device, layout and residency once, so that the code it connects has no such conditions. Computes no pixel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_loras import OpenedLoras
from storymem_dist.events import ThroughputSampled
from storymem_dist.hardware import GIB, current_device, device_memory
from storymem_dist.models.attention import start_backend
from storymem_dist.models.precision import set_fp32_precision, vae_dtype
from storymem_dist.models.quantized_linear import check_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE
from storymem_dist.models.wan.text_encoder import TextEncoder
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.loading import build_expert, place_experts
from storymem_dist.parallel.merging import replicas_per_node
from storymem_dist.parallel.mesh import ReplicaMesh
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import SpatialParallelVae, parallelize_vae
from storymem_dist.parallel.weight_memory import (
    ON_CPU,
    ON_DEVICE,
    WeightMemory,
    check_weight_memory,
    decide_experts,
    host_has_room,
    place_scorer,
)
from storymem_dist.render.clip import ClipSampler
from storymem_dist.render.loras import LoraShelf, adapter_memory
from storymem_dist.weights.bundle import Weights
from storymem_dist.weights.loading import LoadReport
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.text_encoder import load_text_encoder, text_encoder_bytes
from storymem_dist.weights.vae import load_vae

LoadProgress = Callable[[str, int, int], None]
"""Called while weights load: name, bytes done, bytes in total."""

BytesRead = Callable[[int], None]
"""Called on all ranks after a load with the bytes that the ranks of the replica read for it in total."""


class ExpertLoader:
    """Loads the two experts of a kind onto this session's ranks: the ``load_experts`` of a ``ClipSampler``.

    ``num_loads`` counts the loads by kind.
    """

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

    def report_to(self, progress: LoadProgress | None, on_read: BytesRead | None) -> None:
        """Report later loads to these."""
        self._progress, self._on_read = progress, on_read

    def __call__(self, kind: str) -> ExpertPair:
        """Return the experts of ``kind`` ("t2v" or "m2v"), ready to run. Collective over the replica."""
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
            stream=self._model.experts == "stream",
            num_ahead=self._parallel.prefetch_blocks,
            may_swap=host_has_room(
                self._model,
                self._parallel,
                self._weights.checkpoints[kind].dit_config,
                ranks_per_node=self._session.layout.ranks_per_node,
            ),
        )
        self._report_read(num_bytes)
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
            stream=self._model.experts == "stream",
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

    def _report_read(self, num_bytes: int) -> None:
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
    """What one rank needs to render clips: its session, and a sampler that loads experts on first use."""

    session: Session
    clips: ClipSampler
    experts: ExpertLoader
    loras: LoraShelf
    vae: WanVae
    scorer_place: str = ON_CPU
    _model: ModelSettings
    _weights: Weights
    _text_encoder: TextEncoder | None = field(default=None)
    _vae_split: SpatialParallelVae | None = field(default=None)

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
        loras: OpenedLoras | None = None,
        num_tokens: int = 0,
        scorer_bytes: int = 0,
    ) -> "Engine":
        """Start the ranks (unless ``session`` is given) and load the VAE. Collective over all started ranks.

        ``loras`` has opened those of the shots that will be rendered, which the experts must leave room for, and
        ``num_tokens`` are those of a forward of the longest shot, where it is known. ``scorer_bytes`` are the weights
        of a scorer of keyframes that the leader will load; ``scorer_place`` then says where to.

        Raises, before weights are read, ``LayoutError`` when layout, ranks and guidance do not fit together, and
        ``ConfigError`` when the experts do not fit, or the attention kernel or the linear layers cannot be used.
        """
        check_guidance(parallel, sampler)
        session = session or start_session(parallel, num_heads=weights.any_checkpoint.dit_config.num_heads)
        loras = loras or OpenedLoras(weights, getattr(torch, model.dtype))
        adapters = adapter_memory(loras, compiled=parallel.may_compile)
        model = decide_experts(
            model,
            parallel,
            weights.any_checkpoint.dit_config,
            session.device,
            adapters=adapters,
            num_tokens=num_tokens,
            scorer_bytes=scorer_bytes,
        )
        place = place_scorer(
            scorer_bytes,
            model,
            parallel,
            weights.any_checkpoint.dit_config,
            session.device,
            adapters=adapters,
            num_tokens=num_tokens,
        )
        on_host = 0 if place == ON_DEVICE else scorer_bytes * max(1, replicas_per_node(session.layout))
        session.all_or_none(partial(_check_start, model, weights, parallel, session, adapters, on_host))
        set_fp32_precision(convolutions=model.vae_precision)
        vae = load_vae(weights.any_checkpoint.vae_path, session.device, vae_dtype(model.vae_precision))
        shelf = LoraShelf(loras, session.all_or_none, ranks_per_node=session.layout.ranks_per_node)
        experts = ExpertLoader(model, weights, parallel, sampler, session, progress, on_read)
        clips = ClipSampler(
            load_experts=experts,
            guidance=make_guidance(session.mesh),
            vae=vae,
            device=session.device,
            is_alone=session.mesh.shard.size == 1,
            read_loras=shelf,
        )
        engine = cls(
            session=session,
            clips=clips,
            experts=experts,
            loras=shelf,
            vae=vae,
            scorer_place=place,
            _model=model,
            _weights=weights,
        )
        engine._spread_vae(session.mesh)
        return engine

    def serve(
        self, loras: OpenedLoras, *, progress: LoadProgress | None = None, on_read: BytesRead | None = None
    ) -> None:
        """Take part in another job with the same settings: with its LoRAs of shots, and its reports of loads."""
        self.experts.report_to(progress, on_read)
        self.loras.open_with(loras)

    @property
    def model(self) -> ModelSettings:
        """The settings, with everything decided that they left open."""
        return self._model

    @contextmanager
    def vae_over(self, mesh: ReplicaMesh) -> Iterator[None]:
        """Let the VAE work over the ranks of ``mesh`` while the body runs, not over those of this replica."""
        self._spread_vae(mesh)
        try:
            yield
        finally:
            self._spread_vae(self.session.mesh)

    def _spread_vae(self, mesh: ReplicaMesh) -> None:
        if self._vae_split is not None:
            self._vae_split.remove()
        self._vae_split = None
        if mesh.shard.group is not None:
            self._vae_split = parallelize_vae(self.vae, mesh.shard.group, mesh.clock)

    def measure(self) -> ThroughputSampled:
        """Return this process's device memory (GiB) now and its seconds in collectives since the last call."""
        clock, memory = self.session.mesh.clock, device_memory(current_device())
        return ThroughputSampled(
            collective_seconds=None if clock is None else clock.take(),
            gpu_memory_gib=memory.held_gib,
            peak_gpu_memory_gib=memory.peak_gib,
        )

    @property
    def text_dtype(self) -> torch.dtype:
        """The dtype of the text encoder."""
        return getattr(torch, self._model.text_encoder_dtype)

    def load_text_encoder(self) -> TextEncoder:
        """Load the text encoder onto the device that the settings name; a rank alone makes room for it there."""
        if self.session.team.size == 1:
            self.make_room_for_text_encoder()
        return load_text_encoder(self._weights.any_checkpoint, self._text_device, self.text_dtype)

    def make_room_for_text_encoder(self) -> None:
        """Drop the experts if the text encoder does not fit next to them. Collective over the replica.

        The next shot loads them again.
        """
        if self.clips.kind is not None and not self.session.leader_decides(self._has_room_for_text_encoder):
            self.clips.release()

    def _has_room_for_text_encoder(self) -> bool:
        device = self._text_device
        if device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free > 1.1 * text_encoder_bytes(self._weights.any_checkpoint, self.text_dtype) + GIB

    @property
    def _text_device(self) -> torch.device:
        choice = self._model.text_encoder_device
        return self.session.device if choice == "auto" else torch.device(choice)

    def encode_texts(self, texts: Sequence[str], *, keep_encoder: bool = False) -> dict[str, Tensor]:
        """Return embeddings ``[L <= 512, text_dim]`` on the CPU, by text. Every rank encodes all of them.

        ``keep_encoder`` keeps the text encoder loaded for the next call.
        """
        encoder = self._text_encoder or self.load_text_encoder()
        self._text_encoder = encoder if keep_encoder else None
        return {text: embed.cpu() for text, embed in zip(texts, encoder.encode(texts), strict=True)}

    def close(self, error: BaseException | None = None) -> None:
        """Drop all weights and end the session, after ``error`` of this rank if there was one."""
        self.clips.release()
        self._text_encoder = None
        self.session.close(error)


def _check_start(
    model: ModelSettings,
    weights: Weights,
    parallel: ParallelSettings,
    session: Session,
    adapters: WeightMemory,
    scorers_on_host: int,
) -> None:
    """Raise ``ConfigError`` unless the experts fit this rank, and the kernels that the settings name work on it."""
    config, device = weights.any_checkpoint.dit_config, session.device
    check_weight_memory(
        model,
        parallel,
        config,
        device=device,
        ranks_per_node=session.layout.ranks_per_node,
        adapters=adapters,
        scorers_on_host=scorers_on_host,
    )
    start_backend(model.attention, device=device, dtype=getattr(torch, model.dtype), head_dim=config.head_dim)
    check_linears(model.linears, device)
