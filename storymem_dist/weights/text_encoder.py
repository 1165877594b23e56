"""Loads the umT5 text encoder and its tokenizer, in the native or the diffusers layout. Knows nothing about prompts."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.files import file_identity
from storymem_dist.models.wan.presets import TextEncoderConfig
from storymem_dist.models.wan.text_encoder import TextEncoder, empty_text_encoder
from storymem_dist.weights.loading import read_state_dict
from storymem_dist.weights.state_dict import assign_state_dict, check_no_keys

_NATIVE_TO_TRANSFORMERS = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)


def transformers_t5_key(native_key: str) -> str:
    """The name that ``UMT5EncoderModel`` gives a weight of the native T5 file; an unknown key is returned as it is."""
    for pattern, replacement in _NATIVE_TO_TRANSFORMERS:
        if match := re.fullmatch(pattern, native_key):
            return match.expand(replacement)
    return native_key


class TextEncoderFiles(Protocol):
    """Where a checkpoint keeps its text encoder (``.pth`` file or transformers folder) and its tokenizer folder."""

    @property
    def text_encoder_path(self) -> Path:
        """Native ``models_t5_umt5-xxl-enc-bf16.pth``, or the ``text_encoder`` folder of a -Diffusers checkpoint."""

    @property
    def tokenizer_path(self) -> Path:
        """Native ``google/umt5-xxl``, or the ``tokenizer`` folder of a -Diffusers checkpoint."""


def load_text_encoder(
    checkpoint: TextEncoderFiles, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoder:
    """Load encoder and tokenizer of either layout; weights go to ``device`` one by one, in ``dtype``.

    Raises:
        WeightsNotFound: a path does not exist.
        CheckpointError: a file is damaged, holds something else, or tokenizer and encoder do not belong together.
    """
    weights, tokenizer_folder = Path(checkpoint.text_encoder_path), Path(checkpoint.tokenizer_path)
    for path, what in ((weights, "text encoder"), (tokenizer_folder, "tokenizer")):
        if not path.exists():
            raise WeightsNotFound(f"{path}: no {what} here; it is part of every Wan2.2-A14B download")
    tokenizer = load_tokenizer(tokenizer_folder)
    load = _from_transformers_folder if weights.is_dir() else _from_native_file
    model = load(weights, device, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: {len(tokenizer)} tokens, but {weights} has embeddings for {model.config.vocab_size}; "
            f"they are of different models"
        )
    return TextEncoder(model, tokenizer)


def text_encoder_config(native: Mapping[str, Tensor]) -> TextEncoderConfig:
    """Sizes of a native T5 state dict, from its shapes. Raises ``KeyError`` or ``ValueError`` for another one."""
    vocab_size, dim = native["token_embedding.weight"].shape
    num_buckets, num_heads = native["blocks.0.pos_embedding.embedding.weight"].shape
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=native["blocks.0.attn.q.weight"].shape[0],
        ffn_dim=native["blocks.0.ffn.fc1.weight"].shape[0],
        num_heads=num_heads,
        num_layers=sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", key) is not None for key in native),
        num_buckets=num_buckets,
    )


def _from_native_file(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5EncoderModel:
    native = read_state_dict(path)
    try:
        config = text_encoder_config(native)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the native umT5 encoder; weight {error} is missing or misshapen") from None
    model = empty_text_encoder(config)
    state = {transformers_t5_key(key): value.to(device=device, dtype=dtype) for key, value in native.items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    assign_state_dict(model, state, where=str(path))
    # One parameter, not two over the same memory: a later move must not copy it twice.
    model.encoder.embed_tokens = model.shared
    return model


def _from_transformers_folder(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as a transformers umT5 folder ({first_line})") from None
    model, report = loaded
    check_no_keys(f"{path}: weights are missing", report["missing_keys"])
    check_no_keys(f"{path}: weights have no place in the model", report["unexpected_keys"])
    return model.to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises ``CheckpointError`` when the folder holds none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a dozen types here, even plain Exception
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read as a tokenizer folder ({first_line})") from None


def text_encoder_identity(files: TextEncoderFiles, dtype: torch.dtype) -> str:
    """Hex digest that changes when encoder weights, tokenizer or the encoder's dtype change.

    Equal files have equal identities in any folder: the two base models ship the same encoder.
    """
    digest = hashlib.sha256(str(dtype).encode())
    for part in (files.text_encoder_path, files.tokenizer_path):
        for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if path.is_file():
                digest.update(f"\n{path.relative_to(part).as_posix()} {file_identity(path)}".encode())
    return digest.hexdigest()
