"""The memory bank of one story: which keyframes exist, and which of them a shot is shown.

A bank is a value: adding keyframes gives a new bank. Knows nothing about how keyframes are chosen, scored or stored.

Shapes: C channels (3, RGB), H height, W width, N number of images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storymem_dist.memory.settings import MemorySettings

REFERENCE_SHOT_INDEX = -1
"""``shot_index`` of reference images, which come before the first shot in the bank."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Keyframe:
    """One remembered image, ``uint8 [3, H, W]`` RGB.

    ``shot_index`` is the shot's position in the story, or ``REFERENCE_SHOT_INDEX``. ``slot`` is the keyframe's number
    among the frames chosen from that shot before duplicates were dropped (so slots may have gaps); for a reference
    image it is the position. An image that joins the memory before a shot has that shot's index and a negative slot, so
    it comes before the shot's own keyframes. ``frame_index`` is the frame of the shot's saved clip, 0 for given images.
    ``is_sink``: it is shown to every shot whose bank holds it.
    """

    image: Tensor
    shot_index: int
    slot: int
    frame_index: int
    is_sink: bool = False

    def __post_init__(self) -> None:
        assert self.image.dtype == torch.uint8, self.image.dtype
        assert self.image.ndim == 3 and self.image.shape[0] == 3, self.image.shape

    @property
    def name(self) -> str:
        """Short name for messages and records: ``shot_02 keyframe 1``, ``reference image 1``."""
        if self.shot_index == REFERENCE_SHOT_INDEX:
            return f"reference image {self.slot + 1}"
        if self.slot < 0:
            return f"reference image of shot_{self.shot_index + 1:02d}"
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
        """The first ``num_fixed`` and the newest ``max_keyframes - num_fixed`` keyframes, or all if there are fewer.

        Keyframes that are sinks themselves come first; what they take is missing at the newest.
        """
        places = settings.max_keyframes
        given = [index for index, keyframe in enumerate(self.keyframes) if keyframe.is_sink][:places]
        others = [index for index in range(len(self)) if index not in given]
        num_fixed = min(settings.num_fixed, places - len(given))
        num_recent = places - len(given) - num_fixed
        sinks, recent = others[:num_fixed], others[num_fixed:][-num_recent:] if num_recent else []
        reasons = dict.fromkeys(given, ("sink", "a given image that is always shown"))
        reasons |= dict.fromkeys(sinks, ("sink", f"one of the first {num_fixed}, which are always shown"))
        reasons |= dict.fromkeys(recent, ("recent", f"one of the newest {num_recent}"))
        return self.recalled(reasons, f"neither one of the first {num_fixed} nor one of the newest {num_recent}")

    def recalled(self, reasons: Mapping[int, tuple[str, str]], why_not: str) -> Recall:
        """The keyframes at the positions in ``reasons`` (verdict and why of each), in the order of the bank.

        ``why_not`` is the reason for the others.
        """
        order = sorted(reasons)
        decisions = []
        for index, keyframe in enumerate(self.keyframes):
            verdict, why = reasons.get(index, ("evicted", why_not))
            decisions.append(
                RecallDecision(
                    keyframe=keyframe.name,
                    shot_index=keyframe.shot_index,
                    slot=keyframe.slot,
                    frame_index=keyframe.frame_index,
                    verdict=verdict,
                    position=order.index(index) if index in reasons else None,
                    why=why,
                )
            )
        return Recall(keyframes=tuple(self.keyframes[index] for index in order), decisions=tuple(decisions))


def reference_keyframes(images_NCHW: Iterable[Tensor], positions: Sequence[int] | None = None) -> tuple[Keyframe, ...]:
    """Keyframes for a story's reference images (MR2V), ``uint8 [3, H, W]`` each, in the order of the storyboard.

    ``positions``: which of them these are; None: all, or the first ones.
    """
    images = list(images_NCHW)
    slots = range(len(images)) if positions is None else positions
    return tuple(
        Keyframe(image=image, shot_index=REFERENCE_SHOT_INDEX, slot=slot, frame_index=0)
        for image, slot in zip(images, slots, strict=True)
    )


def given_keyframes(
    images_NCHW: Iterable[Tensor], *, shot_index: int, slots: Sequence[int], is_sink: Sequence[bool]
) -> tuple[Keyframe, ...]:
    """Keyframes for images that join the memory before shot ``shot_index``, ``uint8 [3, H, W]`` each.

    ``slots`` are negative: -2 and -1 for two images, so that they come before the keyframes of the shot itself.
    """
    return tuple(
        Keyframe(image=image, shot_index=shot_index, slot=slot, frame_index=0, is_sink=sink)
        for image, slot, sink in zip(images_NCHW, slots, is_sink, strict=True)
    )
