"""The umT5-XXL text encoder of Wan: prompts to embeddings, around transformers' ``UMT5EncoderModel``.

Text is cleaned, cut to 512 tokens and encoded; outputs are as long as the text (the transformer pads them with zeros).
Knows nothing about caching, guidance or ranks.
"""

import html
import re
from collections.abc import Sequence

import ftfy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from storymem_dist.models.wan.presets import TextEncoderConfig

MAX_TOKENS = 512
"""Longest text in tokens, the end mark included (Wan2.2's ``text_len``)."""


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, undo HTML escapes (two layers, even where ftfy sees mark-up), collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class TextEncoder:
    """Cleans, tokenizes and encodes prompts."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding ``[num_tokens <= max_tokens, text_dim]`` per text, in the model's dtype and on its device.

        Every text runs alone and unpadded, so that its embedding depends on the text only: padding and batch size would
        change rounding, and embeddings are cached by content. Equal texts are encoded once.
        """
        embeddings: dict[str, Tensor] = {}
        for text in texts:
            if text not in embeddings:
                ids = self.tokenizer(clean_prompt(text), truncation=True, max_length=self.max_tokens)["input_ids"]
                ids_1L = torch.tensor([ids], device=self.model.device)
                embeddings[text] = self.model(ids_1L).last_hidden_state[0]
        return [embeddings[text] for text in texts]


def empty_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """An encoder of these sizes on the meta device, for ``weights.state_dict.assign_state_dict``."""
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
