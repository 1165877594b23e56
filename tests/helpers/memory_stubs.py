"""The stub scorers that the keyframe fixtures were made with, and a few for tests of the selection rules."""

import torch
from torch import Tensor

from storymem_dist.memory.scorers import QualityOfOne


class MeanBrightness(QualityOfOne):
    """The fixtures' quality: a frame is low when the mean of its 8-bit values is below 10."""

    name = "mean"
    threshold = 10.0

    def __init__(self) -> None:
        self.num_scored = 0

    def score(self, frame_CHW: Tensor) -> float:
        self.num_scored += 1
        return frame_CHW.double().mean().item()


class MeanAbsoluteDifference:
    """The fixtures' ``mad`` similarity: 1 - mean|a - b| / 255."""

    def __init__(self) -> None:
        self.num_described = 0

    def describe(self, frames_NCHW: Tensor) -> Tensor:
        self.num_described += len(frames_NCHW)
        return frames_NCHW

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        return torch.stack([1 - (one.double() - other.double()).abs().mean() / 255 for other in many])
