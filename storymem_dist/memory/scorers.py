"""Scorers: the similarity of two frames (CLIP, HSV patches) and the quality of one (HPSv3, sharpness, none).

A model is loaded once, when its scorer is built, from local files only. HPSv3 itself comes from outside. Knows nothing
about selection rules.

Shapes: N frames, C channels (3, RGB), H height, W width, P patches, D values of a patch or embedding.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.memory.frames import PATCH, resize_for_selection
from storymem_dist.memory.settings import DEFAULT_QUALITY_THRESHOLDS, SELECTION_KEYS, MemorySettings

CLIP_SIZE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's published preprocessing constants."""

CLIP_BATCH = 32
HPSV3_BYTES = 15_504_596_168
"""Of HPSv3 as published and held: bf16, the head in fp32, without the language model's output layer."""

HPSV3_BATCH = 8
"""Frames of one forward: 0.8 GB at its widest point, and enough of them for any device."""

HSV_SIMILAR_COSINE = 0.7
HSV_EMPTY_NORM = 0.01
HSV_COMPARE_BATCH = 8
LUMA = (0.299, 0.587, 0.114)
DARK_LUMA, BRIGHT_LUMA = 10.0, 245.0


class Similarity(Protocol):
    """Compares frames in two steps, so that each frame is described only once."""

    def describe(self, frames_NCHW: Tensor) -> Tensor:
        """Features ``[N, ...]`` of ``uint8 [N, 3, H, W]`` frames on the CPU, in a form that only ``compare`` reads."""
        ...

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        """Similarity of the features ``one [...]`` to each of ``many [M, ...]``: ``[M]``, 1 means the same."""
        ...


class Quality(Protocol):
    """Scores frames; one passes when its score is at least ``threshold`` (-inf: every frame passes).

    ``at_once``: as many frames should be scored together; some of them may turn out not to be needed.
    """

    name: str
    threshold: float
    at_once: int

    def scores(self, frames_NCHW: Tensor) -> list[float]:
        """Scores of ``uint8 [N, 3, H, W]`` frames at selection size; higher is better."""
        ...


class QualityOfOne(Protocol):
    """A ``Quality`` that gains nothing from scoring frames together."""

    at_once: int = 1

    def score(self, frame_CHW: Tensor) -> float:
        """Score of a ``uint8 [3, H, W]`` frame."""
        ...

    def scores(self, frames_NCHW: Tensor) -> list[float]:
        """See ``Quality``."""
        return [self.score(frame) for frame in frames_NCHW]


LoadRating = Callable[[MemorySettings], Callable[[Tensor], list[float]]]
"""Loads HPSv3 (``weights.hpsv3``) to where it has room; what it returns rates ``uint8 [N, 3, H, W]`` frames."""


def build_similarity(settings: MemorySettings, device: torch.device) -> Similarity:
    """The similarity that ``settings`` name. Raises ``WeightsNotFound`` or ``CheckpointError``."""
    if settings.similarity == "hsv":
        return HsvSimilarity()
    return ClipSimilarity.from_pretrained(settings.clip_model, device)


def build_quality(settings: MemorySettings, load_hpsv3: LoadRating) -> Quality:
    """The quality test that ``settings`` name. Raises what ``load_hpsv3`` raises."""
    if settings.quality == "none":
        return NoQuality()
    threshold = settings.quality_threshold
    if threshold is None:
        threshold = DEFAULT_QUALITY_THRESHOLDS[settings.quality]
    if settings.quality == "sharpness":
        return SharpnessQuality(threshold)
    return HpsV3Quality(load_hpsv3(settings), threshold)


