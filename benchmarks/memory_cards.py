"""What of A14B fits which card, part by part: the tables of ``python -m benchmarks.memory --cards``.

Weights outside the blocks and the kept blocks are counted from shapes, a forward and the VAE on fake tensors, and where
experts live is decided by the product's own code. With ``--stream``, one whole expert of full size runs on fake tensors
with its blocks streamed, and the bytes that its weights hold are counted at every block.
"""

import gc
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import peak_gib
from benchmarks.memory_forward import ForwardPeak, forward_inputs, predict_forward, predict_vae
from benchmarks.ranks import CPU
from storymem_dist.diffusion.block_stream import StreamedWeights
from storymem_dist.diffusion.host_swap import HostMemory
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS, WAN22_A14B
from storymem_dist.models.wan.text_encoder import empty_text_encoder
from storymem_dist.parallel import weight_memory as deciding
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.working_memory import RESERVE_BYTES, VAE_BYTES, blocks_within, forward_bytes
from storymem_dist.weights.settings import ModelSettings

CARDS = {"24 GB": 23.0, "32 GB": 30.8, "48 GB": 43.9, "80 GB": 78.6}
"""GiB that a process can take of an idle RTX 4090, RTX 5090, L40S and H100, with CUDA's context taken off."""

GPU = torch.device("cuda")


def one_card(free: int, grid: LatentGrid, linears: str, *, compiled: bool, vae: dict[str, int]) -> dict[str, Any]:
    """What one card with ``free`` bytes holds while it renders shots of ``grid``, and what is left of it."""
    config, model = config_of(grid), ModelSettings(linears=linears)
    parallel = ParallelSettings(compile=compiled)
    experts = decided_with(free, model, parallel, config)
    dit = empty_expert(config, linears)
    block = bytes_of(dit.blocks[0])
    outside = bytes_of(dit) - config.num_layers * block
    forward = forward_bytes(config, grid.num_tokens, linears=linears, compiled=compiled)
    weights, kept = len(EXPERTS) * bytes_of(dit), config.num_layers
    if experts == "stream":
        if compiled:
            mark_as_compiled(dit)
        tokens = torch.empty(1, grid.num_tokens, config.dim, device="meta")
        room = free - VAE_BYTES - outside - tokens.nbytes
        fit = min(config.num_layers, blocks_within(room, dit, tokens))
        kept = fit if fit == config.num_layers else max(0, fit - parallel.prefetch_blocks - 1)
        weights = outside + min(config.num_layers, max(fit, parallel.prefetch_blocks + 1)) * block
    at_decode = weights if experts == "resident" else 0
    peak = max(weights + forward + VAE_BYTES, at_decode + vae["decode"], text_encoder_bytes())
    return {
        "experts": experts,
        "blocks kept": f"{kept} of {config.num_layers}",
        "weights": gib(weights),
        "arriving per pass": gib((config.num_layers - kept) * block),
        "forward": gib(forward),
        "VAE decode": gib(vae["decode"]),
        "text encoder": gib(text_encoder_bytes()),
        "peak": gib(peak),
        "left": gib(free - peak),
        "fits": "yes" if free - peak >= RESERVE_BYTES // 2 else "no",
        "host": gib(deciding.weight_memory(replace(model, experts=experts), parallel, config).on_host),
    }


def eight_cards(free: int, grid: LatentGrid, linears: str, forward: ForwardPeak, vae: dict[str, int]) -> dict[str, Any]:
    """The same for eight cards that share one shot (``parallel=fsdp_8gpu``), on the rank that needs the most."""
    parallel, model = ParallelSettings(ulysses=8, weights="fsdp"), ModelSettings(linears=linears)
    experts = decided_with(free, model, parallel, config_of(grid))
    weights = forward.weights * (len(EXPERTS) if experts == "resident" else 1)
    at_decode = weights if experts == "resident" else 0
    peak = max(
        weights + forward.gathered + forward.activations + VAE_BYTES, at_decode + vae["decode"], text_encoder_bytes()
    )
    return {
        "experts": experts,
        "weights": gib(weights),
        "gathered": gib(forward.gathered),
        "forward": gib(forward.activations),
        "VAE decode": gib(vae["decode"]),
        "text encoder": gib(text_encoder_bytes()),
        "peak": gib(peak),
        "left": gib(free - peak),
        "fits": "yes" if free - peak >= RESERVE_BYTES // 2 else "no",
    }


