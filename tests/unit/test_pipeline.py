from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import storymem_dist
from storymem_dist import (
    StoryMemPipeline,
    WeightsNotFound,
    comfyui_to_storymem,
    is_storymem_available,
    storymem_to_comfyui,
)
from storymem_dist.errors import ConfigError
from storymem_dist.parallel import weight_memory
from storymem_dist.pipeline import to_image_tensor
from storymem_dist.render import build
from storymem_dist.resources import packed_weights
from storymem_dist.weights.packed import unpack_once
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint

SMALL = {"num_frames": 9, "height": 32, "width": 48, "steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pipeline(tiny: ModelFolders):
    with StoryMemPipeline(str(tiny.t2v_dir), str(tiny.i2v_dir), str(tiny.lora_dir), device="cpu", dtype="float32") as p:
        yield p


def random_images(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, 32, 48), generator=generator, dtype=torch.uint8))


def test_every_mode_gives_a_video_of_the_asked_size_in_minus_one_to_one(pipeline: StoryMemPipeline) -> None:
    memory, frames = random_images(2), random_images(5, seed=1)
    videos = {
        "t2v": pipeline.generate_t2v("a fox", **SMALL),
        "m2v": pipeline.generate_m2v("a fox", memory, **SMALL),
        "mi2v": pipeline.generate_mi2v("a fox", memory, frames[-1], **SMALL),
        "mm2v": pipeline.generate_mm2v("a fox", memory, frames, **SMALL),
    }
    for mode, video in videos.items():
        assert video.shape == (1, 3, 9, 32, 48), mode
        assert video.dtype == torch.float32
        assert video.min() >= -1 and video.max() <= 1
        assert video.std() > 0.01, f"{mode} is a flat picture"
    flat = [video.flatten() for video in videos.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i]), "modes must differ"


@pytest.mark.parametrize("linears", ["float8", "int8"])
def test_layers_in_eight_bits_change_a_video_a_little(
    pipeline: StoryMemPipeline, tiny: ModelFolders, linears: str
) -> None:
    memory = random_images(2)
    exact = pipeline.generate_m2v("a fox", memory, **SMALL)
    paths = (str(tiny.t2v_dir), str(tiny.i2v_dir), str(tiny.lora_dir))
    with StoryMemPipeline(*paths, device="cpu", dtype="float32", linears=linears) as other:
        video = other.generate_m2v("a fox", memory, **SMALL)
    assert 0 < (video - exact).abs().mean() < 0.05  # measured: 0.025 and 0.008; two seeds are 0.46 apart


def test_layers_that_the_device_cannot_multiply_are_refused_before_weights_are_read(
    tiny: ModelFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("not on this card")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuse)
    monkeypatch.setattr(build, "load_vae", lambda *_: pytest.fail("weights were read"))
    with (
        StoryMemPipeline(str(tiny.t2v_dir), None, device="cpu", linears="float8") as pipeline,
        pytest.raises(ConfigError, match=r"model.linears=float8: .*\(not on this card\); use model.linears=int8"),
    ):
        pipeline.generate_t2v("a fox", **SMALL)


def test_experts_that_fit_no_memory_are_refused_before_weights_are_read(
    tiny: ModelFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_memory, "host_memory_bytes", lambda: 2**16)
    monkeypatch.setattr(build, "load_vae", lambda *_: pytest.fail("weights were read"))
    with (
        StoryMemPipeline(str(tiny.t2v_dir), None, device="cpu") as pipeline,
        pytest.raises(ConfigError, match="of host memory for the weights of 1 rank on this node"),
    ):
        pipeline.generate_t2v("a fox", **SMALL)


def test_the_same_seed_repeats_and_another_seed_or_prompt_or_memory_does_not(pipeline: StoryMemPipeline) -> None:
    memory = random_images(2)
    first = pipeline.generate_m2v("a fox", memory, seed=3, **SMALL)
    assert torch.equal(first, pipeline.generate_m2v("a fox", memory, seed=3, **SMALL))
    assert not torch.equal(first, pipeline.generate_m2v("a fox", memory, seed=4, **SMALL))
    assert not torch.equal(first, pipeline.generate_m2v("a crow", memory, seed=3, **SMALL))
    assert not torch.equal(first, pipeline.generate_m2v("a fox", memory[:1], seed=3, **SMALL))


def test_portrait_sizes_and_two_guidance_scales_are_allowed(pipeline: StoryMemPipeline) -> None:
    video = pipeline.generate_t2v("a fox", num_frames=5, height=48, width=32, steps=2, cfg_scale=(3.0, 4.0))
    assert video.shape == (1, 3, 5, 48, 32)


def test_guidance_one_ignores_the_negative_prompt(pipeline: StoryMemPipeline) -> None:
    one = pipeline.generate_t2v("a fox", cfg_scale=1.0, negative_prompt="bad", **SMALL)
    other = pipeline.generate_t2v("a fox", cfg_scale=1.0, negative_prompt="worse", **SMALL)
    assert torch.equal(one, other)
    guided = [pipeline.generate_t2v("a fox", negative_prompt=text, **SMALL) for text in ("bad", "worse")]
    assert not torch.equal(*guided)


