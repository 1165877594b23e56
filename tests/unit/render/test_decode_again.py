"""A decode that runs out of memory: alone, it frees the experts and decodes again; with other ranks, it is resumed."""

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, StepInfo
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.render.clip import ClipRequest, ClipSampler
from tests.helpers.tiny_dit import CONFIG, make_dit

SMALL = SamplerSettings(height=16, width=16, num_frames=5, num_inference_steps=4, solver="euler")


class Watched:
    """A residency that notes when the experts' memory is freed."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def activate(self, name: str) -> None:
        pass

    def end_shot(self) -> None:
        self._calls.append("end_shot")

    def idle(self) -> None:
        self._calls.append("idle")

    def release(self) -> None:
        pass


class ShortOfMemory:
    """A VAE that runs out of memory in its first decodes."""

    def __init__(self, calls: list[str], num_failures: int) -> None:
        self._calls, self._num_failures = calls, num_failures

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        self._calls.append("decode")
        if self._calls.count("decode") <= self._num_failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return latents_CTHW

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        raise AssertionError("text to video encodes nothing")

    encode_image = encode


class Shot:
    """One shot of T2V on random experts."""

    def __init__(self, num_failures: int, *, is_alone: bool) -> None:
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.checkpoints: list[DenoiseState] = []
        self._sampler = ClipSampler(
            load_experts=self._load,
            guidance=LocalGuidance(),
            vae=ShortOfMemory(self.calls, num_failures),
            device="cpu",
            is_alone=is_alone,
        )

    def _load(self, kind: str) -> ExpertPair:
        dit = make_dit()
        return ExpertPair(
            high_noise=dit,
            low_noise=dit,
            boundary_ratio=0.9,
            guidance_scale_high=1.0,
            guidance_scale_low=1.0,
            residency=Watched(self.calls),
        )

    def sample(self, resume: DenoiseState | None = None, *, low_memory: bool = False) -> Tensor:
        prompt = torch.randn(3, CONFIG.text_dim, generator=torch.Generator().manual_seed(1))
        request = ClipRequest(
            mode="t2v",
            prompt=PromptEmbeds(prompt_LE=prompt, negative_LE=prompt),
            seed=7,
            sampler=SMALL,
            fingerprint="f",
        )

        def note(info: StepInfo) -> None:
            self.steps.append(info.step)

        return self._sampler.sample(
            request,
            resume=resume,
            on_step=note,
            checkpoint_every_steps=3,
            on_checkpoint=self.checkpoints.append,
            low_memory=low_memory,
        )


def test_alone_it_frees_the_experts_and_decodes_again_without_another_step() -> None:
    shot = Shot(1, is_alone=True)
    again = shot.sample()
    assert shot.calls == ["end_shot", "decode", "idle", "decode"]
    assert shot.steps == [1, 2, 3, 4]
    assert torch.equal(again, Shot(0, is_alone=True).sample())
    assert [state.step for state in shot.checkpoints] == [3], "no checkpoint that nobody needs"


def test_the_second_failure_is_reported() -> None:
    shot = Shot(2, is_alone=True)
    with pytest.raises(torch.OutOfMemoryError):
        shot.sample()
    assert shot.calls == ["end_shot", "decode", "idle", "decode"]


def test_with_other_ranks_the_restart_repeats_the_decode_and_no_step() -> None:
    shot = Shot(1, is_alone=False)
    with pytest.raises(torch.OutOfMemoryError):
        shot.sample()
    assert shot.calls == ["end_shot", "decode"], "no rank goes on alone"
    assert [state.step for state in shot.checkpoints] == [3, 4]
    restarted = Shot(0, is_alone=False)
    pixels = restarted.sample(shot.checkpoints[-1], low_memory=True)
    assert restarted.steps == []
    assert restarted.calls[-1] == "decode"
    assert restarted.calls.count("idle") == 2, "nothing but the VAE is on the device"
    assert torch.equal(pixels, Shot(0, is_alone=True).sample())
