"""Finds and checks what a base model has besides its experts: VAE, text encoder and tokenizer. Loads nothing."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.weights.single_files import (
    TEXT_ENCODER,
    VAE,
    CheckpointFiles,
    FoundFiles,
    find_files,
    is_tokenizer,
    look_into,
)
from storymem_dist.weights.tensor_files import sharded_files
from storymem_dist.weights.torch_file import is_safetensors

PARTS = ("vae", "text_encoder", "tokenizer")
_ROLES = {"vae": VAE, "text_encoder": TEXT_ENCODER}
_PUBLISHED = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5*", "tokenizer": "google/*"}
_ZIP_MAGIC = b"PK"


def find_parts(root: Path, usual: Mapping[str, str], given: CheckpointFiles, fetch_command: str) -> dict[str, Path]:
    """The path of each of ``PARTS``.

    Args:
        root: the folder of the base model.
        usual: where its layout keeps them, by part, relative to ``root``; empty if it has no such places.
        given: paths that come before those.
        fetch_command: for messages.

    Raises:
        WeightsNotFound: a part is missing.
        CheckpointError: a part is damaged or something else, or several files could be it.
    """
    parts: dict[str, Path] = {}
    found: FoundFiles | None = None
    for part in PARTS:
        path = getattr(given, part) or _in_usual_place(root, usual.get(part))
        if path is not None and not path.exists():
            raise WeightsNotFound(f"model.{part}={path}: no such file or folder")
        if path is not None and part in _ROLES and path.is_dir() and not (path / "config.json").is_file():
            path = find_files(path).part(_ROLES[part], f"model.{part}") or path  # a folder of ComfyUI
        if path is None:
            found = found or find_files(root)
            path = found.tokenizer() if part == "tokenizer" else found.part(_ROLES[part], f"model.{part}")
        if path is None:
            raise WeightsNotFound(_missing(root, part, usual.get(part), fetch_command))
        parts[part] = path
        _check_part(part, path, fetch_command)
    return parts


def _in_usual_place(root: Path, relative: str | None) -> Path | None:
    if relative is None:
        return None
    usual = root / relative
    return next((path for path in (usual, usual.with_suffix(".safetensors")) if path.exists()), None)


def _missing(root: Path, part: str, usual: str | None, fetch_command: str) -> str:
    if usual is not None:
        return f"{root}: the {part.replace('_', ' ')} is missing: {root / usual}; complete it with: {fetch_command}"
    return (
        f"{root}: no {_ROLES.get(part, part)} there; set model.{part}, or fetch it with: {fetch_command} "
        f"--include '{_PUBLISHED[part]}'"
    )


def _check_part(part: str, path: Path, fetch_command: str) -> None:
    if part == "tokenizer":
        if not path.is_dir():
            raise CheckpointError(f"{path}: a file; the tokenizer is the folder that holds it: model.tokenizer=FOLDER")
        if not is_tokenizer(path):
            raise WeightsNotFound(
                f"{path}: neither tokenizer.json nor spiece.model is there; complete it with: {fetch_command} "
                f"--include '{_PUBLISHED[part]}'"
            )
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: a folder without the {_ROLES[part]} of Wan2.2-A14B or its config.json; set model.{part}=FILE"
            )
        sharded_files(path, fetch_command)
    elif is_safetensors(path):
        found = look_into(path)
        if found is None or found.role != _ROLES[part]:
            what = f"a {found.role}" if found else "of another model"
            raise CheckpointError(f"{path}: not the {_ROLES[part]} of Wan2.2-A14B, but {what}; set model.{part}")
    else:
        _check_pth(path)


def _check_pth(path: Path) -> None:
    """Reject a truncated zip archive (its directory is at its end); older pickles are checked when they are read."""
    with path.open("rb") as file:
        start = file.read(len(_ZIP_MAGIC))
    if start == _ZIP_MAGIC and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: truncated ({path.stat().st_size} bytes); download it again")
    if start != _ZIP_MAGIC and not start.startswith(b"\x80"):
        raise CheckpointError(f"{path}: not a file that torch.save wrote (it starts with {start!r})")


def files_of(part: Path) -> list[Path]:
    """The files of a part: itself, or those in its folder."""
    return [part] if part.is_file() else [path for path in part.rglob("*") if path.is_file()]
