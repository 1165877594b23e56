"""The VAE split over spawned gloo ranks gives what it gives on one device, for every width, orientation and chunk."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from storymem_dist.errors import LayoutError
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel import vae as parallel_vae
from storymem_dist.parallel.vae import parallelize_vae
from tests.helpers.golden import load_golden, strip_prefix
from tests.helpers.ranks import run_ranks

TOLERANCE = 1e-5
Case = tuple[int, int, int]  # latent height and width, latent frames

CASES = {
    2: [(3, 13, 3), (13, 2, 2), (3, 5, 1)],  # 7/6 columns; 7/6 rows; 3/2 columns of one image
    3: [(3, 13, 3), (13, 2, 2)],  # 5/4/4
    4: [(2, 13, 3), (2, 6, 2), (3, 3, 1)],  # 4/3/3/3; 2/2/2 and one rank to spare; one part for all
}


def golden_vae() -> WanVae:
    weights, manifest = load_golden("vae")
    autoencoder = AutoencoderKLWan(base_dim=manifest["config"]["dim"], z_dim=manifest["config"]["z_dim"])
    autoencoder.load_state_dict(convert_wan_vae_to_diffusers(strip_prefix(weights, "w.")))
    return WanVae(autoencoder)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    height, width, num_latents = case
    generator = torch.Generator().manual_seed(7)
    pixels = torch.rand(3, 4 * num_latents - 3, 8 * height, 8 * width, generator=generator) * 2 - 1
    return pixels, torch.randn(16, num_latents, height, width, generator=generator)


def encode_and_decode(cases: list[Case]) -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    vae = golden_vae()
    parallelize_vae(vae, dist.group.WORLD)
    results = []
    for case in cases:
        pixels, latents = inputs(case)
        results.append({"encode": vae.encode(pixels), "decode": vae.decode(latents)})
    return results


def largest_error(results: list[list[dict[str, Tensor]]], cases: list[Case]) -> dict[tuple[str, Case, int], float]:
    vae = golden_vae()
    errors = {}
    for index, case in enumerate(cases):
        pixels, latents = inputs(case)
        for what, expected in (("encode", vae.encode(pixels)), ("decode", vae.decode(latents))):
            for rank, result in enumerate(results):
                errors[what, case, rank] = (result[index][what] - expected).abs().max().item()
    return errors


@pytest.mark.parametrize("world_size", CASES)
def test_encode_and_decode_equal_one_device_on_every_rank(world_size: int) -> None:
    results = run_ranks(encode_and_decode, world_size, args=(CASES[world_size],))
    errors = largest_error(results, CASES[world_size])
    assert {key: error for key, error in errors.items() if error > TOLERANCE} == {}


def zero_ghosts(
    strip: parallel_vae._Strip, own: Tensor, wanted: parallel_vae._Ghosts
) -> tuple[Tensor, Tensor]:  # what a VAE without halo exchange would see at the cut
    left, right = wanted.left * strip._has_left, wanted.right * strip._has_right
    return torch.zeros_like(own.narrow(strip._dim, 0, left)), torch.zeros_like(own.narrow(strip._dim, 0, right))


def encode_and_decode_without_exchange(cases: list[Case]) -> list[dict[str, Tensor]]:
    with mock.patch.object(parallel_vae._Strip, "_exchange", zero_ghosts):
        return encode_and_decode(cases)


def encode_and_decode_with_attention_in_the_strip(cases: list[Case]) -> list[dict[str, Tensor]]:
    with mock.patch.object(parallel_vae._SplitQueryAttention, "forward", lambda self, x: x):
        return encode_and_decode(cases)


@pytest.mark.parametrize("broken", [encode_and_decode_without_exchange, encode_and_decode_with_attention_in_the_strip])
def test_the_comparison_sees_a_missing_exchange(broken) -> None:
    cases = [(4, 13, 2)]
    errors = largest_error(run_ranks(broken, 2, args=(cases,)), cases)
    assert min(errors.values()) > 1000 * TOLERANCE


class CollectiveCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_one_more_chunk() -> dict[str, dict[str, int]]:
    dist.init_process_group("gloo")
    vae = golden_vae()
    parallelize_vae(vae, dist.group.WORLD)
    counts = {}
    for what in ("encode", "decode"):
        counters = {}
        for num_latents in (1, 2):
            pixels, latents = inputs((2, 4, num_latents))
            with CollectiveCounter() as counters[num_latents]:
                vae.encode(pixels) if what == "encode" else vae.decode(latents)
        counts[what] = dict(counters[2].counts - counters[1].counts)
    return counts


def test_ranks_exchange_once_per_residual_block_and_not_per_convolution() -> None:
    first, second = run_ranks(collectives_of_one_more_chunk, 2)
    # decoder: 33 convolutions look sideways, in 14 residual blocks, 3 upsamplers, the first and the last layer; what
    # follows a cut from a whole tensor (first layer and block, two blocks after the attention) needs no exchange
    assert first["decode"] == {"alltoall_base_": 15, "allgather_": 2}
    assert first["encode"] == {"alltoall_base_": 11, "allgather_": 2}
    assert second == first


def split_and_join_again() -> None:
    dist.init_process_group("gloo")
    vae = golden_vae()
    pixels, latents = inputs((2, 5, 2))
    before = vae.encode(pixels), vae.decode(latents)
    modules, keys = list(vae.autoencoder.modules()), list(vae.autoencoder.state_dict())
    handle = parallelize_vae(vae, dist.group.WORLD)
    assert list(vae.autoencoder.state_dict()) == keys
    vae.decode(latents)
    handle.remove()
    assert list(vae.autoencoder.modules()) == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert torch.equal(vae.encode(pixels), before[0])
    assert torch.equal(vae.decode(latents), before[1])


def test_removing_the_split_leaves_the_vae_as_it_was() -> None:
    run_ranks(split_and_join_again, 2)


def with_a_wider_convolution(autoencoder: AutoencoderKLWan) -> None:
    block = autoencoder.decoder.mid_block.resnets[0]
    block.conv2 = type(block.conv2)(16, 16, 5, padding=2)


def with_a_strided_convolution(autoencoder: AutoencoderKLWan) -> None:
    autoencoder.encoder.conv_in.stride = (1, 2, 2)


def with_a_layer_of_another_kind(autoencoder: AutoencoderKLWan) -> None:
    autoencoder.decoder.up_blocks.append(nn.AvgPool3d(3, padding=1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_a_wider_convolution, "WanDecoder3d.mid_block.resnets.0.conv2"),
        (with_a_strided_convolution, "WanEncoder3d.conv_in"),
        (with_a_layer_of_another_kind, "WanDecoder3d.up_blocks.4"),
    ],
)
def test_a_layer_without_a_rule_is_refused_by_name(change, named: str) -> None:
    vae = golden_vae()
    change(vae.autoencoder)
    with pytest.raises(LayoutError, match=named):
        parallelize_vae(vae, dist.group.WORLD)
    assert not any(module._forward_pre_hooks for module in vae.autoencoder.modules())


def test_the_residual_vae_of_other_wan_models_is_refused() -> None:
    residual = AutoencoderKLWan(base_dim=4, z_dim=4, is_residual=True, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(LayoutError, match="WanResidualDownBlock"):
        parallelize_vae(WanVae(residual), dist.group.WORLD)


def decode_in_bf16(case: Case) -> Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    vae = bf16_vae()
    parallelize_vae(vae, dist.group.WORLD)
    return vae.decode(inputs(case)[1])


def bf16_vae() -> WanVae:
    return WanVae(golden_vae().autoencoder.to(torch.bfloat16))


def test_in_bf16_and_channels_last_ranks_decode_what_one_device_does_but_for_rounding() -> None:
    case = (2, 5, 2)
    results = run_ranks(decode_in_bf16, 2, args=(case,))
    expected, exact = bf16_vae().decode(inputs(case)[1]), golden_vae().decode(inputs(case)[1])
    rounding = (expected - exact).norm()
    assert torch.equal(*results)
    assert (results[0] - expected).norm() <= rounding, "not more than bf16 itself costs"
