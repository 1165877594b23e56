"""Reads and checks prepared weights: experts with LoRAs merged and cast once, one file per block.

The manifest records inputs (sources, LoRAs, scales, versions) and outputs (files, sizes, hashes), so a folder that is
incomplete, damaged or older than its sources is rejected. ``weights/prepare.py`` writes the folder. Knows nothing about
modules or devices.

Formats: ``float32`` and ``bfloat16`` hold every weight in the dtype of the model (norms, modulation, time embedding and
head stay fp32), so rendering is bit-equal to rendering from the sources at that dtype. ``float8`` (e4m3, one
power-of-two scale per row, as in ``models.quantized_linear``) stores the linears of the blocks in half the bytes.
Loading turns them back into bf16 exactly, so the only loss is the rounding to 8 bits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.files import file_digest, write_bytes
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.story.modes import MI2V, MM2V
from storymem_dist.weights.loading import TensorSource
from storymem_dist.weights.lora import STORYMEM_FOLDERS, ScaledLora
from storymem_dist.weights.wrapped_source import WrappedSource

MANIFEST_NAME = "storymem_prepared.json"
FORMAT_VERSION = 1
STORED_DTYPES = ("float32", "bfloat16", "float8")
SCALE_SUFFIX = ".row_scale"

_HASH_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedManifest:
    """Describes a prepared folder. ``loras`` and ``files`` are plain JSON values; paths in ``files`` are relative."""

    complete: bool
    kind: str
    dtype: str
    storymem_lora: str | None
    source: Mapping[str, str]
    loras: Mapping[str, Sequence[Mapping[str, Any]]]
    parts: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION

    def write(self, root: Path) -> None:
        """Write the manifest into ``root``, atomically."""
        write_bytes(root / MANIFEST_NAME, json.dumps(asdict(self), indent=1).encode())

    def check_request(
        self,
        root: Path,
        continuation: str | None,
        loras: Mapping[str, Sequence[ScaledLora]],
        storymem: Mapping[str, ScaledLora] | None = None,
    ) -> None:
        """Raise ``CheckpointError`` unless the job needs exactly the LoRAs that are merged here.

        Args:
            root: the folder, for messages.
            continuation: the job's mode; None when the job needs no StoryMem LoRA (T2V).
            loras: the job's further LoRAs, by expert; without any, the merged ones are used.
            storymem: the job's StoryMem LoRA, by expert; without it, the merged one is used.
        """
        wanted = None if continuation is None else STORYMEM_FOLDERS[MM2V if continuation == MM2V else MI2V]
        is_own = self.storymem_lora is not None and self.storymem_lora not in STORYMEM_FOLDERS.values()
        if self.storymem_lora != wanted and not (is_own and wanted):  # a folder of one's own serves every mode
            raise CheckpointError(
                f"{root}: prepared with {self.storymem_lora or 'no StoryMem LoRA'}, but this job needs "
                f"{wanted or 'none'} (continuation={continuation}); prepare the weights for it"
            )
        if storymem and any(
            self._merged(expert, is_storymem=True) != [storymem[expert].identity] for expert in EXPERTS
        ):
            rules = {one["scale_rule"] for loras in self.loras.values() for one in loras if one["is_storymem"]}
            raise CheckpointError(
                f"{root}: model.storymem_lora with its scale rule is not what is merged into these prepared weights "
                f"(merged with the rule {' and '.join(sorted(rules))}); prepare them again, or use what is merged with "
                "model.storymem_lora=null"
            )
        asked = {expert: [lora.identity for lora in loras.get(expert, ())] for expert in EXPERTS}
        merged = {expert: self._merged(expert, is_storymem=False) for expert in EXPERTS}
        if any(asked.values()) and asked != merged:
            raise CheckpointError(
                f"{root}: model.loras are not the ones merged into these prepared weights; prepare them again, or "
                "leave model.loras empty to use what is merged"
            )

    def _merged(self, expert: str, *, is_storymem: bool) -> list[str]:
        return [one["identity"] for one in self.loras[expert] if one["is_storymem"] is is_storymem]


class Float8Source(WrappedSource):
    """Turns rows stored as e4m3 with a power-of-two scale each back into bf16; returns all other rows as stored."""

    def __init__(self, stored: TensorSource) -> None:
        keys = stored.keys()
        super().__init__(stored, [key for key in keys if not key.endswith(SCALE_SUFFIX)])
        self._scaled = {key.removesuffix(SCALE_SUFFIX) for key in keys if key.endswith(SCALE_SUFFIX)}

    def dtype(self, key: str) -> torch.dtype:
        """bf16 for what is stored as float8."""
        return torch.bfloat16 if key in self._scaled else super().dtype(key)

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows in fresh memory."""
        if key not in self._scaled:
            return super().read(key, rows, pin_memory=pin_memory)
        scales = self._stored.read(key + SCALE_SUFFIX, rows)
        values = (self._stored.read(key, rows).float() * scales[:, None]).bfloat16()
        return values.pin_memory() if pin_memory else values


def is_prepared(root: Path) -> bool:
    """Whether ``root`` is a prepared folder, finished or not."""
    return (root / MANIFEST_NAME).is_file()


def read_manifest(root: Path) -> PreparedManifest:
    """The manifest of a finished prepared folder.

    Raises:
        CheckpointError: it is unreadable, of another format version, or of a folder that is half written.
    """
    path = root / MANIFEST_NAME
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: not the manifest of a prepared folder; prepare the weights again") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: prepared by another version (format {version}, this program reads {FORMAT_VERSION}); "
            "prepare the weights again"
        )
    try:
        manifest = PreparedManifest(**values)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}; prepare the weights again") from None
    if not manifest.complete:
        raise CheckpointError(f"{root}: half written (preparing was interrupted); prepare the weights again")
    return manifest


def check_files(root: Path, manifest: PreparedManifest, *, hashes: bool = False) -> None:
    """Check the files of the manifest: their sizes and, with ``hashes``, their SHA-256.

    Raises ``WeightsNotFound`` for a missing file, ``CheckpointError`` for a wrong size or hash.
    """
    for relative, expected in manifest.files.items():
        path = root / relative
        if not path.is_file():
            raise WeightsNotFound(f"{path}: missing from the prepared weights; prepare them again")
        if path.stat().st_size != expected["num_bytes"]:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size} bytes, was written with {expected['num_bytes']}; "
                "prepare the weights again"
            )
        if hashes and file_digest(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 is not that of what was written; prepare the weights again")