def test_a_model_in_one_file_is_known_by_its_name_and_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path))
    of_the_package = packed_weights("nano.safetensors")
    folders = unpack_once(of_the_package, None, tmp_path)
    paths = str(folders.t2v_dir), str(folders.i2v_dir), str(folders.lora_dir)
    prompt = "A red ball rolls through a meadow."
    with StoryMemPipeline(*paths, device="cpu", dtype="float32") as pipeline:
        expected = pipeline.generate_t2v(prompt, **SMALL)
    for name in ("nano", str(of_the_package)):
        assert is_storymem_available(packed=name)
        with StoryMemPipeline.from_packed(name, device="cpu") as pipeline:
            assert torch.equal(pipeline.generate_t2v(prompt, **SMALL), expected)


def test_a_pipeline_renders_again_after_unloading(tiny: ModelFolders) -> None:
    pipeline = StoryMemPipeline(str(tiny.t2v_dir), None, device="cpu", dtype="float32", enable_offload=False)
    first = pipeline.generate_t2v("a fox", **SMALL)
    pipeline.unload_models()
    assert torch.equal(first, pipeline.generate_t2v("a fox", **SMALL))
    pipeline.unload_models()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate_t2v("x", num_frames=10), "num_frames=10 is not allowed; it must be 4n+1"),
        (lambda p: p.generate_t2v("x", height=50), "height=50 is not allowed; it must be a multiple of 16"),
        (lambda p: p.generate_t2v("x", seed=-1), "seed=-1 is not allowed"),
        (lambda p: p.generate_mm2v("x", [], random_images(4)), "motion_frames has 4 frames; generate_mm2v takes 5"),
        (lambda p: p.generate_m2v("x", random_images(11)), "memory_frames has 11 images; at most 10"),
        (lambda p: p.generate_mi2v("x", [], torch.zeros(4, 8, 8)), "an image is a Tensor of shape [4, 8, 8]"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        call(StoryMemPipeline(str(tmp_path), str(tmp_path), str(tmp_path)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("no/such/t2v", None), r"no/such/t2v is not a folder.*hf download Wan-AI/Wan2\.2-T2V-A14B --local-dir no"),
        ((None, "no/such/i2v"), r"no/such/i2v is not a folder.*hf download Wan-AI/Wan2\.2-I2V-A14B"),
        ((None, None, "no/such/lora"), r"no/such/lora: not a folder.*hf download Kevin-thu/StoryMem"),
    ],
)
def test_a_missing_folder_is_reported_when_the_pipeline_is_made(paths: tuple, message: str) -> None:
    with pytest.raises(WeightsNotFound, match=message):
        StoryMemPipeline(*paths)


def test_missing_weights_name_what_to_download_and_the_command(tmp_path: Path) -> None:
    pipeline = StoryMemPipeline(str(tmp_path), None)  # the folder is there, its contents are read with the first clip
    with pytest.raises(WeightsNotFound, match=rf"hf download Wan-AI/Wan2\.2-T2V-A14B --local-dir {tmp_path}"):
        pipeline.generate_t2v("a fox", **SMALL)
    with pytest.raises(WeightsNotFound, match=r"model\.i2v_checkpoint is not set.*hf download"):
        pipeline.generate_m2v("a fox", [], **SMALL)


def test_memory_modes_without_the_storymem_lora_are_refused(tiny: ModelFolders) -> None:
    with pytest.raises(WeightsNotFound, match="hf download Kevin-thu/StoryMem"):
        StoryMemPipeline(None, str(tiny.i2v_dir)).generate_m2v("a fox", [], **SMALL)


def test_availability_lists_everything_that_is_missing(tiny: ModelFolders) -> None:
    assert is_storymem_available(str(tiny.t2v_dir), str(tiny.i2v_dir), str(tiny.lora_dir))
    found = is_storymem_available(str(tiny.t2v_dir), "nowhere", None)
    assert not found
    assert len(found.missing) == 1 and "nowhere" in found.missing[0]
    without_lora = is_storymem_available(str(tiny.t2v_dir), str(tiny.i2v_dir), "nowhere")
    assert ["MI2V" in without_lora.missing[0], "MM2V" in without_lora.missing[1]] == [True, True]


def test_comfyui_conversion_goes_there_and_back() -> None:
    video = torch.rand(2, 3, 5, 8, 6) * 2 - 1
    images = storymem_to_comfyui(video)
    assert images.shape == (2, 5, 8, 6, 3)
    assert images[1, 4, 7, 5, 2] == pytest.approx(float(video[1, 2, 4, 7, 5] + 1) / 2, abs=1e-6)
    torch.testing.assert_close(comfyui_to_storymem(images), video, atol=1e-6, rtol=0)
    assert comfyui_to_storymem(torch.full((1, 1, 2, 2, 3), 9.0)).max() == 1


@pytest.mark.parametrize("convert", [storymem_to_comfyui, comfyui_to_storymem])
def test_comfyui_conversion_refuses_other_layouts(convert) -> None:
    with pytest.raises(ConfigError, match=r"a video of shape \[2, 4, 5, 8, 6\] was given; allowed"):
        convert(torch.zeros(2, 4, 5, 8, 6))


def test_images_of_every_kind_mean_the_same() -> None:
    image_CHW = random_images(1)[0]
    array_HWC = image_CHW.permute(1, 2, 0).numpy()
    for image in (image_CHW, array_HWC, Image.fromarray(np.ascontiguousarray(array_HWC)), image_CHW / 127.5 - 1):
        assert torch.equal(to_image_tensor(image), image_CHW)


def test_the_package_offers_its_names_and_no_others() -> None:
    for name in storymem_dist.__all__:
        assert getattr(storymem_dist, name) is not None
    with pytest.raises(AttributeError):
        _ = storymem_dist.no_such_name
