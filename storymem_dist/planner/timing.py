"""Predicts seconds: of a step, a shot, loading and compiling, on any hardware and layout.

Work (``planner.work``) over rates (``Hardware`` x ``Constants``), and bytes over links. What overlaps with computing
costs nothing: the values of Ulysses, the messages of a ring, weights that are gathered or copied ahead. Where computing
is shorter, it costs the rest. Knows nothing about stories or queues.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from storymem_dist.diffusion.latent_grid import LATENT_CHANNELS, LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import EXPERTS, WAN22_A14B, TextEncoderConfig, VaeConfig
from storymem_dist.parallel.settings import SHARDED, ParallelSettings
from storymem_dist.parallel.weight_memory import block_bytes, expert_bytes, held_bytes
from storymem_dist.planner.calibration import Constants
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.memory import streams, text_encoder_memory
from storymem_dist.planner.work import (
    decode_flop,
    encode_flop,
    exchanged_bytes,
    forward_work,
    passed_on_bytes,
    text_flop,
)
from storymem_dist.story.modes import M2V
from storymem_dist.weights.settings import ModelSettings

_GIGA, _TERA, _MICRO = 1e9, 1e12, 1e-6
_OPERATORS = (30, 80)
"""Operators of a block that touch memory: compiled, and eager (``benchmarks/step.py`` counts them)."""

_OUTSIDE_OPERATORS = 80
"""Operators of a forward outside of its blocks that touch memory."""

_VAE_OPERATORS = 480
"""Operators for each latent frame that is decoded or encoded (counted)."""

_VAE_PASSES = 60.0
"""Channels (``base_dim``) at which what a convolution reads and writes takes as long as its products. Products grow
with the square of the channels, passes with the channels: so a narrow VAE reaches a small share of the peak. On one
core that is 3 GFLOP/s with 4 channels, 14 with 16, and 39 with the published 96 (measured)."""

_MERGED_BYTES = 26
"""Bytes of a query's channel that merging one more part of a ring reads and writes."""

_VAE_EXCHANGES = 33
"""Exchanges between neighbours for each latent frame that is decoded or encoded (counted: 693 for 21)."""

_GHOSTS = 8
"""Columns of its neighbours that a rank's strip carries through the VAE."""

_SAVE_SECONDS_PER_FRAME_PIXEL = 2.8 / (81 * 480 * 832)
"""Encoding and writing of a clip on a processor, measured by ``benchmarks/outside_denoise.py``."""

_COMPILE_SECONDS = {False: 60.0, True: 20.0}
"""Of the first block, and where the user's cache holds compiled code."""


def eager_operators(config: DiTConfig) -> int:
    """Return how many operators of an eager forward touch memory."""
    return config.num_layers * _OPERATORS[1] + _OUTSIDE_OPERATORS


