"""Reads files that ``torch.save`` wrote, without running code in them, and tells them from safetensors files."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.weights.safetensors_file import refuse_other_formats


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.pth`` file that holds a plain dictionary of tensors. Code in the file is never run (``weights_only``).

    Tensors stay in the file until they are touched, where the file's format allows it.

    Raises:
        CheckpointError: the file is damaged, or holds anything but named tensors.
    """
    path = Path(path)
    loaded = read_torch(path)
    if isinstance(loaded, dict) and set(loaded) == {"state_dict"}:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: not a state dict (a {type(loaded).__name__} without named tensors)")
    return loaded


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors (as of ``read_state_dict``) in plain containers, with plain values.

    Raises:
        CheckpointError: the file is damaged, of another format, or holds objects whose unpickling could run code.
    """
    refuse_other_formats(path)
    try:
        if path.suffix == ".safetensors":  # torch would choose another reader by the name
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged files; none of its advice fits here
        global_name = re.search(r"GLOBAL (\S+)", str(error))
        if global_name or "weights_only" in str(error):
            what = f", such as {global_name[1]}" if global_name else ""
            problem = f"holds Python objects{what}, which could run code while they are read, so it is not read"
        else:
            problem = f"damaged, or not a file that torch.save wrote ({type(error).__name__})"
        raise CheckpointError(
            f"{path}: cannot be read as a state dict: {problem}; allowed: a .safetensors file, or a .pth file with "
            "nothing but named tensors, as torch.save writes it"
        ) from None


def is_safetensors(path: Path) -> bool:
    """Whether a file's content is safetensors, whatever its suffix; what is neither that nor torch's goes by suffix.

    Raises:
        CheckpointError: it is a file of another known format.
    """
    refuse_other_formats(path)
    with path.open("rb") as file:
        start = file.read(9)
    is_torch = start.startswith((b"PK\x03\x04", b"\x80\x02\x8a"))
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not is_torch)
