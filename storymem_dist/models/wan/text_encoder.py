"""The umT5-XXL text encoder of Wan: prompts to embeddings, around transformers' ``UMT5EncoderModel``.

Text is cleaned, cut to 512 tokens and encoded; outputs are as long as the text (the transformer pads them with zeros).
Knows nothing about caching, guidance or ranks.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.loading import read_state_dict
from storymem_dist.models.state_dict import assign_state_dict, check_no_keys
from storymem_dist.models.wan.presets import TextEncoderConfig

MAX_TOKENS = 512
"""Longest text in tokens, the end mark included (Wan2.2's ``text_len``)."""

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


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, undo HTML escapes (two layers, even where ftfy sees mark-up), collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def transformers_t5_key(native_key: str) -> str:
    """The name that ``UMT5EncoderModel`` gives a weight of the native T5 file; an unknown key is returned as it is."""
    for pattern, replacement in _NATIVE_TO_TRANSFORMERS:
        if match := re.fullmatch(pattern, native_key):
            return match.expand(replacement)
    return native_key


class TextEncoder:
    """Cleans, tokenizes and encodes prompts."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding ``[num_tokens <= max_tokens, text_dim]`` per text, in the model's dtype and on its device.

        Every text runs alone and unpadded, so that its embedding depends on nothing but the text (a batch's padding and
        size change rounding, and embeddings are cached by content). Equal texts are encoded once.
        """
        embeddings: dict[str, Tensor] = {}
        for text in texts:
            if text not in embeddings:
                ids = self.tokenizer(clean_prompt(text), truncation=True, max_length=self.max_tokens)["input_ids"]
                ids_1L = torch.tensor([ids], device=self.model.device)
                embeddings[text] = self.model(ids_1L).last_hidden_state[0]
        return [embeddings[text] for text in texts]


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
    tokenizer = _load_tokenizer(tokenizer_folder)
    load = _from_transformers_folder if weights.is_dir() else _from_native_file
    model = load(weights, device, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: {len(tokenizer)} tokens, but {weights} has embeddings for {model.config.vocab_size}; "
            f"they are of different models"
        )
    return TextEncoder(model, tokenizer)


def text_encoder_config(native: Mapping[str, Tensor]) -> TextEncoderConfig:
    """Sizes of a native T5 state dict, read off its shapes. Raises ``KeyError`` when it is not one."""
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


def empty_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """An encoder of these sizes on the meta device, for ``assign_state_dict``."""
    with torch.device("meta"):
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.attention_dim // config.num_heads,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                dropout_rate=0.0,
            )
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


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds here, plain Exception among them
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read as a tokenizer folder ({first_line})") from None