class ClipSimilarity:
    """Cosine of CLIP image embeddings, fp32."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """``model`` is transformers' ``CLIPModel``, of which only the image half is kept."""
        self._vision = model.vision_model.to(device=device, dtype=torch.float32).eval()
        self._projection = model.visual_projection.to(device=device, dtype=torch.float32)
        self._device = device

    @classmethod
    def from_pretrained(cls, path_or_id: str, device: torch.device) -> "ClipSimilarity":
        """Load from a folder, or from the local cache of the hub; never downloads.

        Raises ``WeightsNotFound`` when there is no model, ``CheckpointError`` when it is damaged or another model.
        """
        from transformers import CLIPModel

        try:
            loaded: Any = CLIPModel.from_pretrained(path_or_id, local_files_only=True, output_loading_info=True)
            model, report = loaded
        except OSError as error:
            raise WeightsNotFound(
                f"memory.clip_model={path_or_id!r}: no CLIP model there ({_shortened(error)});"
                f" give a folder, or run: hf download {MemorySettings().clip_model}"
                " (or use memory.similarity=hsv, which needs no weights)"
            ) from None
        except Exception as error:  # the loaders raise their own types: SafetensorError, UnpicklingError, RuntimeError
            raise CheckpointError(
                f"memory.clip_model={path_or_id!r} cannot be loaded ({_shortened(error)});"
                f" to get it again, run: hf download --force-download {MemorySettings().clip_model}"
            ) from None
        missing = sorted(report["missing_keys"])
        if missing:  # transformers fills these with random numbers
            raise CheckpointError(
                f"memory.clip_model={path_or_id!r} is not a complete CLIP model: {len(missing)} weights are missing,"
                f" first {', '.join(missing[:3])}"
            )
        return cls(model, device)

    @torch.no_grad()
    def describe(self, frames_NCHW: Tensor) -> Tensor:
        """Unit vectors ``float32 [N, D]``."""
        embeddings = [
            self._projection(self._vision(pixel_values=clip_pixels(batch.to(self._device))).pooler_output)
            for batch in frames_NCHW.split(CLIP_BATCH)
        ]
        return F.normalize(torch.cat(embeddings), dim=-1).cpu()

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        """Cosines ``float64 [M]``."""
        return many.double() @ one.double()


def clip_pixels(frames_NCHW: Tensor) -> Tensor:
    """``float32 [N, 3, 224, 224]`` input of CLIP from ``uint8 [N, 3, H, W]``.

    A plain bilinear resize to a square, without crop and antialias, as in StoryMem (transformers' image processor does
    both).
    """
    squashed = F.interpolate(
        frames_NCHW.float() / 255, size=(CLIP_SIZE, CLIP_SIZE), mode="bilinear", align_corners=False
    )
    mean = torch.tensor(CLIP_MEAN, device=squashed.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=squashed.device).view(3, 1, 1)
    return (squashed - mean) / std


class HsvSimilarity:
    """Share of 28 x 28 patches that look alike in HSV; needs no weights.

    Two patches are alike when the cosine of their HSV values is above 0.7. Patches that are black in both frames do
    not count; the similarity of two black frames is NaN.
    """

    def describe(self, frames_NCHW: Tensor) -> Tensor:
        """HSV patches ``uint8 [N, P, 3*28*28]``; frames that 28 does not divide are resized as for selection first."""
        frames_NCHW = frames_NCHW.cpu()
        if frames_NCHW.shape[-2] % PATCH or frames_NCHW.shape[-1] % PATCH:
            frames_NCHW = resize_for_selection(frames_NCHW)
        # one frame at a time: its int32 temporaries fit the CPU cache, several times faster than a whole clip
        hsv = torch.cat([rgb_to_hsv(frame) for frame in frames_NCHW.split(1)])
        patches = hsv.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, 3, rows, columns, 28, 28]
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(len(hsv), -1, 3 * PATCH * PATCH)

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        """Shares ``float32 [M]``."""
        one_PD = one.float()
        one_norm_P = one_PD.norm(dim=-1)
        shares = []
        for batch in many.split(HSV_COMPARE_BATCH):
            batch_MPD = batch.float()
            norm_MP = batch_MPD.norm(dim=-1)
            dot_MP = torch.einsum("mpd,pd->mp", batch_MPD, one_PD)
            alike_MP = dot_MP > HSV_SIMILAR_COSINE * norm_MP * one_norm_P
            counts_MP = (norm_MP >= HSV_EMPTY_NORM) | (one_norm_P >= HSV_EMPTY_NORM)
            shares.append((alike_MP & counts_MP).sum(dim=-1) / counts_MP.sum(dim=-1))
        return torch.cat(shares)


