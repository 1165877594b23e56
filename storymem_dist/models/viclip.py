"""ViCLIP: CLIP ViT-L/14 whose vision half attends over the patches of all frames of a clip at once.

Each patch gets the position embedding of its place and one of its frame; a single class token, joined by the patches of
all frames, is what the clip's feature is read from. The text half is CLIP's, with a shorter context. Parameters have
the names of the published checkpoint, so its state dict loads as it is. Knows nothing about files.

Shapes: B clips or texts, F frames, P patches of a frame, L tokens, D values of a token, E values of a feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError

HEAD_DIM = 64
"""Values of an attention head in all of OpenAI's CLIP models; a state dict does not say it."""

_QUICK_GELU = 1.702  # OpenAI's CLIP: x * sigmoid(1.702 x)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViClipConfig:
    """Sizes of a ViCLIP. The defaults are those of the published model."""

    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    vision_dim: int = 1024
    vision_layers: int = 24
    text_dim: int = 768
    text_layers: int = 12
    embed_dim: int = 768
    context: int = 32
    vocabulary: int = 49_408


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> ViClipConfig:
    """The sizes of the model whose parameters have these shapes.

    Raises ``CheckpointError`` when one that decides a size is missing or has another number of dimensions.
    """
    try:
        vision_dim, _, _, patch_size, _ = shapes["vision_encoder.conv1.weight"]
        num_positions, _ = shapes["vision_encoder.positional_embedding"]
        _, num_frames, _ = shapes["vision_encoder.temporal_positional_embedding"]
        vocabulary, text_dim = shapes["text_encoder.token_embedding.weight"]
        context, _ = shapes["text_encoder.positional_embedding"]
        _, embed_dim = shapes["text_encoder.text_projection"]
    except KeyError as error:
        raise CheckpointError(f"not a ViCLIP: it has no {error.args[0]}") from None
    except ValueError:
        raise CheckpointError("not a ViCLIP: an embedding has another number of dimensions") from None
    return ViClipConfig(
        image_size=round((num_positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        num_frames=num_frames,
        vision_dim=vision_dim,
        vision_layers=_num_layers(shapes, "vision_encoder"),
        text_dim=text_dim,
        text_layers=_num_layers(shapes, "text_encoder"),
        embed_dim=embed_dim,
        context=context,
        vocabulary=vocabulary,
    )


def _num_layers(shapes: Mapping[str, tuple[int, ...]], half: str) -> int:
    start = f"{half}.transformer.resblocks."
    return len({key.removeprefix(start).partition(".")[0] for key in shapes if key.startswith(start)})


class ViClip(nn.Module):
    """Features of clips and texts in one space; compare them by the dot product of unit vectors."""

    def __init__(self, config: ViClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = _VisionEncoder(config)
        self.text_encoder = _TextEncoder(config)

    def encode_clips(self, frames_BFCHW: Tensor) -> Tensor:
        """Unit vectors ``[B, E]`` of normalized frames ``[B, num_frames, 3, image_size, image_size]``."""
        return F.normalize(self.vision_encoder(frames_BFCHW), dim=-1)

    def encode_texts(self, tokens_BL: Tensor) -> Tensor:
        """Unit vectors ``[B, E]`` of tokens ``int64 [B, context]``: padded with 0, the end token is the largest."""
        return F.normalize(self.text_encoder(tokens_BL), dim=-1)


class _VisionEncoder(nn.Module):
    def __init__(self, config: ViClipConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        patch = (1, config.patch_size, config.patch_size)
        self.conv1 = nn.Conv3d(3, config.vision_dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.vision_dim))
        self.positional_embedding = nn.Parameter(torch.zeros(num_patches + 1, config.vision_dim))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.vision_dim))
        self.ln_pre = nn.LayerNorm(config.vision_dim)
        self.transformer = _Transformer(config.vision_dim, config.vision_layers)
        self.ln_post = nn.LayerNorm(config.vision_dim)
        self.proj = nn.Parameter(torch.zeros(config.vision_dim, config.embed_dim))

    def forward(self, frames_BFCHW: Tensor) -> Tensor:
        """``[B, E]``."""
        patches_BFPD = self.conv1(frames_BFCHW.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        patches_BFPD = patches_BFPD + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        token_D = self.class_embedding + self.positional_embedding[0]
        tokens_BLD = torch.cat([token_D.expand(len(frames_BFCHW), 1, -1), patches_BFPD.flatten(1, 2)], dim=1)
        hidden_BLD = self.transformer(self.ln_pre(tokens_BLD))
        return self.ln_post(hidden_BLD[:, 0]) @ self.proj


class _TextEncoder(nn.Module):
    def __init__(self, config: ViClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.text_dim)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context, config.text_dim))
        self.transformer = _Transformer(config.text_dim, config.text_layers, is_causal=True)
        self.ln_final = nn.LayerNorm(config.text_dim)
        self.text_projection = nn.Parameter(torch.zeros(config.text_dim, config.embed_dim))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """``[B, E]``, read at each text's end token."""
        hidden_BLD = self.ln_final(self.transformer(self.token_embedding(tokens_BL) + self.positional_embedding))
        ends_B = tokens_BL.argmax(dim=-1)
        return hidden_BLD[torch.arange(len(hidden_BLD), device=ends_B.device), ends_B] @ self.text_projection


class _Transformer(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(dim, is_causal) for _ in range(num_layers))

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        for block in self.resblocks:
            hidden_BLD = block(hidden_BLD)
        return hidden_BLD


class _Block(nn.Module):
    def __init__(self, dim: int, is_causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, is_causal)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        hidden_BLD = hidden_BLD + self.attn(self.ln_1(hidden_BLD))
        return hidden_BLD + self.mlp(self.ln_2(hidden_BLD))


class _Attention(nn.Module):
    """Self-attention with one weight for queries, keys and values, as torch's ``MultiheadAttention`` stores it."""

    def __init__(self, dim: int, is_causal: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self._num_heads = max(1, dim // HEAD_DIM)
        self._is_causal = is_causal

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        parts = F.linear(hidden_BLD, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self._num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self._is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        inner = self.c_fc(hidden_BLD)
        return self.c_proj(inner * torch.sigmoid(_QUICK_GELU * inner))
