"""The VAE wrapper reproduces the original's latents and pixels, from both layouts, and rejects what is not a VAE."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.wan.vae import WanVae, order_channels_last
from storymem_dist.weights.vae import load_vae
from tests.helpers.golden import load_golden, strip_prefix


@pytest.fixture(scope="module")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save(strip_prefix(load_golden("vae")[0], "w."), path)
    return path


@pytest.fixture(scope="module")
def vae(native_file: Path) -> WanVae:
    return load_vae(native_file)


@pytest.mark.parametrize("case", ["t1", "t5", "t9"])
def test_latents_and_clamped_pixels_of_a_clip_equal_the_original(vae: WanVae, case: str) -> None:
    tensors, manifest = load_golden("vae")
    for clip, latents, pixels in zip(*(tensors[f"{kind}.{case}"] for kind in ("clip", "enc", "dec")), strict=True):
        torch.testing.assert_close(vae.encode(clip), latents, **manifest["tolerance"]["enc"])
        torch.testing.assert_close(vae.decode(latents), pixels.clamp(-1, 1), **manifest["tolerance"]["dec"])


def test_random_latents_decode_to_the_original_pixels(vae: WanVae) -> None:
    tensors, manifest = load_golden("vae")
    pixels = vae.decode(tensors["latent.z3"][0])
    torch.testing.assert_close(pixels, tensors["dec.z3"][0].clamp(-1, 1), **manifest["tolerance"]["dec"])


def test_an_image_is_encoded_as_a_clip_of_one_frame(vae: WanVae) -> None:
    tensors, manifest = load_golden("vae")
    latents = vae.encode_image(tensors["clip.t1"][1, :, 0])
    torch.testing.assert_close(latents, tensors["enc.t1"][1], **manifest["tolerance"]["enc"])


def test_normalization_uses_the_published_constants(vae: WanVae) -> None:
    tensors, _ = load_golden("vae")
    config = vae.autoencoder.config
    assert torch.equal(torch.tensor(config.latents_mean), tensors["scale.mean"])
    assert torch.equal(torch.tensor(config.latents_std), tensors["scale.std"])


def test_the_diffusers_folder_gives_the_same_latents_as_the_native_file(vae: WanVae, tmp_path: Path) -> None:
    vae.autoencoder.save_pretrained(tmp_path / "vae")
    clip = load_golden("vae")[0]["clip.t5"][0]
    assert torch.equal(load_vae(tmp_path / "vae").encode(clip), vae.encode(clip))


def test_the_size_of_the_model_is_read_off_the_weights(tmp_path: Path) -> None:
    tensors = strip_prefix(load_golden("vae")[0], "w.")
    wider: dict[str, Tensor] = {}
    reference = AutoencoderKLWan(base_dim=8)
    assert tensors["encoder.conv1.weight"].shape[0] != 8
    native_of = {new: old for old, new in zip(tensors, _diffusers_keys(tensors), strict=True)}
    for key, value in reference.state_dict().items():
        wider[native_of[key]] = value
    torch.save(wider, tmp_path / "wide.pth")
    loaded = load_vae(tmp_path / "wide.pth")
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.autoencoder.state_dict()[key], value), key


def _diffusers_keys(native: dict[str, Tensor]) -> list[str]:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return list(convert_wan_vae_to_diffusers(dict(native)))


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (3, 5, 12, 16), (3, 5, 16, 20), (4, 5, 16, 16)])
def test_a_clip_of_a_size_the_strides_do_not_divide_is_refused(vae: WanVae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4n\\+1"):
        vae.encode(torch.zeros(shape))


def test_a_path_without_anything_names_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"Wan2\.1_VAE\.pth or a diffusers vae folder"):
        load_vae(tmp_path / "Wan2.1_VAE.pth")


def test_a_truncated_file_is_refused_by_name(native_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(native_file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        load_vae(cut)


def test_a_state_dict_of_another_model_is_refused_with_its_missing_keys(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"not the Wan2\.1 VAE; weights are missing: conv2\.weight, encoder\.conv1"
    ):
        load_vae(tmp_path / "other.pth")


def test_missing_leftover_and_misshapen_weights_are_named(native_file: Path, tmp_path: Path) -> None:
    native = torch.load(native_file, weights_only=True)
    key = "decoder.head.2.weight"
    for change, message in (
        ({k: v for k, v in native.items() if k != key}, r"missing: decoder\.conv_out\.weight"),
        (native | {"extra.bias": torch.zeros(1)}, r"no place in the model: extra\.bias"),
        (native | {key: native[key][:1]}, r"decoder\.conv_out\.weight has shape \[1, "),
    ):
        torch.save(change, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            load_vae(tmp_path / "bad.pth")


def test_a_folder_that_is_no_diffusers_vae_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a diffusers vae folder"):
        load_vae(tmp_path)


def test_a_diffusers_folder_with_weights_missing_is_refused(vae: WanVae, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    vae.autoencoder.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["quant_conv.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: quant_conv\.bias"):
        load_vae(tmp_path / "vae")


def test_bf16_computes_with_channels_last_and_stays_near(vae: WanVae, native_file: Path) -> None:
    """Shapes, fp32 results and the order in memory; errors are those of 8-bit mantissas through the whole network."""
    half = load_vae(native_file, dtype=torch.bfloat16)
    weights = [one for one in half.autoencoder.parameters() if one.ndim in (4, 5)]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert all(one.is_contiguous(memory_format=formats[one.ndim]) for one in weights)
    clip = load_golden("vae")[0]["clip.t1"][1][:, :, :16, :16]
    latents = vae.encode(clip)
    for found, expected in ((half.encode(clip), latents), (half.decode(latents), vae.decode(latents))):
        assert (found.dtype, found.shape) == (torch.float32, expected.shape)
        assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_channels_last_changes_no_number_but_by_rounding(vae: WanVae, native_file: Path) -> None:
    ordered = load_vae(native_file)
    order_channels_last(ordered.autoencoder)
    clip = load_golden("vae")[0]["clip.t5"][0]
    torch.testing.assert_close(ordered.encode(clip), vae.encode(clip), rtol=1e-4, atol=1e-5)


def test_a_pass_that_fails_leaves_nothing_in_the_caches(vae: WanVae, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    latents = torch.zeros(16, 2, 2, 2)
    expected = vae.decode(latents)
    with monkeypatch.context() as patched:
        patched.setattr(vae.autoencoder.decoder.conv_out, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            vae.decode(latents)
    assert vae.autoencoder._feat_map.count(None) == len(vae.autoencoder._feat_map)
    assert torch.equal(vae.decode(latents), expected)
