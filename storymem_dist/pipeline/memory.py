"""The visual memory of a story as an immutable value: keyframes with their origin, and how many a shot is shown.

The rules are those of a render job (``memory.bank``, ``memory.keyframes``): nothing is forgotten, a shot is shown the
oldest and the newest keyframes, and a finished shot adds the frames that pass the quality test and are new.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import cover_crop
from storymem_dist.errors import ConfigError
from storymem_dist.memory.bank import REFERENCE_SHOT_INDEX, Keyframe, MemoryBank, reference_keyframes
from storymem_dist.memory.keyframes import choose_keyframes
from storymem_dist.memory.scorers import Quality, Similarity
from storymem_dist.memory.settings import SELECTION_KEYS, MemorySettings
from storymem_dist.pipeline.host import as_guest, choose_guest_device
from storymem_dist.pipeline.images import FramesLike, to_frames, to_pictures
from storymem_dist.pipeline.sheet import Labelled, picture_grid
from storymem_dist.render.scoring import scorer_shelf

Scorers = Callable[[MemorySettings], tuple[Similarity, Quality]]
"""Returns the scorers of settings; ``memory.scorers.ScorerShelf`` does."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Remembered:
    """What a clip added to a memory.

    ``memory`` is the new value. ``keyframes`` are the images that were added, uint8 ``[N, H, W, 3]``; N is 0 where the
    memory holds the like of all of them. ``decisions`` say why, a mapping for each candidate (``FrameDecision``).
    """

    memory: "StoryMemory"
    keyframes: Tensor
    decisions: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class StoryMemory:
    """The memory of a story. Every method that adds something returns a new value.

    A shot is shown the first ``num_fixed`` keyframes and the newest ones, ``max_keyframes`` in total. ``selection`` has
    the scorers and thresholds that choose keyframes; None: those of the models that render the next shot, or StoryMem's
    own. ``keyframes`` are in the order of the story; ``next_shot`` is the index that the next remembered clip gets.

    Raises ``ConfigError`` for numbers that are not allowed.
    """

    max_keyframes: int = 10
    num_fixed: int = 3
    selection: MemorySettings | None = None
    keyframes: tuple[Keyframe, ...] = field(default=(), repr=False)
    next_shot: int = 0

    def __post_init__(self) -> None:
        try:
            MemorySettings(max_keyframes=self.max_keyframes, num_fixed=self.num_fixed)
        except ConfigError as error:
            raise ConfigError(str(error).replace("memory.", "")) from None

    def __len__(self) -> int:
        return len(self.keyframes)

    @property
    def num_references(self) -> int:
        """How many of the keyframes are a user's pictures."""
        return sum(one.shot_index == REFERENCE_SHOT_INDEX for one in self.keyframes)

    def with_limits(self, max_keyframes: int | None = None, num_fixed: int | None = None) -> "StoryMemory":
        """The same keyframes with other numbers; None keeps one."""
        return replace(
            self,
            max_keyframes=self.max_keyframes if max_keyframes is None else max_keyframes,
            num_fixed=self.num_fixed if num_fixed is None else num_fixed,
        )

    def with_references(self, images: FramesLike) -> "StoryMemory":
        """Add a user's pictures (MR2V), of any sizes, behind those that are there and before all shots.

        They are scaled and cut to the size of a clip when one is rendered. Accepts what ``to_frames`` does.
        """
        pictures = [picture.permute(2, 0, 1).contiguous() for picture in to_pictures(images)]
        slots = range(self.num_references, self.num_references + len(pictures))
        return replace(self, keyframes=MemoryBank(self.keyframes).add(reference_keyframes(pictures, slots)).keyframes)

    def remember(
        self,
        video: FramesLike,
        extract_count: int | None = None,
        similarity_threshold: float | None = None,
        *,
        selection: MemorySettings | None = None,
        device: "str | torch.device" = "cpu",
    ) -> Remembered:
        """Choose the keyframes of a clip and add them.

        ``extract_count``: most frames chosen; ``similarity_threshold``: a frame that is more similar than this to the
        keyframe before it, or to one of the memory, is not new. None: as ``selection`` (see the class) has it. Scorers
        that need weights are loaded onto ``device`` for this call.

        Raises ``ConfigError`` for wrong values, ``WeightsNotFound`` where a scorer's weights are not there.
        """
        rules = self.rules(selection, extract_count, similarity_threshold)
        frames, where = to_frames(video), choose_guest_device(device)
        with as_guest(where, cpu_threads=torch.get_num_threads(), vae_precision="tf32"):
            return self.remember_clip(frames.permute(0, 3, 1, 2), rules, scorer_shelf(where))

    def rules(
        self,
        selection: MemorySettings | None = None,
        extract_count: int | None = None,
        similarity_threshold: float | None = None,
    ) -> MemorySettings:
        """The settings by which this memory recalls and remembers. Raises ``ConfigError``."""
        chosen = selection or self.selection or MemorySettings()
        values = {name: getattr(chosen, name) for name in (*SELECTION_KEYS, "recall")}
        if extract_count is not None:
            values["max_per_shot"] = extract_count
        if similarity_threshold is not None:
            values["similarity_threshold"] = similarity_threshold
        return MemorySettings(max_keyframes=self.max_keyframes, num_fixed=self.num_fixed, **values)

    def remember_clip(self, clip_FCHW: Tensor, rules: MemorySettings, scorers: Scorers) -> Remembered:
        """Add the keyframes of a clip, uint8 ``[F, 3, H, W]``, by ``rules`` with scorers that are loaded."""
        similarity, quality = scorers(rules)
        height, width = clip_FCHW.shape[-2:]
        bank = MemoryBank(self.at_size(height, width))
        chosen = choose_keyframes(clip_FCHW, bank, similarity, quality, rules, shot_index=self.next_shot)
        images = [one.image.permute(1, 2, 0) for one in chosen.kept]
        return Remembered(
            memory=self.with_keyframes(chosen.kept),
            keyframes=torch.stack(images) if images else torch.empty(0, height, width, 3, dtype=torch.uint8),
            decisions=tuple(asdict(decision) for decision in chosen.decisions),
        )

    def with_keyframes(self, keyframes: Iterable[Keyframe]) -> "StoryMemory":
        """Add what the next shot left in memory, which may be nothing; the shot counts in any case."""
        return replace(
            self, keyframes=MemoryBank(self.keyframes).add(keyframes).keyframes, next_shot=self.next_shot + 1
        )

    def at_size(self, height: int, width: int) -> tuple[Keyframe, ...]:
        """The keyframes, each scaled to cover a clip of this size and cut to it."""
        return tuple(
            one if one.image.shape[1:] == (height, width) else replace(one, image=cover_crop(one.image, height, width))
            for one in self.keyframes
        )

    def recall(self) -> tuple[Keyframe, ...]:
        """The keyframes that the next shot is shown, oldest first."""
        return MemoryBank(self.keyframes).recall(self.rules()).keyframes

    def images(self) -> list[Tensor]:
        """The images of ``recall``, uint8 ``[H, W, 3]`` each; sizes may differ."""
        return [one.image.permute(1, 2, 0).contiguous() for one in self.recall()]

    def contact_sheet(self) -> Tensor:
        """A picture of all keyframes with their names, uint8 ``[H, W, 3]``; those that are shown next have a mark."""
        shown = {(one.shot_index, one.slot) for one in self.recall()}
        return picture_grid(
            [
                Labelled(
                    image_HWC=one.image.permute(1, 2, 0),
                    label=one.name,
                    is_marked=(one.shot_index, one.slot) in shown,
                )
                for one in self.keyframes
            ],
            nothing="no keyframes yet",
        )

    def describe(self) -> dict[str, Any]:
        """Plain values about this memory, for people."""
        return {
            "keyframes": [one.name for one in self.keyframes],
            "shown next": [one.name for one in self.recall()],
            "max_keyframes": self.max_keyframes,
            "num_fixed": self.num_fixed,
            "shots": self.next_shot,
        }


def images_of(keyframes: Sequence[Keyframe]) -> list[Tensor]:
    """The images, uint8 ``[3, H, W]`` each."""
    return [one.image for one in keyframes]
