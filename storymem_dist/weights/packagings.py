"""Refuses packagings of Wan2.2's weights that are not read, in words: what was found, and the way out."""

from pathlib import Path

import torch

from storymem_dist.errors import CheckpointError
from storymem_dist.weights.loading import TensorSource
from storymem_dist.weights.safetensors_file import SafetensorsFile, refuse_other_formats

_COMFYUI_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def refuse_file(path: Path, fetch_command: str) -> None:
    """Raise ``CheckpointError`` if the weights of a base model are given as one file."""
    if path.is_file():
        refuse_other_formats(path)
        raise CheckpointError(
            f"{path}: a single file; here a base model is a folder with both experts, text encoder and VAE; get it "
            f"with: {fetch_command.replace(str(path), str(path.with_suffix('')))}"
        )


def refuse_folder(root: Path, fetch_command: str) -> None:
    """Raise ``CheckpointError`` if a folder holds whole transformers as single files, or GGUF files."""
    files = sorted(root.glob("*.safetensors"))
    what = "GGUF files, whose quantized tensors cannot be read here" if any(root.glob("*.gguf")) else None
    if files and any(key.endswith("patch_embedding.weight") for key in SafetensorsFile(files[0])):
        what = f"transformers as single files, as ComfyUI has them ({', '.join(file.name for file in files[:2])})"
    if what:
        raise CheckpointError(
            f"{root}: {what}; here each expert is a folder (high_noise_model/, low_noise_model/) next to text encoder "
            f"and VAE; get them with: {fetch_command}"
        )


def refuse_tensors(source: TensorSource, fetch_command: str) -> None:
    """Raise ``CheckpointError`` if an expert's file has ComfyUI's prefixes, or is an 8-bit file of another program."""
    keys = source.keys()
    if prefix := next((one for one in _COMFYUI_PREFIXES if any(key.startswith(one) for key in keys)), None):
        raise CheckpointError(
            f"{source.name}: a file for ComfyUI: its keys begin with {prefix!r}, which is not read here; get the "
            f"original files with: {fetch_command}"
        )
    for key in keys:
        if source.dtype(key) in _EIGHT_BITS:
            scales = "with" if any("scale" in other.rpartition(".")[2] for other in keys) else "without"
            raise CheckpointError(
                f"{source.name}: an 8-bit file {scales} scales ({key} is {str(source.dtype(key))[6:]}), which is not "
                f"read here; get the original files with: {fetch_command} (storymem-weights prepare --dtype float8 "
                "makes 8-bit ones of them)"
            )


def refuse_part(path: Path, fetch_command: str) -> None:
    """Raise ``CheckpointError`` if a text encoder or VAE is there in another format only."""
    others = [other for suffix in (".safetensors", ".gguf") if (other := path.with_suffix(suffix)).is_file()]
    if path.suffix == ".pth" and others:
        raise CheckpointError(
            f"{others[0]}: this part is read from {path.name} only, not from {others[0].suffix}; get it with: "
            f"{fetch_command}"
        )
