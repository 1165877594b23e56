"""Prompt embeddings on disk, keyed by the identity of the text encoder and the prompt.

One safetensors file per prompt, so that ranks, replicas, nodes and later jobs share the work. Files appear by atomic
rename and equal entries have equal bytes, so any number of processes may write one. Each file has a checksum; a damaged
file counts as missing and is written again.

Knows nothing of how embeddings are made or for which shots.
"""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from storymem_dist.errors import RunFolderError
from storymem_dist.files import UnsafePath, names_in, read_limited, safetensors_metadata, write_bytes
from storymem_dist.hardware import machine_fault
from storymem_dist.models.wan.text_encoder import clean_prompt

FORMAT_VERSION = 1
"""Part of every entry's name: entries of another format are not found."""

_TENSOR = "prompt_embeds"
_MAX_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)


class PromptCache:
    """Embeddings of prompts made by one encoder. Prompts are compared as the encoder sees them: cleaned."""

    def __init__(self, folder: Path, encoder_identity: str) -> None:
        """``folder`` is created with the first entry; encoders of any identity may share it."""
        self._folder = folder
        self._encoder_identity = encoder_identity
        self._is_flat = any(name.endswith(".safetensors") for name in names_in(folder))

    def path(self, prompt: str) -> Path:
        """Return the path of the entry of ``prompt``, which need not exist. An earlier version's has no subfolder."""
        key = f"{FORMAT_VERSION}\n{self._encoder_identity}\n{clean_prompt(prompt)}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        early = self._folder / f"{digest}.safetensors"
        return early if self._is_flat and early.exists() else self._folder / digest[:2] / early.name

    def find(self, prompt: str) -> Tensor | None:
        """Return the embedding ``[num_tokens, text_dim]`` on the CPU, in the encoder's dtype.

        None when the entry is missing or damaged. Raises ``MachineError`` when the cache cannot be read at all.
        """
        path = self.path(prompt)
        try:
            # One read: safe_open opens the file twice, and it may be replaced between.
            data = read_limited(path, _MAX_BYTES)
        except FileNotFoundError:
            return None
        except UnsafePath as error:
            _report_damaged(path, error.strerror or str(error))
            return None
        except OSError as error:
            what = f"{path}: the prompt cache cannot be read ({error.strerror or error})"
            raise machine_fault(error, while_writing=True, what=what) or RunFolderError(what) from error
        try:
            embeds = load(data)[_TENSOR]
        except (SafetensorError, KeyError) as error:
            _report_damaged(path, str(error))
            return None
        if safetensors_metadata(data).get("sha256") != _checksum(embeds):
            _report_damaged(path, "its checksum does not match")
            return None
        return embeds

    def store(self, prompt: str, embeds: Tensor) -> None:
        """Write the entry of ``prompt``: ``embeds`` is ``[num_tokens, text_dim]`` on any device.

        Raises ``MachineError`` when it cannot be written (full disk, no permission).
        """
        embeds = embeds.detach().cpu().contiguous()
        metadata = {"prompt": clean_prompt(prompt), "sha256": _checksum(embeds)}
        path = self.path(prompt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, save({_TENSOR: embeds}, metadata), durable=False)  # a damaged entry is written again
        except OSError as error:
            what = f"{path}: the prompt cache cannot be written ({error.strerror or error})"
            raise machine_fault(error, while_writing=True, what=what) or RunFolderError(what) from error


def _checksum(embeds: Tensor) -> str:
    digest = hashlib.sha256(f"{embeds.dtype} {tuple(embeds.shape)}".encode())
    digest.update(embeds.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _report_damaged(path: Path, problem: str) -> None:
    logger.warning("%s: damaged prompt cache entry (%s); the prompt is encoded again", path, problem)