def rgb_to_hsv(rgb_NCHW: Tensor) -> Tensor:
    """8-bit HSV in OpenCV's convention (H in 0..179 for 0..358 degrees, S and V in 0..255), equal to it bit for bit.

    OpenCV's fixed-point rule: with v the largest and d the spread of the channels, S = d * round(255 * 2^12 / v) and
    H = sector * round(180 * 2^12 / (6 d)), both shifted right by 12 bits with rounding.
    """
    red, green, blue = rgb_NCHW.to(torch.int32).unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    levels = torch.arange(1, 256, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int32)
    saturation_table = torch.cat([zero, torch.round((255 << 12) / levels).to(torch.int32)])
    hue_table = torch.cat([zero, torch.round((180 << 12) / (6 * levels)).to(torch.int32)])
    saturation = (spread * saturation_table[value] + (1 << 11)) >> 12
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * hue_table[spread] + (1 << 11)) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    return torch.stack([hue, saturation, value], dim=1).to(torch.uint8)


class NoQuality(QualityOfOne):
    """Every frame passes."""

    name = "none"
    threshold = -math.inf

    def score(self, frame_CHW: Tensor) -> float:
        """Always 0."""
        return 0.0


class SharpnessQuality(QualityOfOne):
    """Variance of the Laplacian of the luma (0..255): how much fine detail there is; needs no weights.

    A frame whose mean luma is below 10 or above 245 (faded out, blown out) scores 0. Smooth gradients score below 1, a
    soft close-up with a shallow focus around 10, a detailed wide shot hundreds.
    """

    name = "sharpness"

    def __init__(self, threshold: float = DEFAULT_QUALITY_THRESHOLDS["sharpness"]) -> None:
        self.threshold = threshold

    def score(self, frame_CHW: Tensor) -> float:
        """The variance, at least 0."""
        luma_HW = torch.einsum("c,chw->hw", torch.tensor(LUMA), frame_CHW.cpu().float())
        if not DARK_LUMA <= luma_HW.mean().item() <= BRIGHT_LUMA:
            return 0.0
        inner = luma_HW[1:-1, 1:-1]
        laplacian = luma_HW[:-2, 1:-1] + luma_HW[2:, 1:-1] + luma_HW[1:-1, :-2] + luma_HW[1:-1, 2:] - 4 * inner
        return laplacian.var(correction=0).item()


class HpsV3Quality:
    """HPSv3's preference for the frame with an empty prompt, by a model of 7B parameters."""

    name = "hpsv3"
    at_once = HPSV3_BATCH

    def __init__(
        self, rate: Callable[[Tensor], list[float]], threshold: float = DEFAULT_QUALITY_THRESHOLDS["hpsv3"]
    ) -> None:
        """``rate`` returns the mean of the predicted preference of each of a few frames."""
        self._rate = rate
        self.threshold = threshold

    def scores(self, frames_NCHW: Tensor) -> list[float]:
        """See ``Quality``."""
        return self._rate(frames_NCHW)


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class ScorerShelf:
    """Similarity and quality scorers, built once for each choice of settings."""

    def __init__(self, device: torch.device, load_hpsv3: LoadRating) -> None:
        self._device = device
        self._load_hpsv3 = load_hpsv3
        self._built: dict[str, tuple[Similarity, Quality]] = {}

    def __call__(self, memory: MemorySettings) -> tuple[Similarity, Quality]:
        """The scorers for ``memory``. Raises ``WeightsNotFound``, ``CheckpointError`` or ``ExtraNotInstalled``."""
        key = json.dumps({name: getattr(memory, name) for name in SELECTION_KEYS})
        if key not in self._built:
            self._built[key] = build_similarity(memory, self._device), build_quality(memory, self._load_hpsv3)
        return self._built[key]

    def check(self, memory: MemorySettings) -> None:
        """Build the scorers now, so that missing weights or packages are reported before the first shot."""
        self(memory)
