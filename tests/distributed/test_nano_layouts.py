"""A memory shot of the trained nano model has the same latents in every layout as on one rank, all steps included."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.build import Engine
from storymem_dist.render.clip import ClipRequest
from storymem_dist.resources import packed_weights
from storymem_dist.weights.bundle import open_weights
from storymem_dist.weights.packed import unpack_once
from storymem_dist.weights.settings import ModelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import largest_error
from tools.nano import world

TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "ulysses2": (2, {"ulysses": 2}),
    "ring2": (2, {"ring": 2}),
    "cfg2": (2, {"cfg": 2}),
    "fsdp2": (2, {"ulysses": 2, "weights": "fsdp"}),
    "usp4": (4, {"ring": 2, "ulysses": 2}),
}


class KeepsLatents:
    """A VAE whose decoder returns the latents, so that they are what is compared."""

    def __init__(self, vae: object) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> object:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def _render(root: str, layout: dict[str, object]) -> Tensor:
    torch.set_num_threads(1)
    folders = unpack_once(packed_weights("nano.safetensors"), None, Path(root))
    model = ModelSettings(
        t2v_checkpoint=str(folders.t2v_dir),
        i2v_checkpoint=str(folders.i2v_dir),
        storymem_lora=str(folders.lora_dir),
        dtype="float32",
        text_encoder_dtype="float32",
    )
    sampler = SamplerSettings(
        num_frames=world.FRAMES,
        height=world.HEIGHT,
        width=world.WIDTH,
        num_inference_steps=16,
        guidance_scale_high=2.0,
        guidance_scale_low=2.0,
    )
    pixels, _ = world.render(world.sample_clips(1, torch.Generator().manual_seed(3)))
    images = [((pixels[0, :, frame] + 1) * 127.5).byte() for frame in (0, 8, 16)]
    engine = Engine.start(
        model, open_weights(model, ["m2v"], "mi2v"), ParallelSettings(device="cpu", **layout), sampler
    )
    try:
        prompts = ["The character jumps by the sea.", sampler.negative_prompt]
        embeds = engine.encode_texts(prompts)
        prompt = PromptEmbeds(prompt_LE=embeds[prompts[0]], negative_LE=embeds[prompts[1]])
        engine.clips._vae = KeepsLatents(engine.clips._vae)  # type: ignore[assignment]
        request = ClipRequest(mode="m2v", prompt=prompt, seed=4, sampler=sampler, memory_images=images)
        return engine.clips.sample(request)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_rank(root: str) -> Tensor:
    latents = _render(root, {})
    assert latents.shape == (16, 5, 8, 12) and 0.3 < latents.std() < 3
    return latents


@pytest.mark.parametrize("name", LAYOUTS)
def test_latents_equal_those_of_one_rank(root: str, one_rank: Tensor, name: str) -> None:
    num_ranks, layout = LAYOUTS[name]
    for rank, latents in enumerate(run_ranks(_render, num_ranks, (root, layout), timeout_seconds=200)):
        assert largest_error(latents, one_rank) <= TOLERANCE, f"rank {rank}: {largest_error(latents, one_rank):.1e}"
