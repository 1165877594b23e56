"""Small models on one device and split over ranks, and the largest difference between the two. Knows no collectives."""

from dataclasses import replace

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.loading import local_part, place_experts
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import OFFLOADED, ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae
from storymem_dist.weights.loading import StateDictSource, load_dit_weights

NUM_HEADS = WAN22_A14B.t2v.num_heads


TINY = DiTConfig(
    dim=8 * NUM_HEADS, ffn_dim=384, freq_dim=32, num_heads=NUM_HEADS, num_layers=2, in_dim=16, text_dim=24, text_len=12
)


class Reference:
    """A guided velocity computed on one device, equal on every rank, with which layouts are compared."""

    def __init__(
        self,
        config: DiTConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tolerance: float,
        linears: str = "exact",
    ) -> None:
        self.config = config
        self.tolerance = tolerance
        number_format = str(dtype).removeprefix("torch.") if linears == "exact" else linears
        self.name = f"transformer {config.num_layers} x {config.dim}, {number_format}"
        self._dtype = dtype
        self._linears = linears
        torch.manual_seed(0)
        self._single = WanDiT(config, dtype=dtype).eval().requires_grad_(False)
        if linears != "exact":
            weights = StateDictSource("selftest", self._single.state_dict())
            quantize_linears(self._single.blocks, linears)
            load_dit_weights(self._single, weights)
        self._single.to(device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, config.in_dim, 3, 6, 10, generator=generator).to(device)  # 45 tokens: few sizes divide them
        cond, uncond = torch.randn(2, 1, 7, config.text_dim, generator=generator).to(device)
        timestep, positions = torch.tensor([500], device=device), torch.tensor([-5, 0, 1], device=device)
        self._inputs = (x, timestep, cond, uncond, positions)
        self._expected = LocalGuidance().velocity(self._expert(self._single), *self._inputs)

    def error_of(self, session: Session, settings: ParallelSettings) -> float:
        """Return the largest error on this rank with tokens, guidance and weights split by the layout."""
        with torch.device("meta"):
            many = WanDiT(self.config, dtype=self._dtype)
        quantize_linears(many.blocks, self._linears)
        parallelize(many, session.mesh, settings)
        many.to_empty(device="cpu" if settings.weights in OFFLOADED else session.device)
        weights = self._single.state_dict()
        for name, parameter in many.named_parameters():
            part = local_part(name, parameter)
            part.tensor.copy_(weights[name][part.row_offset : part.row_offset + part.num_rows])
        placed, residency = place_experts(
            [("selftest", many)], device=session.device, weights=settings.weights, swap=False, may_swap=False
        )
        residency.activate("selftest")
        found = make_guidance(session.mesh).velocity(self._expert(placed["selftest"]), *self._inputs)
        residency.release()
        return distance(found, self._expected) / self._expected.abs().max().item()

    @staticmethod
    def _expert(module: nn.Module) -> Expert:
        return Expert(name="selftest", module=module, guidance_scale=3.5)


def vae_error(session: Session) -> float:
    """Return the larger error of encoding and decoding a clip over the replica, compared with one device."""
    torch.manual_seed(2)
    vae = WanVae(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).to(session.device))
    clip = torch.rand(3, 5, 32, 16 * session.layout.ranks_per_replica + 8, device=session.device) * 2 - 1
    latents = vae.encode(clip)
    pixels = vae.decode(latents)
    assert session.mesh.shard.group is not None
    parallelize_vae(vae, session.mesh.shard.group)
    encode_error = distance(vae.encode(clip), latents) / latents.abs().max().item()
    return max(encode_error, distance(vae.decode(latents), pixels) / pixels.abs().max().item())


def one_block(dim: int) -> DiTConfig:
    """Return one block of A14B, or of another width with heads of the same size."""
    full = WAN22_A14B.t2v
    return replace(
        full,
        num_layers=1,
        dim=dim,
        num_heads=dim // full.head_dim,
        ffn_dim=full.ffn_dim * dim // full.dim,
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference."""
    return (found.float() - expected.float()).abs().max().item()
