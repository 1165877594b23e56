"""Loads the umT5 text encoder and its tokenizer: native, of diffusers, or a safetensors file (also in 8 bits).

Knows nothing about prompts.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.files import file_identity
from storymem_dist.models.wan.presets import TextEncoderConfig
from storymem_dist.models.wan.text_encoder import TextEncoder, empty_text_encoder
from storymem_dist.weights.loading import read_whole
from storymem_dist.weights.single_files import shapes_in
from storymem_dist.weights.state_dict import assign_state_dict, check_no_keys
from storymem_dist.weights.tensor_files import open_text_encoder_file, variant_of
from storymem_dist.weights.torch_file import is_safetensors, read_state_dict

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
    """Where a checkpoint keeps its text encoder (a file or a transformers folder) and its tokenizer folder."""

    @property
    def text_encoder_path(self) -> Path:
        """A ``.pth`` or ``.safetensors`` file, or the ``text_encoder`` folder of a -Diffusers checkpoint."""

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
    load = _from_transformers_folder if weights.is_dir() else _from_file
    model = load(weights, device, dtype)
    _check_pair(tokenizer, tokenizer_folder, weights, model.config.vocab_size)
    return TextEncoder(model, tokenizer)


def _check_pair(tokenizer: PreTrainedTokenizerBase, folder: Path, weights: Path, vocab_size: int) -> None:
    """Raise ``CheckpointError`` unless tokenizer and encoder may be of one model: another's texts would be nonsense."""
    if not _LEAST_USED * vocab_size <= len(tokenizer) <= vocab_size:
        raise CheckpointError(
            f"{folder}: {len(tokenizer)} tokens, but {weights} has embeddings for {vocab_size}; they are of different "
            "models; say where the tokenizer of umT5 is with model.tokenizer=FOLDER"
        )


_LEAST_USED = 0.7
"""The part of the embeddings that a tokenizer uses at least; of umT5's 256,384 they are all but 84."""


def text_encoder_config(weights: Mapping[str, torch.Size]) -> TextEncoderConfig:
    """Sizes of a umT5 encoder, from the shapes of its weights under transformers' names.

    Raises ``KeyError`` or ``ValueError`` for another model.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocab_size, dim = weights["shared.weight"]
    num_buckets, num_heads = weights[f"{attention}.relative_attention_bias.weight"]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=weights[f"{attention}.q.weight"][0],
        ffn_dim=weights["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"][0],
        num_heads=num_heads,
        num_layers=len({key.split(".")[2] for key in weights if key.startswith("encoder.block.")}),
        num_buckets=num_buckets,
    )


def _from_file(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5EncoderModel:
    """From a ``.pth`` or safetensors file, under native names or transformers' (as ComfyUI has them)."""
    read: Callable[[str], Tensor]
    if is_safetensors(path):
        source = open_text_encoder_file(path)
        shapes = {key: source.shape(key) for key in source.keys()}  # noqa: SIM118  (no dict)
        read = partial(read_whole, source, device=torch.device(device), dtype=dtype)
    else:
        weights = read_state_dict(path)
        shapes = {key: value.shape for key, value in weights.items()}
        read = lambda key: weights[key].to(device=device, dtype=dtype)  # noqa: E731  (parts of the file stay mapped)
    stored = {transformers_t5_key(key): key for key in shapes if key != _EMBEDDINGS}
    try:
        config = text_encoder_config({name: shapes[key] for name, key in stored.items()})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the umT5 encoder; weight {error} is missing or misshapen") from None
    model = empty_text_encoder(config)
    state = {name: read(key) for name, key in stored.items()}
    state[_EMBEDDINGS] = state["shared.weight"]
    assign_state_dict(model, state, where=str(path))
    # One parameter, not two over the same memory: a later move must not copy it twice.
    model.encoder.embed_tokens = model.shared
    return model


_EMBEDDINGS = "encoder.embed_tokens.weight"
"""Another name of ``shared.weight``."""


def _from_transformers_folder(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, variant=variant_of(path)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as a transformers umT5 folder ({first_line})") from None
    model, report = loaded
    check_no_keys(f"{path}: weights are missing", report["missing_keys"])
    check_no_keys(f"{path}: weights have no place in the model", report["unexpected_keys"])
    return model.to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises ``CheckpointError`` when the folder holds none, or another model's."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a dozen types here, even plain Exception
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read as a tokenizer folder ({first_line})") from None
    if (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.eos_token) != (0, 1, "</s>"):
        raise CheckpointError(
            f"{folder}: not a tokenizer of umT5 (texts end with {tokenizer.eos_token!r}); say where that is with "
            "model.tokenizer=FOLDER"
        )
    return tokenizer


def text_encoder_bytes(files: TextEncoderFiles, dtype: torch.dtype) -> int:
    """About the bytes of the encoder in memory, from headers; those on the disk may be fewer."""
    path, total = files.text_encoder_path, 0
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        if file.suffix == ".safetensors" or (file == path and is_safetensors(file)):
            total += sum(shape.numel() for shape in shapes_in(file).values()) * dtype.itemsize
        else:
            total += file.stat().st_size
    return total


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
