"""The memory bank of one story: which keyframes exist, and which of them a shot is shown.

A bank is a value: adding keyframes gives a new bank. Knows nothing about how keyframes are chosen, scored or stored.

Shapes: C channels (3, RGB), H height, W width, N number of images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from storymem_dist.memory.settings import MemorySettings

REFERENCE_SHOT_INDEX = -1
"""``shot_index`` of reference images, which come before the first shot in the bank."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Keyframe:
    """One remembered image, ``uint8 [3, H, W]`` RGB.

    ``shot_index`` is the shot's position in the chain, or ``REFERENCE_SHOT_INDEX``. ``slot`` is the keyframe's number
    among the frames chosen from that shot before duplicates were dropped (so slots may have gaps); for a reference
    image it is the position. ``frame_index`` is the frame of the shot's saved clip, 0 for reference images.
    """

    image: Tensor
    shot_index: int
    slot: int
    frame_index: int

    def __post_init__(self) -> None:
        assert self.image.dtype == torch.uint8, self.image.dtype
        assert self.image.ndim == 3 and self.image.shape[0] == 3, self.image.shape

    @property
    def name(self) -> str:
        """Short name for messages and records: ``shot_02 keyframe 1``, ``reference image 1``."""
        if self.shot_index == REFERENCE_SHOT_INDEX:
            return f"reference image {self.slot + 1}"
        return f"shot_{self.shot_index + 1:02d} keyframe {self.slot}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallDecision:
    """Why a keyframe of the bank is, or is not, shown to a shot; plain values, ready for JSON.

    ``verdict`` is ``sink`` (among the oldest, always shown), ``recent`` or ``evicted``. ``position`` is its place
    among the recalled keyframes, None when evicted. ``shot_index``, ``slot``, ``frame_index`` as in ``Keyframe``.
    """

    keyframe: str
    shot_index: int
    slot: int
    frame_index: int
    verdict: str
    position: int | None
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """The keyframes shown to a shot, oldest first, and a decision for every keyframe of the bank."""

    keyframes: tuple[Keyframe, ...]
    decisions: tuple[RecallDecision, ...]


class MemoryBank:
    """All keyframes of a story so far, ordered by shot and slot. Never reset at a scene boundary."""

    def __init__(self, keyframes: Iterable[Keyframe] = ()) -> None:
        self.keyframes = tuple(sorted(keyframes, key=lambda keyframe: (keyframe.shot_index, keyframe.slot)))
        places = {(keyframe.shot_index, keyframe.slot) for keyframe in self.keyframes}
        assert len(places) == len(self.keyframes), "two keyframes have the same shot and slot"

    def __len__(self) -> int:
        return len(self.keyframes)

    def add(self, keyframes: Iterable[Keyframe]) -> "MemoryBank":
        """A new bank with ``keyframes`` added."""
        return MemoryBank((*self.keyframes, *keyframes))

    def recall(self, settings: MemorySettings) -> Recall:
        """The first ``num_fixed`` and the newest ``max_keyframes - num_fixed`` keyframes, or all if there are fewer."""
        num_recent = settings.max_keyframes - settings.num_fixed
        first_recent = max(settings.num_fixed, len(self) - num_recent)
        recalled: list[Keyframe] = []
        decisions = []
        for index, keyframe in enumerate(self.keyframes):
            position: int | None = len(recalled)
            if index < settings.num_fixed:
                verdict, why = "sink", f"one of the first {settings.num_fixed}, which are always shown"
            elif index >= first_recent:
                verdict, why = "recent", f"one of the newest {num_recent}"
            else:
                verdict, position = "evicted", None
                why = f"neither one of the first {settings.num_fixed} nor one of the newest {num_recent}"
            if position is not None:
                recalled.append(keyframe)
            decisions.append(
                RecallDecision(
                    keyframe=keyframe.name,
                    shot_index=keyframe.shot_index,
                    slot=keyframe.slot,
                    frame_index=keyframe.frame_index,
                    verdict=verdict,
                    position=position,
                    why=why,
                )
            )
        return Recall(keyframes=tuple(recalled), decisions=tuple(decisions))


def reference_keyframes(images_NCHW: Iterable[Tensor]) -> tuple[Keyframe, ...]:
    """Keyframes for a story's reference images (MR2V), ``uint8 [3, H, W]`` each, in the order of the storyboard."""
    return tuple(
        Keyframe(image=image, shot_index=REFERENCE_SHOT_INDEX, slot=position, frame_index=0)
        for position, image in enumerate(images_NCHW)
    )
