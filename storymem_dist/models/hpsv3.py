"""HPSv3: Qwen2-VL's vision tower and language model, and a head that rates a picture by an instruction.

Around transformers' ``Qwen2VLModel``. Facts are those of the package hpsv3 1.0.0, which also trained the weights: one
user message of picture and text, one added token whose hidden state is rated, positions that count tokens (not
Qwen2-VL's own, which follow the rows and columns of a picture), and rotary tables that are rounded like the weights.
Knows nothing about files.

Shapes: N frames, P patches of all of them, L tokens, D values of a head's table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
NUM_PIXELS = 256 * 28 * 28
"""A picture is resized to about this many pixels, with sides that are multiples of 28."""

HEAD = "rm_head."
_HEAD_SIZES = (1024, 16, 2)


class HpsV3Network(nn.Module):
    """The network, without the language model's output layer, which rates nothing."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.qwen = Qwen2VLModel(config)
        first, second, last = _HEAD_SIZES
        text_config: Any = config.text_config
        self.rm_head = nn.Sequential(
            nn.Linear(text_config.hidden_size, first),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, last),
        )

    def forward(self, ids_NL: Tensor, rated: int, patches_PV: Tensor, grids_N3: Tensor) -> Tensor:
        """Mean and deviation of the preference, fp32 ``[N, 2]``, read at token ``rated``.

        ``patches_PV`` and ``grids_N3`` are the image processor's; the grids stay on the CPU, where their numbers are
        read. All rows have the same length, so nothing is padded.
        """
        hidden_NLE = self.qwen(
            input_ids=ids_NL,
            position_ids=torch.arange(ids_NL.shape[1], device=ids_NL.device).expand_as(ids_NL),
            pixel_values=patches_PV,
            image_grid_thw=grids_N3,
            use_cache=False,
        ).last_hidden_state
        rating: Tensor = self.rm_head(hidden_NLE[:, rated].float())
        return rating

    def make_tables(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the rotary tables, which no file has, as the package does for a model of ``dtype``."""
        config: Any = self.qwen.config
        tables = Qwen2VLRotaryEmbedding(config.text_config)
        tables.inv_freq.copy_(tables.inv_freq.to(dtype))
        self.qwen.language_model.rotary_emb = tables.to(device)
        vision = Qwen2VLVisionRotaryEmbedding(config.vision_config)
        self.qwen.visual.rotary_pos_emb = _VisionTables(vision.inv_freq.to(device, dtype))


class _VisionTables(nn.Module):
    """Cosines and sines of the places of patches, all computed in the dtype of ``inv_freq``, as by the package."""

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, patches: Tensor, places_P2: Tensor) -> tuple[Tensor, Tensor]:
        """``[P, D]`` each, from rows and columns."""
        places = places_P2.to(self.inv_freq.device, self.inv_freq.dtype)
        angles = (places[..., None] * self.inv_freq).flatten(1)
        return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def empty_hpsv3(config: Qwen2VLConfig) -> HpsV3Network:
    """The network on the meta device, for ``weights.hpsv3``; its rotary tables are made once it has weights."""
    with torch.device("meta"):
        return HpsV3Network(config).eval().requires_grad_(False)


class HpsV3:
    """Rates frames of one size. ``text`` is the whole conversation, with one image token and one reward token."""

    def __init__(
        self, network: HpsV3Network, tokenizer: PreTrainedTokenizerBase, image_processor: Any, text: str
    ) -> None:
        self.network = network
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._text = text

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        table = self.network.qwen.visual.rotary_pos_emb.inv_freq
        assert isinstance(table, Tensor)
        return table.device

    @torch.no_grad()
    def rate(self, frames_NCHW: Tensor) -> Tensor:
        """Preferences of ``uint8 [N, 3, H, W]`` frames: fp32 ``[N]`` on the CPU, higher is better.

        One forward, so N should be small.
        """
        device = self.device
        pictures = self._image_processor(
            images=list(frames_NCHW.cpu().numpy()),
            size={"shortest_edge": NUM_PIXELS, "longest_edge": NUM_PIXELS},
            input_data_format="channels_first",
            return_tensors="pt",
        )
        grids_N3 = pictures["image_grid_thw"]
        num_tokens = int(grids_N3[0].prod()) // self._image_processor.merge_size**2
        ids = self._tokenizer(self._text.replace(IMAGE_TOKEN, num_tokens * IMAGE_TOKEN))["input_ids"]
        rated = ids.index(self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        ids_NL = torch.tensor([ids], device=device).expand(len(frames_NCHW), -1)
        patches_PV = pictures["pixel_values"].to(device)
        return self.network(ids_NL, rated, patches_PV, grids_N3)[:, 0].cpu()
