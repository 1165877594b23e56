"""Settings of the memory bank. Defaults are StoryMem's, except the quality test: sharpness needs no weights.

Knows nothing about the scorers behind the names.
"""

from dataclasses import dataclass

from storymem_dist.errors import ConfigError, require_between, require_one_of, require_whole, shown

SIMILARITIES = ("clip", "hsv")
QUALITIES = ("hpsv3", "sharpness", "none")

WINDOW = "window"
ANCHORED = "anchored"
ENTITIES = "entities"
RECALL_RULES = (WINDOW, ANCHORED, ENTITIES)
"""What a shot recalls that does not say so itself: StoryMem's sink and window over all shots before it; the sink alone,
which is the references and the first shot; by entity."""

DEFAULT_QUALITY_THRESHOLDS = {"hpsv3": 3.0, "sharpness": 5.0}
"""hpsv3: StoryMem's. sharpness: in units of ``SharpnessQuality``; rejects black, white and featureless frames only."""


@dataclass(kw_only=True, slots=True)
class MemorySettings:
    """Which frames a shot adds to the bank, and which keyframes a shot is shown.

    ``max_keyframes``: most keyframes recalled for one shot (0: none); ``num_fixed`` of them are the oldest (the sink),
    the rest the newest. ``recall``: ``window`` is that rule over all shots before it, StoryMem's. ``anchored`` recalls
    references and the first shot only. ``entities`` fills the places by the entities of the shot: references, then the
    first keyframes of each (``num_fixed`` places, one for each entity at least), then the latest. Fewer needed shots
    mean that more of a story can be rendered at once. ``max_per_shot``: most frames chosen from one shot.
    ``similarity_threshold``: a frame is new when it is less similar than this to the keyframe before it (lowered in
    steps of ``threshold_step`` until at most ``max_per_shot`` frames remain), and a duplicate when it is more similar
    than this to any keyframe of the bank.
    ``quality_threshold``: the lowest score that passes; None means the default of the chosen ``quality``.
    ``clip_model`` is a folder, or a hub id that is in the local cache. ``hpsv3_checkpoint`` is a folder that
    ``storymem-weights download hpsv3`` made, or its file of weights; None: the local cache.
    """

    max_keyframes: int = 10
    num_fixed: int = 3
    recall: str = WINDOW
    max_per_shot: int = 3
    similarity: str = "clip"
    similarity_threshold: float = 0.9
    threshold_step: float = 0.01
    quality: str = "sharpness"
    quality_threshold: float | None = None
    clip_model: str = "openai/clip-vit-base-patch32"
    hpsv3_checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for the first setting that is not allowed."""
        require_whole("memory.max_keyframes", self.max_keyframes, 0, 1000)
        require_whole("memory.num_fixed", self.num_fixed, 0, 1000)
        require_whole("memory.max_per_shot", self.max_per_shot, 1, 1000)
        if self.num_fixed > self.max_keyframes:
            raise ConfigError(
                f"memory.num_fixed={self.num_fixed} is not allowed;"
                f" it must be at most memory.max_keyframes={self.max_keyframes}"
            )
        require_one_of("memory.recall", self.recall, RECALL_RULES)
        require_one_of("memory.similarity", self.similarity, SIMILARITIES)
        require_one_of("memory.quality", self.quality, QUALITIES)
        is_number = isinstance(self.similarity_threshold, int | float) and self.similarity_threshold is not True
        if not is_number or not 0 < self.similarity_threshold <= 1:
            raise ConfigError(
                f"memory.similarity_threshold={shown(self.similarity_threshold)} is not allowed;"
                " it must be above 0 and at most 1"
            )
        require_between("memory.threshold_step", self.threshold_step, 0.001, 1.0)
        if self.quality_threshold is not None:
            require_between("memory.quality_threshold", self.quality_threshold, -1e6, 1e6)


SELECTION_KEYS = (
    "max_per_shot",
    "similarity",
    "similarity_threshold",
    "threshold_step",
    "quality",
    "quality_threshold",
    "clip_model",
    "hpsv3_checkpoint",
)
"""The settings that decide which frames a shot adds to the bank; the others concern recall only."""
