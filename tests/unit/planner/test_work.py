"""FLOP by formula are those that torch counts in the project's own modules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_forward import forward_inputs
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.models.wan.text_encoder import empty_text_encoder
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.planner.work import decode_flop, encode_flop, exchanged_bytes, forward_work, text_flop


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_a_forward_has_the_counted_flop() -> None:
    config = replace(WAN22_A14B.i2v, num_layers=2)
    grid = LatentGrid(num_frames=9, height=160, width=96, num_memory=2)
    with torch.device("meta"):  # unfused attention is made of products, which the counter knows on any device
        dit = WanDiT(config, attention_backend="sdpa_math")
        found = counted(lambda: dit(*forward_inputs(config, grid), grid.temporal_positions()))
    assert forward_work(config, grid.num_tokens).flop == found


@pytest.mark.parametrize("num_frames", [1, 9])
def test_the_vae_has_the_counted_flop(num_frames: int) -> None:
    """The fused attention of its middle counts as nothing on a processor, so it is added here."""
    height, width, latents = 32, 48, (num_frames + 3) // 4
    with FakeTensorMode():
        vae = WanVae(AutoencoderKLWan())
        encode = counted(lambda: vae.encode(torch.empty(3, num_frames, height, width)))
        decode = counted(lambda: vae.decode(torch.empty(16, latents, height // 8, width // 8)))
    attention = 4 * latents * (height * width // 64) ** 2 * 384
    assert encode_flop(num_frames, height, width) == encode + attention
    assert decode_flop(num_frames, height, width) == decode + attention


def test_the_text_encoder_has_the_counted_flop() -> None:
    encoder, tokens = empty_text_encoder(TINY.text_encoder), torch.zeros(3, 40, dtype=torch.int64, device="meta")
    assert text_flop(3, 40, TINY.text_encoder) == pytest.approx(counted(lambda: encoder(tokens)), rel=0.01)


@pytest.mark.parametrize("num_keyframes", [0, 3, 10])
def test_priorities_of_shots_follow_the_same_work(num_keyframes: int) -> None:
    cost = CostModel()
    work = forward_work(WAN22_A14B.t2v, cost.num_tokens(num_keyframes))
    assert cost.forward_tflop(num_keyframes) == pytest.approx(work.flop / 1e12, rel=3e-3)


def test_a_rank_keeps_its_own_share_of_what_is_exchanged() -> None:
    config = WAN22_A14B.t2v
    both, one = exchanged_bytes(config, 32_760, 8)
    assert both == 2 * one == 2 * (32_760 / 8) * config.dim * 2 * 7 / 8


def test_compiled_blocks_move_fewer_bytes_and_no_fewer_flop() -> None:
    eager, compiled = (forward_work(WAN22_A14B.t2v, 1000, compiled=value) for value in (False, True))
    assert compiled.elementwise < eager.elementwise
    assert compiled.flop == eager.flop
