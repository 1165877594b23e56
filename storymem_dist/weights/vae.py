"""Loads the Wan2.1 VAE from a native or safetensors file or a diffusers folder. Knows nothing of clips or ranks."""

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.weights.loading import read_whole
from storymem_dist.weights.state_dict import assign_state_dict, check_no_keys
from storymem_dist.weights.tensor_files import open_vae_file, variant_of
from storymem_dist.weights.torch_file import is_safetensors, read_state_dict


def load_vae(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVae:
    """Load the VAE from the native ``Wan2.1_VAE.pth``, a safetensors file, or a diffusers ``vae/`` folder.

    Raises:
        WeightsNotFound: there is nothing at ``path``.
        CheckpointError: the file or folder is damaged or holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsNotFound(f"{path}: no VAE here; expected Wan2.1_VAE.pth or a diffusers vae folder")
    autoencoder = _from_diffusers_folder(path, dtype) if path.is_dir() else _from_file(path, dtype)
    return WanVae(autoencoder).to(device)


def _from_file(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    if is_safetensors(path):
        source = open_vae_file(path)
        keys = source.keys()
        native = {key: read_whole(source, key, torch.device("cpu"), dtype) for key in keys}
    else:
        native = read_state_dict(path)
    sized_by = ("encoder.conv1.weight", "conv2.weight")
    check_no_keys(f"{path}: not the Wan2.1 VAE; weights are missing", [key for key in sized_by if key not in native])
    base_dim, z_dim = (native[key].shape[0] for key in sized_by)
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(base_dim=base_dim, z_dim=z_dim)
    state = convert_wan_vae_to_diffusers({key: value.to(dtype) for key, value in native.items()})
    assign_state_dict(autoencoder, state, where=str(path))
    return autoencoder


def _from_diffusers_folder(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    try:
        autoencoder, report = AutoencoderKLWan.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, output_loading_info=True, variant=variant_of(path)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as a diffusers vae folder ({_first_line(error)})") from None
    check_no_keys(f"{path}: weights are missing", report["missing_keys"])
    check_no_keys(f"{path}: weights have no place in the model", report["unexpected_keys"])
    return autoencoder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