def narrow_vae_factor(vae: VaeConfig) -> float:
    """Return how much longer ``vae`` takes for a FLOP than the published one, whose share of the peak is known."""
    published = WAN22_A14B.vae.base_dim
    return (1 + _VAE_PASSES / vae.base_dim) / (1 + _VAE_PASSES / published)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one denoising step, by what the device does or waits for; ``total`` is the sum.

    ``linear``, ``attention``, ``elementwise``: computing. ``launch``: waiting for the host. ``sequence``: messages of
    Ulysses and ring that nothing hides. ``gather``: FSDP2's all-gathers, likewise. ``guidance``: the exchange of both
    passes. ``stream``: blocks from host memory, likewise.
    """

    linear: float
    attention: float
    elementwise: float
    launch: float = 0.0
    sequence: float = 0.0
    gather: float = 0.0
    guidance: float = 0.0
    stream: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, one.name) for one in fields(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotTime:
    """Seconds of one shot on one replica. ``save`` runs in the background, next to the shot of another story."""

    text: float
    condition: float
    denoise: float
    decode: float
    save: float

    @property
    def busy(self) -> float:
        """What the replica's devices are busy with: ``total`` without ``save``."""
        return self.text + self.condition + self.denoise + self.decode

    @property
    def total(self) -> float:
        """From the claim to the commit: what a chain of shots waits for."""
        return self.busy + self.save


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeModel:
    """Times on ``hardware``, whose devices reach the shares of their peak rates that ``constants`` holds."""

    hardware: Hardware
    constants: Constants

    def step_seconds(
        self,
        parallel: ParallelSettings,
        model: ModelSettings,
        dit_config: DiTConfig,
        num_tokens: float,
        *,
        passes: float = 2.0,
        resident_blocks: int | None = None,
    ) -> StepTime:
        """Seconds of one step over ``num_tokens`` tokens with ``passes`` forwards on average (2 with guidance).

        ``parallel`` has numbers for all axes; ``compile=auto`` counts as compiled. ``resident_blocks``: how many blocks
        ``experts=stream`` has room for (None: none); ``planner.memory.resident_blocks`` says it.
        """
        cfg, ring, ulysses = parallel.axes
        one = self._forward(parallel, model, dit_config, num_tokens, ring, ulysses, resident_blocks)
        per_rank = passes / cfg if passes > 1 else passes
        times = {name: seconds * per_rank * self.constants.step_factor for name, seconds in one.items()}
        if cfg == 2:
            bandwidth, latency = self._link(parallel.ranks_per_replica)
            latents = num_tokens * 4 * LATENT_CHANNELS * 4  # four latent cells make a token
            times["guidance"] = (latents / bandwidth + latency) * self.constants.step_factor
        return StepTime(**times)

    def shot_seconds(
        self,
        parallel: ParallelSettings,
        model: ModelSettings,
        dit_config: DiTConfig,
        sampler: SamplerSettings,
        kind: str,
        num_keyframes: float,
        *,
        num_new_keyframes: float = 2.5,
        continued: bool = False,
        resident_blocks: int | None = None,
        vae: VaeConfig = WAN22_A14B.vae,
        text_encoder: TextEncoderConfig = WAN22_A14B.text_encoder,
    ) -> ShotTime:
        """Seconds of one shot of ``kind`` ("t2v" or "m2v") with ``num_keyframes`` in its memory.

        ``num_new_keyframes``: those that this replica has not encoded before. ``continued``: the shot begins with
        frames of the one before it, which are encoded with it; a cut's condition is the same for all shots.
        """
        size = sampler.num_frames, sampler.height, sampler.width
        clip = LatentGrid(num_frames=sampler.num_frames, height=sampler.height, width=sampler.width)
        in_memory = num_keyframes if kind == M2V else 0.0
        num_tokens = clip.num_tokens * (1 + in_memory / clip.num_latents)
        step = self.step_seconds(
            parallel,
            model,
            dit_config,
            num_tokens,
            passes=sampler.passes_per_step,
            resident_blocks=resident_blocks,
        ).total
        condition = 0.0
        if kind == M2V:
            new = min(num_new_keyframes, in_memory)
            condition = new * self._vae(encode_flop(1, *size[1:], vae), 1, size, parallel, vae)
            if continued:
                condition += self._vae(encode_flop(*size, vae), clip.num_latents, size, parallel, vae)
        texts = text_flop(1, dit_config.text_len, text_encoder) / self._rate(self.constants.text)
        return ShotTime(
            text=texts / parallel.ranks_per_replica,
            condition=condition,
            denoise=sampler.num_inference_steps * step + self._turns(parallel, model, dit_config, step),
            decode=self._vae(decode_flop(*size, vae), clip.num_latents, size, parallel, vae),
            save=_SAVE_SECONDS_PER_FRAME_PIXEL * size[0] * size[1] * size[2],
        )

    def cut_seconds(
        self, parallel: ParallelSettings, sampler: SamplerSettings, vae: VaeConfig = WAN22_A14B.vae
    ) -> float:
        """Seconds of encoding the condition of a cut: once for each replica, all cuts of a size share it."""
        size = sampler.num_frames, sampler.height, sampler.width
        clip = LatentGrid(num_frames=size[0], height=size[1], width=size[2])
        return self._vae(encode_flop(*size, vae), clip.num_latents, size, parallel, vae)

    def load_seconds(self, parallel: ParallelSettings, model: ModelSettings, dit_config: DiTConfig) -> float:
        """Seconds until both experts of one kind are read from published files and placed on all ranks of a node.

        Each node reads them once where ranks share reads; one rank each otherwise, through the same disk.
        """
        readers = 1 if parallel.share_reads else max(1, self.hardware.gpus_per_node // parallel.weight_shards)
        published = len(EXPERTS) * expert_bytes(dit_config, torch.float32, "exact")
        read = published * readers / self._bytes_per_second("read")
        held = len(EXPERTS) * held_bytes(model, dit_config) / parallel.weight_shards
        return read + held / self._bytes_per_second("host_link")

    def text_load_seconds(
        self, model: ModelSettings, text_encoder: TextEncoderConfig = WAN22_A14B.text_encoder
    ) -> float:
        """Seconds until the text encoder is read: once at the start of a job, and for each later group of prompts."""
        dtype = getattr(torch, model.text_encoder_dtype)
        return text_encoder_memory(text_encoder, dtype, 0) / self._bytes_per_second("read")

    def compile_seconds(self, parallel: ParallelSettings, *, cached: bool = False) -> float:
        """Seconds of the first compilation of a block; 0 without. ``cached``: the user's cache holds the code."""
        return _COMPILE_SECONDS[cached] if parallel.may_compile else 0.0

    # ---- parts

    def _forward(
        self,
        parallel: ParallelSettings,
        model: ModelSettings,
        config: DiTConfig,
        num_tokens: float,
        ring: int,
        ulysses: int,
        resident_blocks: int | None,
    ) -> dict[str, float]:
        """Seconds of one forward, by the fields of ``StepTime``."""
        ranks, layers = ring * ulysses, config.num_layers
        work = forward_work(config, num_tokens, linears=model.linears, compiled=parallel.may_compile)
        elementwise = work.elementwise / ranks
        if ring > 1:
            elementwise += (ring - 1) * _MERGED_BYTES * num_tokens / ranks * config.dim * layers
        times = {
            "linear": work.linear / ranks / self._linear_rate(model.linears)
            + work.exact_linear / ranks / self._rate(self.constants.linear),
            "attention": (work.attention + work.cross) / ranks / self._rate(self.constants.attention),
            "elementwise": elementwise / (self.hardware.memory_gb_per_s * _GIGA * self.constants.memory),
        }
        computing = sum(times.values())
        operators = layers * _OPERATORS[0 if parallel.may_compile else 1] + _OUTSIDE_OPERATORS
        times["launch"] = self._launch(operators, computing)
        computing += times["launch"]
        if ranks > 1:
            times["sequence"] = layers * self._exchange(config, num_tokens, ring, ulysses, times["attention"] / layers)
        if parallel.weights in SHARDED and not parallel.streams_blocks:
            times["gather"] = self._gather(parallel, model, config, computing / layers)
        elif parallel.weights == "zero3":
            times["stream"] = self._copied(layers * block_bytes(model, config), 0.0)
        elif streams(parallel, model):
            kept = self._kept_blocks(parallel, config, resident_blocks)
            times["stream"] = self._copied((layers - kept) * block_bytes(model, config), computing)
        return times

    def _launch(self, operators: float, computing: float) -> float:
        """Seconds that starting ``operators`` adds to ``computing``: a GPU waits for its host where it is faster."""
        host = operators * self.constants.operator_us * _MICRO / self.hardware.core_share
        return host if self.hardware.memory_gib is None else max(0.0, host - computing)

    def _exchange(self, config: DiTConfig, num_tokens: float, ring: int, ulysses: int, attention: float) -> float:
        """Seconds of the messages in one block that nothing hides; ``attention`` takes that many."""
        seconds = 0.0
        if ulysses > 1:
            bandwidth, latency = self._link(ulysses)
            both, one = exchanged_bytes(config, num_tokens / ring, ulysses)
            seconds += (both + one) / bandwidth + 2 * latency
        if ring > 1:
            bandwidth, latency = self._link(ring * ulysses)
            round_trip = passed_on_bytes(config, num_tokens, ring, ulysses) / bandwidth + latency
            seconds += (ring - 1) * max(latency, round_trip - attention / ring)
        return seconds

    def _gather(self, parallel: ParallelSettings, model: ModelSettings, config: DiTConfig, computing: float) -> float:
        """Seconds of FSDP2's all-gathers that nothing hides; a block computes ``computing`` seconds."""
        shards, block = parallel.weight_shards, block_bytes(model, config)
        bandwidth, latency = self._link(shards)
        one = block * (shards - 1) / shards / bandwidth + latency
        if parallel.weights == "fsdp_offload":
            one = max(one, block / shards / self._bytes_per_second("host_link"))
        hidden = computing if parallel.prefetch_blocks else 0.0
        outside = held_bytes(model, config) - config.num_layers * block
        first = (outside + block) / block * one
        return first + (config.num_layers - 1) * max(0.0, one - hidden)

    def _turns(self, parallel: ParallelSettings, model: ModelSettings, config: DiTConfig, step: float) -> float:
        """Seconds in a shot for experts that take turns on the device: what copies take beyond their first step."""
        if model.experts != "swap" or parallel.weights not in ("replicated", "fsdp"):
            return 0.0
        part = held_bytes(model, config) / parallel.weight_shards
        hidden = step if parallel.weights == "replicated" else 0.0  # shards are copied before the first block
        return len(EXPERTS) * self._copied(part, hidden)

    def _kept_blocks(self, parallel: ParallelSettings, config: DiTConfig, resident_blocks: int | None) -> int:
        if resident_blocks is not None and resident_blocks >= config.num_layers:
            return config.num_layers
        return max(0, (resident_blocks or 0) - parallel.prefetch_blocks - 1)

    def _copied(self, num_bytes: float, hidden: float) -> float:
        """Seconds that copying from host memory takes beyond ``hidden`` seconds of work."""
        return max(0.0, num_bytes / self._bytes_per_second("host_link") - hidden)

    def _vae(
        self, flop: float, num_latents: int, size: tuple[int, int, int], parallel: ParallelSettings, vae: VaeConfig
    ) -> float:
        """Seconds of encoding or decoding on the ranks of a replica."""
        ranks, long = parallel.ranks_per_replica, max(size[1:])
        seconds = flop / self._rate(self.constants.vae) * narrow_vae_factor(vae)
        waiting = 0.0
        if ranks > 1:
            own = min(long, -(-(long // 8) // ranks) * 8 + _GHOSTS)
            seconds *= own / long
            waiting = num_latents * _VAE_EXCHANGES * 2 * self._link(ranks)[1]
        return seconds + self._launch(num_latents * _VAE_OPERATORS, seconds) + waiting

    def _link(self, ranks: int) -> tuple[float, float]:
        """Bytes per second and latency between ``ranks`` neighbouring ranks, the slowest of them."""
        hardware = self.hardware
        if ranks <= hardware.gpus_per_node:
            return self._bytes_per_second("link"), hardware.link_latency_us * _MICRO
        return self._bytes_per_second("network"), hardware.network_latency_us * _MICRO

    def _bytes_per_second(self, link: str) -> float:
        peak: Any = getattr(self.hardware, f"{link}_gb_per_s")
        share: Any = getattr(self.constants, link)
        return float(peak * _GIGA * share)

    def _linear_rate(self, linears: str) -> float:
        eight = self.hardware.peak_tflops_int8 if linears == "int8" else self.hardware.peak_tflops_float8
        if linears == "exact" or eight is None:
            return self._rate(self.constants.linear)
        return eight * _TERA * self.constants.linear_8bit

    def _rate(self, share: float) -> float:
        return self.hardware.peak_tflops * _TERA * share
