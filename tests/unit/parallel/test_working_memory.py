"""What a forward is said to need is what the transformer needs, predicted for A14B's own sizes on fake tensors."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import peak_gib
from benchmarks.memory_forward import forward_inputs
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel import weight_memory
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.working_memory import RESERVE_BYTES, blocks_within, forward_bytes
from storymem_dist.weights.settings import ModelSettings

SMALL = LatentGrid(num_frames=81, height=480, width=832)
LARGE = LatentGrid(num_frames=81, height=720, width=1280, num_memory=10)
CPU = torch.device("cpu")


@pytest.mark.parametrize("linears", ["exact", "float8", "int8"])
@pytest.mark.parametrize("grid", [SMALL, LARGE], ids=["480p", "720p, ten keyframes"])
def test_a_forward_needs_what_is_left_free_for_it(linears: str, grid: LatentGrid) -> None:
    """Without rows taken in parts, eight-bit layers would need 34% (float8) and 97% (int8) more."""
    config = replace(WAN22_A14B.i2v if grid.num_memory else WAN22_A14B.t2v, num_layers=2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dit = WanDiT(config)
        quantize_linears(dit.blocks, linears)
        inputs = forward_inputs(config, grid)
        found = peak_gib(lambda: dit(*inputs, grid.temporal_positions()), CPU) * GIB
    assert 1.0 <= forward_bytes(config, grid.num_tokens, linears=linears) / found <= 1.04


def test_a_compiled_int8_forward_needs_more_than_others() -> None:
    config, others = WAN22_A14B.t2v, {}
    for linears in ("exact", "float8", "float8_fast", "int8"):
        others[linears] = forward_bytes(config, LARGE.num_tokens, linears=linears, compiled=True)
    assert others["exact"] == others["float8"] == others["float8_fast"] < others["int8"]


def test_format_and_compilation_of_an_expert_are_recognised() -> None:
    with torch.device("meta"):
        dit = WanDiT(replace(WAN22_A14B.t2v, num_layers=2))
        quantize_linears(dit.blocks, "int8")
        tokens = torch.empty(1, LARGE.num_tokens, dit.config.dim)
    free = 40 * GIB
    eager = blocks_within(free, dit, tokens)
    for block in dit.blocks:
        block.compile(dynamic=True)
    assert blocks_within(free, dit, tokens) < eager


def test_the_time_embedding_is_one_row_for_any_number_of_tokens() -> None:
    """A projection of every token's timestep would take 6 x 5,120 fp32 numbers for each of 111,600 tokens: 12.8 GiB."""
    with torch.device("meta"), torch.no_grad():
        dit = WanDiT(replace(WAN22_A14B.i2v, num_layers=1))
        shapes: list[torch.Size] = []
        for layer in (dit.time_embedding, dit.time_projection):
            layer.register_forward_hook(lambda _layer, _inputs, output: shapes.append(output.shape))
        dit(*forward_inputs(dit.config, LARGE), LARGE.temporal_positions())
    assert shapes == [(1, dit.config.dim), (1, 6 * dit.config.dim)]


def test_eight_cards_of_32_gb_hold_their_shards_and_the_largest_scorer() -> None:
    """HPSv3 has 8.3 billion weights in bf16; only the leader holds it."""
    parallel, free = ParallelSettings(ulysses=8, weights="fsdp"), int(30.8 * GIB)
    with patch.object(weight_memory, "free_device_memory_bytes", return_value=free):
        model = weight_memory.decide_experts(ModelSettings(), parallel, WAN22_A14B.i2v, torch.device("cuda"))
    assert model.experts == "resident"
    shards = weight_memory.weight_memory(model, parallel, WAN22_A14B.i2v).on_device
    assert shards + 2 * 8.3e9 + RESERVE_BYTES < free