def card_tables(sizes: dict[str, tuple[int, int]], memory: list[int], linears: list[str]) -> dict[str, list[Any]]:
    """Rows for every card, size, number of keyframes and format: on one card, and on eight that share a shot."""
    single, eight = [], []
    for size, (height, width) in sizes.items():
        vaes = {num_ranks: predict_vae(num_ranks, height, width) for num_ranks in (1, 8)}
        for num_memory in memory:
            grid = LatentGrid(num_frames=81, height=height, width=width, num_memory=num_memory)
            for name in linears:
                shared = predict_forward(config_of(grid), grid, 8, name) if name != "int8" else None
                for card, card_gib in CARDS.items():
                    free, where = int(card_gib * GIB), {"card": card, "size": size, "K": num_memory, "linears": name}
                    for compiled in (False, True):
                        how = where | {"compiled": compiled}
                        single.append(how | one_card(free, grid, name, compiled=compiled, vae=vaes[1]))
                    if shared is not None:
                        eight.append(where | eight_cards(free, grid, name, shared, vaes[8]))
    return {"one card": single, "eight cards": eight}


def streamed_forward(grid: LatentGrid, linears: str, free: int, *, config: DiTConfig | None = None) -> dict[str, Any]:
    """Two passes of a whole expert on fake tensors, streamed into ``free`` bytes: what weights and forward take."""
    config = config or config_of(grid)
    held: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dit = empty_expert(config, linears, device="cpu")
        whole = bytes_of(dit)
        weights = StreamedWeights(dit, HostMemory(CPU), CPU)

        def that_fit(expert: WanDiT, tokens: Tensor) -> int:
            return blocks_within(free - VAE_BYTES - held_bytes(expert) - tokens.nbytes, expert, tokens)

        for block in dit.blocks:
            block.register_forward_pre_hook(lambda *_: held.append(held_bytes(dit)))
        inputs = forward_inputs(config, grid)
        weights.enter_in_part(that_fit)
        forward = round(peak_gib(lambda: [dit(*inputs, grid.temporal_positions()) for _ in range(2)], CPU) * GIB)
        weights.leave_device()
    gc.collect()
    return {
        "whole expert": gib(whole),
        "most weights": gib(max(held)),
        "forward": gib(forward),
        "most of both": gib(max(held) + forward + VAE_BYTES),
        "free": gib(free),
    }


def decided_with(free: int, model: ModelSettings, parallel: ParallelSettings, config: DiTConfig) -> str:
    """What ``model.experts=auto`` becomes on a device with ``free`` bytes."""
    with patch.object(deciding, "free_device_memory_bytes", return_value=free):
        return deciding.decide_experts(model, parallel, config, GPU).experts


def config_of(grid: LatentGrid) -> DiTConfig:
    """The base model that renders shots with this many keyframes."""
    return WAN22_A14B.i2v if grid.num_memory else WAN22_A14B.t2v


def empty_expert(config: DiTConfig, linears: str, device: str = "meta") -> WanDiT:
    """An expert in bf16 without values."""
    with torch.device(device):
        dit = WanDiT(config)
        quantize_linears(dit.blocks, linears)
    return dit.eval().requires_grad_(False)


def mark_as_compiled(dit: WanDiT) -> None:
    """Compile nothing, but let ``dit`` look so: ``Module.compile`` is lazy."""
    for block in dit.blocks:
        block.compile(dynamic=True)


def text_encoder_bytes() -> int:
    """umT5 in bf16; it is on the device before the experts are, or between two shots."""
    return sum(parameter.numel() * 2 for parameter in empty_text_encoder(WAN22_A14B.text_encoder).parameters())


def bytes_of(module: nn.Module) -> int:
    """Bytes of all parameters by their shapes."""
    return sum(parameter.nbytes for parameter in module.parameters())


def held_bytes(module: nn.Module) -> int:
    """Bytes of the memory that parameters have at this moment."""
    return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def gib(num_bytes: int) -> float:
    """GiB with two decimals."""
    return round(num_bytes / GIB, 2)
