"""The condition of a shot: mask and latents of the original, for every mode, and refused inputs."""

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import ConditionBuilder, cover_crop, prepare_image
from storymem_dist.diffusion.latent_cache import LatentCache, content_key
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.vae import WanVae
from tests.helpers.golden import load_golden
from tests.helpers.golden_models import golden_vae

TENSORS, MANIFEST = load_golden("memory_condition")
IMAGES = {key: value.movedim(-1, -3).contiguous() for key, value in TENSORS.items() if key.startswith("img.")}


class AveragingEncoder:
    """A fake VAE: a latent cell is the mean of its pixels, so that tests can read what was encoded."""

    def __init__(self) -> None:
        self.encoded_clips: list[Tensor] = []

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        self.encoded_clips.append(pixels_CFHW)
        _, frames, height, width = pixels_CFHW.shape
        cells = pixels_CFHW.mean(0).view(frames, height // 8, 8, width // 8, 8).mean((2, 4))
        latents = torch.stack([cells[0], *cells[1:].unflatten(0, (-1, 4)).mean(1)])
        return latents.expand(16, -1, -1, -1)

    def encode_image(self, pixels_CHW: Tensor) -> Tensor:
        return self.encode(pixels_CHW[:, None])


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVae:
    return golden_vae(tmp_path_factory.mktemp("vae"))


def grey(value: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def mode_of(case: dict) -> str:
    return "mi2v" if case["first_frame"] else "mm2v" if case["motion_frames"] else "m2v"


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["id"])
def test_mask_and_latents_are_the_originals(case: dict, vae: WanVae) -> None:
    num_latents, latent_height, latent_width, num_tokens, num_memory = TENSORS[f"case.{case['id']}.dims"].tolist()
    grid = LatentGrid(
        num_frames=case["frame_num"], height=8 * latent_height, width=8 * latent_width, num_memory=num_memory
    )
    condition = ConditionBuilder(vae, "cpu").build(
        mode_of(case),
        grid,
        [IMAGES[name] for name in case["memory"]],
        first_frame=IMAGES.get(case["first_frame"]),
        motion_frames=IMAGES.get(case["motion_frames"]),
        num_fixed=case["fix_mem"],
    )
    expected = TENSORS.get(f"case.{case['id']}.y_intended", TENSORS[f"case.{case['id']}.y"])
    assert (grid.num_latents, grid.num_tokens) == (num_latents, num_tokens)
    assert torch.equal(condition[:4], TENSORS[f"case.{case['id']}.msk"])
    torch.testing.assert_close(condition, expected, **MANIFEST["tolerance"]["y"])
    assert (condition - expected).norm() / expected.norm() < 1e-5


def test_images_are_resized_as_the_originals_and_overshoot() -> None:
    for key, name in (("case.mi2v.dbg.first_resized", "img.first"), ("case.m2v.dbg.memory_resized", "img.mem0")):
        expected = TENSORS[key] if TENSORS[key].ndim == 3 else TENSORS[key][0]
        resized = prepare_image(IMAGES[name], *expected.shape[1:])
        torch.testing.assert_close(resized, expected, atol=2e-6, rtol=0)
    assert max(TENSORS["case.m2v.dbg.memory_resized"].max(), prepare_image(IMAGES["img.mem0"], 32, 64).max()) > 1.0


def test_an_image_of_the_right_size_is_only_rescaled_in_value() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(prepare_image(image, 16, 16), image.float() / 255.0 * 2.0 - 1.0)


@pytest.mark.parametrize(
    ("mode", "given", "marked", "first_values"),
    [
        ("m2v", {}, 0, [0.0, 0.0, 0.0]),
        ("mi2v", {"first_frame": grey(255)}, 1, [1.0, 0.0, 0.0]),
        ("mm2v", {"motion_frames": torch.stack([grey(255)] * 5)}, 2, [1.0, 1.0, 0.0]),
    ],
)
def test_each_mode_marks_memory_and_what_it_was_given_and_shows_both(
    mode: str, given: dict, marked: int, first_values: list[float]
) -> None:
    grid = LatentGrid(num_frames=9, height=32, width=48, num_memory=2)
    condition = ConditionBuilder(AveragingEncoder(), "cpu").build(mode, grid, [grey(0), grey(255, 20, 70)], **given)
    assert condition.shape == (20, 5, 4, 6)
    assert (
        condition[:4].flatten(2).unique(dim=2).squeeze(2).tolist() == [[1.0] * (2 + marked) + [0.0] * (3 - marked)] * 4
    )
    torch.testing.assert_close(condition[4:, :, 0, 0], torch.tensor([-1.0, 1.0, *first_values]).expand(16, -1))


def test_motion_frames_of_another_size_are_brought_to_the_clips() -> None:
    grid = LatentGrid(num_frames=9, height=32, width=48)
    encoder = AveragingEncoder()
    frames = torch.stack([grey(value, 50, 60) for value in (0, 51, 102, 153, 204)])
    ConditionBuilder(encoder, "cpu").build("mm2v", grid, [], motion_frames=frames)
    (clip,) = encoder.encoded_clips
    expected = torch.tensor([-1.0, -0.6, -0.2, 0.2, 0.6, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(clip[0, :, 7, 7], expected)


def test_each_shot_encodes_only_what_is_new_to_the_replica() -> None:
    """A memory of four keyframes of which one changes per shot; the sizes of clips differ between stories."""
    encoder = AveragingEncoder()
    builder, grid = ConditionBuilder(encoder, "cpu"), LatentGrid(num_frames=9, height=32, width=48, num_memory=4)
    keyframes = [grey(10 * number) for number in range(8)]
    conditions, per_shot = [], []
    for first in (0, 1, 2, 2):
        before = len(encoder.encoded_clips)
        memory = [image.clone() for image in keyframes[first : first + 4]]
        conditions.append(builder.build("mi2v", grid, memory, first_frame=keyframes[first]))
        per_shot.append([len(clip[0]) for clip in encoder.encoded_clips[before:]])
    assert per_shot == [[9, 1, 1, 1, 1], [9, 1], [9, 1], []], "the last one is rendered again: nothing is new"
    fresh = ConditionBuilder(AveragingEncoder(), "cpu").build("mi2v", grid, keyframes[2:6], first_frame=keyframes[2])
    assert torch.equal(conditions[2], fresh) and torch.equal(conditions[3], fresh)
    smaller = LatentGrid(num_frames=9, height=16, width=48, num_memory=4)
    builder.build("m2v", smaller, keyframes[2:6])
    assert [tuple(clip.shape) for clip in encoder.encoded_clips[-5:]] == [(3, 9, 16, 48), *[(3, 1, 16, 48)] * 4]


def test_an_image_of_another_shape_or_content_is_another_one() -> None:
    image = torch.arange(3 * 8 * 12).view(3, 8, 12).to(torch.uint8)
    others = image.view(3, 12, 8), image.flip(2), image[None]
    assert content_key(image) == content_key(image.clone())
    assert len({content_key(image), *map(content_key, others)}) == 4


def test_latents_used_longest_ago_are_forgotten_first() -> None:
    cache, encoded = LatentCache(max_bytes=3 * 40), []

    def latents(name: str) -> Tensor:
        def encode() -> Tensor:
            encoded.append(name)
            return torch.full((10,), float(ord(name)))

        return cache.get(name, torch.device("cpu"), encode)

    for name in "abcadab":
        assert torch.equal(latents(name), torch.full((10,), float(ord(name))))
    assert "".join(encoded) == "abcdb"


def test_the_empty_clip_is_encoded_once_per_size() -> None:
    encoder = AveragingEncoder()
    builder = ConditionBuilder(encoder, "cpu")
    small, large = (LatentGrid(num_frames=5, height=size, width=32, num_memory=0) for size in (16, 32))
    first, _, again = (builder.build("m2v", grid, []) for grid in (small, large, small))
    assert [tuple(clip.shape) for clip in encoder.encoded_clips] == [(3, 5, 16, 32), (3, 5, 32, 32)]
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("mode", "given", "message"),
    [
        ("t2v", {}, "mode='t2v' is not allowed; use one of: m2v, mi2v, mm2v"),
        ("mi2v", {}, "mode mi2v with first_frame=None"),
        ("mm2v", {}, "mode mm2v with motion_frames=None"),
        ("m2v", {"first_frame": grey(0)}, "mode m2v with first_frame=given"),
        ("mm2v", {"motion_frames": torch.stack([grey(0)] * 4)}, "mode mm2v takes 5 frames .* given: 4"),
        ("mi2v", {"first_frame": grey(0).float()}, r"an image of torch.float32 and shape \[3, 32, 48\]"),
        ("mi2v", {"first_frame": grey(0)[0]}, r"an image of torch.uint8 and shape \[32, 48\]"),
    ],
)
def test_a_mode_that_does_not_fit_what_is_given_is_refused(mode: str, given: dict, message: str) -> None:
    grid = LatentGrid(num_frames=9, height=32, width=48)
    with pytest.raises(ConfigError, match=message):
        ConditionBuilder(AveragingEncoder(), "cpu").build(mode, grid, [], **given)


def test_memory_images_and_grid_must_agree() -> None:
    grid = LatentGrid(num_frames=9, height=32, width=48, num_memory=2)
    with pytest.raises(ConfigError, match="1 memory images for a grid of num_memory=2"):
        ConditionBuilder(AveragingEncoder(), "cpu").build("m2v", grid, [grey(0)])


def test_a_clip_no_longer_than_the_given_frames_is_refused() -> None:
    grid = LatentGrid(num_frames=5, height=32, width=48)
    with pytest.raises(ConfigError, match="num_frames=5 leaves nothing new in mode mm2v"):
        ConditionBuilder(AveragingEncoder(), "cpu").build("mm2v", grid, [], motion_frames=torch.stack([grey(0)] * 5))


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (32, 48), (20, 20), (33, 47)])
def test_cover_crop_fills_the_frame_with_the_middle_of_the_picture(height: int, width: int) -> None:
    """A picture whose brightness encodes each pixel's position, from 0 at the left and top to 250 at the other end."""
    rows = torch.linspace(0, 250, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 250, width).expand(height, width)
    cropped = cover_crop(torch.stack([rows, columns, rows]).round().to(torch.uint8), 32, 48)
    assert cropped.shape == (3, 32, 48)
    assert cropped.dtype == torch.uint8
    scale = max(32 / height, 48 / width)
    for channel, size, target in ((0, height, 32), (1, width, 48)):
        kept = target / (size * scale)
        line = cropped[channel, :, 0] if channel == 0 else cropped[channel, 0]
        assert abs(float(line[0]) - 125 * (1 - kept)) < 6
        assert abs(float(line[-1]) - 125 * (1 + kept)) < 6


def test_cover_crop_leaves_a_picture_of_the_right_size_alone() -> None:
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cover_crop(image, 32, 48), image)
