"""Predicts what a rank needs, part by part, for every layout: the bytes of ``storymem-plan`` and ``parallel=auto``.

The formulas are those that refuse a job at its start (``parallel.weight_memory`` and ``parallel.working_memory``); this
module adds them up phase by phase. Knows no hardware, so it does not say what fits.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.models.precision import CONV_WORKSPACE_MIB, vae_dtype
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import WAN22_A14B, TextEncoderConfig, VaeConfig
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import (
    SCORING_BYTES,
    WeightMemory,
    block_bytes,
    gathering_of,
    weight_memory,
)
from storymem_dist.parallel.working_memory import (
    RESERVE_BYTES,
    VAE_BYTES,
    ForwardMemory,
    Gathering,
    cache_bytes,
    decode_bytes,
    encode_bytes,
    forward_memory,
)
from storymem_dist.story.modes import KINDS, M2V
from storymem_dist.weights.settings import ModelSettings

NO_ADAPTERS = WeightMemory()

TEXT, CONDITION, DENOISE, DECODE, KEYFRAMES = PHASES = ("text", "condition", "denoise", "decode", "keyframes")

PARTS = ("weights", "activations", "collectives", "vae", "text_encoder", "scorer", "reserve")
"""The parts of a rank's device memory, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMemory:
    """Bytes on a rank's device in one phase of a shot (one of ``PHASES``), part by part.

    ``weights``: experts, and LoRAs of single shots. ``activations``: of an expert's forward, and its caches.
    ``collectives``: what FSDP2 gathers, and messages of Ulysses and ring. ``vae`` and ``text_encoder``: their weights,
    and their activations while they work. ``scorer``: the same of the scorer of keyframes, on a leader. ``reserve``:
    CUDA's libraries, workspaces of kernels, fragmentation.
    """

    phase: str
    weights: int = 0
    activations: int = 0
    collectives: int = 0
    vae: int = 0
    text_encoder: int = 0
    scorer: int = 0
    reserve: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """What one rank needs: its device phase by phase, and ``on_host`` bytes of host memory.

    The parts (``weights`` ...) are those of the phase that needs the most.
    """

    phases: tuple[PhaseMemory, ...]
    on_host: int

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs the most."""
        return max(self.phases, key=lambda one: one.total)

    @property
    def on_device(self) -> int:
        """Bytes at the peak."""
        return self.peak.total

    @property
    def weights(self) -> int:
        """Of the experts at the peak."""
        return self.peak.weights

    @property
    def activations(self) -> int:
        """At the peak."""
        return self.peak.activations

    @property
    def collectives(self) -> int:
        """At the peak."""
        return self.peak.collectives

    @property
    def vae(self) -> int:
        """At the peak."""
        return self.peak.vae

    @property
    def text_encoder(self) -> int:
        """At the peak."""
        return self.peak.text_encoder

    @property
    def scorer(self) -> int:
        """At the peak."""
        return self.peak.scorer

    @property
    def reserve(self) -> int:
        """At the peak."""
        return self.peak.reserve


def rank_memory(
    parallel: ParallelSettings,
    model: ModelSettings,
    dit_config: DiTConfig,
    sampler: SamplerSettings,
    *,
    num_keyframes: int,
    kinds: Collection[str] = KINDS,
    text_encoder: TextEncoderConfig = WAN22_A14B.text_encoder,
    vae: VaeConfig = WAN22_A14B.vae,
    adapters: WeightMemory = NO_ADAPTERS,
    scorer_bytes: int = 0,
    room: int | None = None,
    on_gpu: bool = True,
) -> RankMemory:
    """Return what one rank of ``parallel`` needs for shots of ``kinds`` with ``num_keyframes`` in their memory.

    ``parallel`` has numbers for all axes, ``model.experts`` is not ``auto``. ``room``: the bytes of the device (None:
    unlimited), which decide how many blocks ``experts=stream`` keeps there: see ``resident_blocks``. ``adapters``:
    LoRAs of a single shot. ``scorer_bytes``: weights of the scorer that chooses keyframes on a GPU between shots.
    ``on_gpu``: host memory is page-locked, and the device needs a reserve.
    """
    in_memory = num_keyframes if M2V in kinds else 0
    forward = forward_of(parallel, model, dit_config, sampler, in_memory)
    held = weight_memory(model, parallel, dit_config, page_locked=on_gpu)
    weights = held.on_device + adapters.on_device
    if streams(parallel, model):
        fit = resident_blocks(
            parallel, model, dit_config, sampler, num_keyframes=in_memory, adapters=adapters, room=room, vae=vae
        )
        least = min(parallel.prefetch_blocks + 1, dit_config.num_layers)
        weights += (max(fit, least) - least) * block_bytes(model, dit_config)
    between_steps = weights if model.experts == "resident" and not streams(parallel, model) else 0
    size = {"num_frames": sampler.num_frames, "num_ranks": parallel.ranks_per_replica, "vae_width": vae.base_dim}
    dtype = vae_dtype(model.vae_precision)
    vae_weights = VAE_BYTES * vae.base_dim**2 // WAN22_A14B.vae.base_dim**2
    text_on_device = model.text_encoder_device != "cpu"
    text = text_encoder_memory(text_encoder, getattr(torch, model.text_encoder_dtype), dit_config.text_len)
    reserve = RESERVE_BYTES if on_gpu else 0
    workspace = CONV_WORKSPACE_MIB * 2**20  # of cuDNN: a part of the reserve, which encode and decode count themselves
    not_on_cpus = 0 if on_gpu else workspace
    common, with_vae = {"reserve": reserve}, {"reserve": max(0, reserve - workspace)}
    phases = [
        PhaseMemory(phase=TEXT, vae=vae_weights, text_encoder=text if text_on_device else 0, **common),
        PhaseMemory(
            phase=DENOISE,
            weights=weights,
            activations=forward.activations + _caches(parallel, model, dit_config, sampler, in_memory),
            collectives=forward.messages + forward.gathered,
            vae=vae_weights,
            **common,
        ),
        PhaseMemory(
            phase=DECODE,
            weights=between_steps,
            vae=vae_weights + decode_bytes(sampler.height, sampler.width, dtype, **size) - not_on_cpus,
            **with_vae,
        ),
    ]
    if M2V in kinds:
        encode = encode_bytes(sampler.height, sampler.width, dtype, **size) - not_on_cpus
        phases.insert(1, PhaseMemory(phase=CONDITION, weights=between_steps, vae=vae_weights + encode, **with_vae))
    if scorer_bytes:
        scorer = scorer_bytes + SCORING_BYTES
        phases.append(PhaseMemory(phase=KEYFRAMES, weights=between_steps, vae=vae_weights, scorer=scorer, **common))
    frames = 3 * sampler.num_frames * sampler.height * sampler.width
    on_host = held.on_host + adapters.on_host + frames + (0 if text_on_device else text)
    return RankMemory(phases=tuple(phases), on_host=on_host)


def streams(parallel: ParallelSettings, model: ModelSettings) -> bool:
    """Whether each rank streams the blocks of whole experts from host memory."""
    return parallel.streams_blocks or model.experts == "stream"


def resident_blocks(
    parallel: ParallelSettings,
    model: ModelSettings,
    dit_config: DiTConfig,
    sampler: SamplerSettings,
    *,
    num_keyframes: int,
    adapters: WeightMemory = NO_ADAPTERS,
    room: int | None,
    vae: VaeConfig = WAN22_A14B.vae,
) -> int:
    """Return how many blocks ``experts=stream`` has on a device with ``room`` bytes: what a forward leaves free.

    All of them where there is room for all (or ``room`` is None), else at least 0; those that are on their way
    included.
    """
    if room is None:
        return dit_config.num_layers
    forward = forward_of(parallel, model, dit_config, sampler, num_keyframes)
    least = replace(parallel, prefetch_blocks=0)
    outside = weight_memory(model, least, dit_config).on_device - block_bytes(model, dit_config)
    work = forward.total + _caches(parallel, model, dit_config, sampler, num_keyframes) + adapters.on_device
    work += VAE_BYTES * vae.base_dim**2 // WAN22_A14B.vae.base_dim**2
    return max(0, min(dit_config.num_layers, (room - outside - work - RESERVE_BYTES) // block_bytes(model, dit_config)))


def forward_of(
    parallel: ParallelSettings,
    model: ModelSettings,
    dit_config: DiTConfig,
    sampler: SamplerSettings,
    num_keyframes: int,
) -> ForwardMemory:
    """Return what one forward needs besides the weights that stay on the device."""
    _, ring, ulysses = parallel.axes
    gathering = gathering_of(model, parallel, dit_config)
    if parallel.weights == "zero3":  # DeepSpeed gathers ahead, too
        gathering = Gathering(block=block_bytes(model, dit_config), outside=0)
    return forward_memory(
        dit_config,
        num_tokens_of(sampler, num_keyframes),
        ring=ring,
        ulysses=ulysses,
        dtype=getattr(torch, model.dtype),
        linears=model.linears,
        compiled=parallel.may_compile,
        gathering=gathering,
    )


def num_tokens_of(sampler: SamplerSettings, num_keyframes: int) -> int:
    """Return the tokens of one forward."""
    return LatentGrid(
        num_frames=sampler.num_frames, height=sampler.height, width=sampler.width, num_memory=num_keyframes
    ).num_tokens


def text_encoder_memory(config: TextEncoderConfig, dtype: torch.dtype, text_len: int) -> int:
    """Return the bytes of a umT5 encoder in ``dtype``, and of encoding one text of ``text_len`` tokens."""
    layer = 4 * config.dim * config.attention_dim + 3 * config.dim * config.ffn_dim + 2 * config.dim
    layer += config.num_buckets * config.num_heads
    weights = config.vocab_size * config.dim + config.num_layers * layer + config.dim
    scores = 3 * config.num_heads * text_len**2  # a position bias, scores and their softmax
    hidden = text_len * (3 * config.ffn_dim + 6 * config.dim)
    return weights * dtype.itemsize + (scores + hidden) * max(4, dtype.itemsize)


def _caches(
    parallel: ParallelSettings,
    model: ModelSettings,
    config: DiTConfig,
    sampler: SamplerSettings,
    num_keyframes: int,
) -> int:
    """What step cache and text cache hold for both guidance passes."""
    tokens = -(-num_tokens_of(sampler, num_keyframes) // parallel.sequence)
    return cache_bytes(
        config,
        tokens,
        getattr(torch, model.dtype),
        steps=sampler.step_cache_threshold > 0,
        texts=model.cache_text_keys,
    )
