"""CLIP, HSV, HPSv3 and sharpness: what they measure, and their messages when weights or packages are missing."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.memory.scorers import (
    ClipSimilarity,
    HsvSimilarity,
    NoQuality,
    SharpnessQuality,
    build_quality,
    build_similarity,
    clip_pixels,
    rgb_to_hsv,
)
from storymem_dist.memory.settings import MemorySettings

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# HSV


def test_hsv_equals_opencv_in_every_bit() -> None:
    """The digest is that of OpenCV 5.0.0's ``cv2.cvtColor(..., COLOR_RGB2HSV)`` over a grid of 52^3 colours."""
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    grid = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 1, -1)
    hsv = rgb_to_hsv(grid)[0].permute(1, 2, 0).contiguous()
    assert hashlib.sha256(hsv.numpy().tobytes()).hexdigest() == (
        "17d015b0e2005a2548a0746373ffc8e075495af198fd224e1f9636be91ad2e3f"
    )


def test_hsv_similarity_is_the_share_of_alike_patches() -> None:
    frame = noise(3, 56, 84)
    changed = frame.clone()
    frame[:, :28, :28] = 255  # one of six patches is white
    changed[:2, :28, :28] = 0
    changed[2, :28, :28] = 255  # and turns blue: cosine 0.67 between (0, 0, 255) and (120, 255, 255)
    similarity = HsvSimilarity()
    one, other = similarity.describe(torch.stack([frame, changed]))
    both = similarity.compare(one, torch.stack([one, other]))
    assert both.tolist() == pytest.approx([1.0, 5 / 6])


def test_hsv_leaves_out_patches_that_are_black_in_both_frames() -> None:
    black = torch.zeros(1, 3, 28, 56, dtype=torch.uint8)
    half = black.clone()
    half[..., 28:] = 200
    similarity = HsvSimilarity()
    (black_features,), (half_features,) = similarity.describe(black), similarity.describe(half)
    assert similarity.compare(half_features, half_features[None]).item() == 1.0
    assert similarity.compare(half_features, black_features[None]).item() == 0.0
    assert similarity.compare(black_features, black_features[None]).isnan().all()


def test_hsv_resizes_frames_that_28_does_not_divide() -> None:
    assert HsvSimilarity().describe(noise(1, 3, 480, 832)).shape == (1, 12 * 21, 3 * 28 * 28)
    assert HsvSimilarity().describe(noise(1, 3, 56, 84)).shape == (1, 2 * 3, 3 * 28 * 28)


# CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete, tiny, random CLIP model."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=small | {"image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_embeddings_are_transformers_image_features(clip_folder: Path) -> None:
    frames = noise(3, 3, 40, 60)
    features = build_similarity(MemorySettings(clip_model=str(clip_folder)), CPU).describe(frames)
    with torch.no_grad():
        output = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=clip_pixels(frames))
    expected = getattr(output, "pooler_output", output)
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=-1), atol=1e-6, rtol=0)


def test_clip_compares_by_cosine_and_does_not_depend_on_the_batch(clip_folder: Path) -> None:
    similarity = ClipSimilarity.from_pretrained(str(clip_folder), CPU)
    frames = noise(40, 3, 28, 28)
    features = similarity.describe(frames)
    alone = similarity.describe(frames[39:])
    torch.testing.assert_close(features[39:], alone, atol=1e-6, rtol=0)
    scores = similarity.compare(features[0], features)
    assert scores[0].item() == pytest.approx(1.0, abs=1e-6)
    assert (scores[1:] < 1.0 - 1e-6).all()


@pytest.mark.parametrize("where", ["no/such/folder", "openai/clip-not-in-the-cache", ""])
def test_missing_clip_weights_say_what_to_download(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsNotFound) as caught:
        build_similarity(MemorySettings(clip_model=where), CPU)
    message = str(caught.value)
    assert message.startswith(f"memory.clip_model={where!r}: no CLIP model there (")
    assert "run: hf download openai/clip-vit-base-patch32 (or use memory.similarity=hsv" in message


def test_damaged_clip_weights_are_named(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    whole = (clip_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError) as caught:
        build_similarity(MemorySettings(clip_model=str(tmp_path)), CPU)
    assert str(caught.value).startswith(f"memory.clip_model='{tmp_path}' cannot be loaded (")
    assert "run: hf download --force-download openai/clip-vit-base-patch32" in str(caught.value)


def test_clip_weights_with_a_layer_missing_are_refused_instead_of_filled_with_noise(
    clip_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    tensors = load_file(clip_folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first visual_projection\.weight"):
        build_similarity(MemorySettings(clip_model=str(tmp_path)), CPU)


# Quality


def no_hpsv3(memory: MemorySettings) -> Callable[[torch.Tensor], list[float]]:
    raise AssertionError("it is not asked for")


def test_sharpness_ranks_detail_above_blur_and_fades_lowest() -> None:
    sharp = noise(3, 84, 84)
    blurred = torch.nn.functional.avg_pool2d(sharp.float(), 5, stride=1, padding=2).to(torch.uint8)
    quality = SharpnessQuality()
    assert quality.score(sharp) > quality.score(blurred) > quality.threshold
    assert quality.score(torch.full((3, 84, 84), 128, dtype=torch.uint8)) < 1e-3
    assert quality.score(sharp // 32) == 0.0, "faded to black"
    assert quality.score(255 - sharp // 32) == 0.0, "faded to white"


def test_sharpness_is_the_variance_of_the_laplacian_of_the_luma() -> None:
    spike = torch.full((3, 5, 5), 100, dtype=torch.uint8)
    spike[:, 2, 2] = 110  # Laplacian of the 3 x 3 interior: -40 in the middle, 10 on its four neighbours, 0 elsewhere
    assert SharpnessQuality().score(spike) == pytest.approx((1600 + 4 * 100) / 9, rel=1e-4)


def test_quality_none_passes_everything() -> None:
    quality = build_quality(MemorySettings(quality="none"), no_hpsv3)
    assert isinstance(quality, NoQuality)
    assert quality.scores(noise(2, 3, 8, 8)) == [0.0, 0.0]
    assert quality.threshold < 0


def test_the_threshold_of_a_quality_can_be_set_and_has_a_default() -> None:
    assert build_quality(MemorySettings(quality="sharpness"), no_hpsv3).threshold == 5.0
    assert build_quality(MemorySettings(quality="sharpness", quality_threshold=0.0), no_hpsv3).threshold == 0.0


def test_hpsv3_scores_frames_together_by_what_was_loaded_for_its_settings() -> None:
    asked: list[MemorySettings] = []

    def load(memory: MemorySettings) -> Callable[[torch.Tensor], list[float]]:
        asked.append(memory)
        return lambda frames_NCHW: frames_NCHW.double().mean((1, 2, 3)).tolist()

    settings = MemorySettings(quality="hpsv3")
    quality = build_quality(settings, load)
    assert (asked, quality.name, quality.threshold) == ([settings], "hpsv3", 3.0)
    assert quality.at_once > 1
    frames = torch.stack([torch.full((3, 4, 6), value, dtype=torch.uint8) for value in (7, 2)])
    assert quality.scores(frames) == [7.0, 2.0]
