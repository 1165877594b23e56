"""Chooses the keyframes that a finished shot adds to the memory bank, by the rules of StoryMem's published code.

1. The first frame that passes the quality test, then every later frame that differs enough from the last chosen one
   and passes; the threshold is lowered until at most ``max_per_shot`` remain.
2. A chosen frame too similar to any keyframe of the bank is dropped. (Where a storyboard names the shot for a later
   one's memory, which may not have those keyframes, the first chosen frame stays.)

A frame is described once per size and scored only once, when its score is first needed (a score may cost a forward of a
7B model, so frames that will probably be candidates are scored together). The search for the threshold uses cached
similarities. Knows nothing about how scorers work or where
keyframes are stored.

Shapes: F frames, C channels (3), H height, W width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from storymem_dist.memory.bank import Keyframe, MemoryBank
from storymem_dist.memory.frames import resize_for_selection
from storymem_dist.memory.scorers import Quality, Similarity
from storymem_dist.memory.settings import MemorySettings

FIRST_COMPARED_FRAME = 2
"""StoryMem's code never tests frame 1, and its published keyframes were chosen this way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameDecision:
    """The verdict on one candidate for a keyframe and its reason; plain values, ready for JSON.

    ``verdict`` is ``kept``, ``duplicate``, ``low_quality`` or ``kept_as_last_resort``. ``slot`` is the frame's number
    among the chosen ones, None for ``low_quality``. ``similarity`` is the similarity to the chosen frame before it
    (None for the first), ``bank_similarity`` the highest similarity to a keyframe of the bank and ``against`` that
    keyframe's name (both None when the bank was empty). ``quality`` is the quality score, None without a quality test.
    A similarity that is not a number (two black frames in ``hsv``) is None.
    """

    frame_index: int
    slot: int | None
    verdict: str
    similarity: float | None
    bank_similarity: float | None
    against: str | None
    quality: float | None
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The keyframes a shot adds to the bank, and the decisions behind them in the order of the frames.

    ``threshold`` is the similarity threshold at which at most ``max_per_shot`` frames remained.
    """

    kept: tuple[Keyframe, ...]
    decisions: tuple[FrameDecision, ...]
    threshold: float


def choose_keyframes(
    clip_FCHW: Tensor,
    bank: MemoryBank,
    similarity: Similarity,
    quality: Quality,
    settings: MemorySettings,
    *,
    shot_index: int,
    keeps_first: bool = False,
) -> Chosen:
    """Choose from a clip (``uint8 [F, 3, H, W]``, F >= 1) the keyframes that shot ``shot_index`` adds to ``bank``.

    The keyframes of ``bank`` have the clip's size. When no frame passes the quality test, the shot adds nothing; only
    if the bank would stay empty, the best-scoring frame is kept as a last resort. With ``keeps_first`` the shot adds at
    least one: its first chosen frame, or that last resort.
    """
    assert clip_FCHW.dtype == torch.uint8 and clip_FCHW.ndim == 4 and len(clip_FCHW) > 0, clip_FCHW.shape
    candidates = _Candidates(resize_for_selection(clip_FCHW), similarity, quality)
    selected, threshold = _select(candidates, settings)

    def keyframe(frame_index: int, slot: int) -> Keyframe:
        image = clip_FCHW[frame_index].cpu().clone()
        return Keyframe(image=image, shot_index=shot_index, slot=slot, frame_index=frame_index)

    decisions = [_low_quality(index, candidates) for index in sorted(candidates.refused)]
    kept = []
    if not selected and (keeps_first or not len(bank)):
        while not all(map(candidates.is_scored, range(len(clip_FCHW)))):
            candidates.score_from(0, quality.at_once)
        best = max(range(len(clip_FCHW)), key=candidates.score)
        kept.append(keyframe(best, 0))
        decisions = [decision for decision in decisions if decision.frame_index != best]
        decisions.append(_last_resort(best, candidates))
    bank_similarities = _similarities_to_bank(clip_FCHW[selected], bank, similarity)
    for slot, frame_index in enumerate(selected):
        before = selected[slot - 1] if slot else None
        decision = _kept_or_duplicate(
            frame_index, slot, before, threshold, candidates, bank, bank_similarities[slot], settings
        )
        if keeps_first and not slot and decision.verdict == "duplicate":
            decision = replace(
                decision, verdict="kept", why=f"{decision.why}; kept for a later shot that names this one"
            )
        decisions.append(decision)
        if decision.verdict == "kept":
            kept.append(keyframe(frame_index, slot))
    decisions.sort(key=lambda decision: decision.frame_index)
    return Chosen(kept=tuple(kept), decisions=tuple(decisions), threshold=threshold)


class _Candidates:
    """The frames of a clip at selection size; similarities and scores are computed on demand and cached."""

    def __init__(self, frames_FCHW: Tensor, similarity: Similarity, quality: Quality) -> None:
        self._frames = frames_FCHW
        self._compare = similarity.compare
        self._features = similarity.describe(frames_FCHW)
        self._rows: dict[int, list[float]] = {}
        self._scores: dict[int, float] = {}
        self.quality = quality
        self.refused: set[int] = set()

    def __len__(self) -> int:
        return len(self._frames)

    def similarity(self, one: int, other: int) -> float:
        if one not in self._rows:
            self._rows[one] = self._compare(self._features[one], self._features).tolist()
        return self._rows[one][other]

    def score(self, index: int) -> float:
        """The quality score of a frame that was scored; a score that is not a number counts as the worst."""
        return self._scores[index]

    def is_scored(self, index: int) -> bool:
        return index in self._scores

    def score_some(self, indices: Sequence[int]) -> None:
        """Score frames that were not scored."""
        for index, score in zip(indices, self.quality.scores(self._frames[list(indices)]), strict=True):
            self._scores[index] = -math.inf if math.isnan(score) else score

    def score_from(self, start: int, count: int) -> None:
        """Score the first ``count`` frames from ``start`` on that were not scored."""
        if some := [index for index in range(start, len(self)) if index not in self._scores][:count]:
            self.score_some(some)

    def passes(self, index: int) -> bool:
        """Whether a frame passes the quality test; one that was not scored does, for the time being."""
        return self._scores.get(index, math.inf) >= self.quality.threshold


def _select(candidates: _Candidates, settings: MemorySettings) -> tuple[list[int], float]:
    """Indices of the chosen frames, and the threshold that left at most ``max_per_shot`` of them."""
    threshold = settings.similarity_threshold
    first = _first_that_passes(candidates)
    if first is None:
        return [], threshold
    refused_before = candidates.refused
    while True:
        selected, refused, unscored = _walk(candidates, first, threshold)
        while unscored:
            candidates.score_some(unscored)
            selected, refused, unscored = _walk(candidates, first, threshold)
        candidates.refused = refused_before | refused
        if len(selected) <= settings.max_per_shot:
            return selected, threshold
        threshold -= settings.threshold_step


def _first_that_passes(candidates: _Candidates) -> int | None:
    """The first frame that passes the quality test; those before it are refused. Most often it is frame 0."""
    for index in range(len(candidates)):
        if not candidates.is_scored(index):
            candidates.score_from(index, candidates.quality.at_once if index else 1)
        if candidates.passes(index):
            return index
        candidates.refused.add(index)
    return None


def _walk(candidates: _Candidates, first: int, threshold: float) -> tuple[list[int], set[int], list[int]]:
    """The frames that are chosen at ``threshold``, the candidates that are refused, and those that must be scored.

    As long as a frame has no score, it counts as chosen; the walk ends where enough of them can be scored together.
    """
    selected, refused, unscored = [first], set[int](), list[int]()
    for index in range(FIRST_COMPARED_FRAME, len(candidates)):
        if len(unscored) == candidates.quality.at_once:
            break
        if not candidates.similarity(selected[-1], index) < threshold:  # not a number: as if alike
            continue
        if not candidates.is_scored(index):
            unscored.append(index)
        if candidates.passes(index):
            selected.append(index)
        else:
            refused.add(index)
    return selected, refused, unscored


def _similarities_to_bank(frames_NCHW: Tensor, bank: MemoryBank, similarity: Similarity) -> list[list[float]]:
    """For each frame its similarity to every keyframe of the bank, both at full size."""
    if not len(bank) or not len(frames_NCHW):
        return [[] for _ in frames_NCHW]
    images = torch.stack([keyframe.image for keyframe in bank.keyframes])
    assert images.shape[1:] == frames_NCHW.shape[1:], (images.shape, frames_NCHW.shape)
    in_bank = similarity.describe(images)
    return [similarity.compare(features, in_bank).tolist() for features in similarity.describe(frames_NCHW)]


def _kept_or_duplicate(
    frame_index: int,
    slot: int,
    before: int | None,
    threshold: float,
    candidates: _Candidates,
    bank: MemoryBank,
    bank_similarities: list[float],
    settings: MemorySettings,
) -> FrameDecision:
    to_last = None if before is None else candidates.similarity(before, frame_index)
    if before is None:
        why = f"the first frame that passes{_quality_words(candidates, frame_index)}"
    else:
        why = f"differs from frame {before}: similarity {to_last:.3f} < {threshold:.2f}"
    known = [-math.inf if math.isnan(value) else value for value in bank_similarities]
    nearest = max(range(len(known)), key=known.__getitem__, default=None)
    against = None if nearest is None else bank.keyframes[nearest].name
    is_duplicate = nearest is not None and known[nearest] > settings.similarity_threshold
    if nearest is not None and is_duplicate:
        why = (
            f"too similar to {against}, which is in the bank: {known[nearest]:.3f} > {settings.similarity_threshold:g}"
        )
    return FrameDecision(
        frame_index=frame_index,
        slot=slot,
        verdict="duplicate" if is_duplicate else "kept",
        similarity=_finite(to_last),
        bank_similarity=None if nearest is None else _finite(known[nearest]),
        against=against,
        quality=_recorded_score(candidates, frame_index),
        why=why,
    )


def _low_quality(frame_index: int, candidates: _Candidates) -> FrameDecision:
    return FrameDecision(
        frame_index=frame_index,
        slot=None,
        verdict="low_quality",
        similarity=None,
        bank_similarity=None,
        against=None,
        quality=_recorded_score(candidates, frame_index),
        why=f"{candidates.quality.name} {candidates.score(frame_index):.3g} < {candidates.quality.threshold:g}",
    )


def _last_resort(frame_index: int, candidates: _Candidates) -> FrameDecision:
    why = (
        f"no frame passes {candidates.quality.name} >= {candidates.quality.threshold:g} and the bank would stay empty:"
        f" the best of {len(candidates)} frames, {candidates.score(frame_index):.3g}, is kept"
    )
    return FrameDecision(
        frame_index=frame_index,
        slot=0,
        verdict="kept_as_last_resort",
        similarity=None,
        bank_similarity=None,
        against=None,
        quality=_recorded_score(candidates, frame_index),
        why=why,
    )


def _quality_words(candidates: _Candidates, index: int) -> str:
    quality = candidates.quality
    if quality.threshold == -math.inf:
        return ""
    return f" {quality.name}: {candidates.score(index):.3g} >= {quality.threshold:g}"


def _recorded_score(candidates: _Candidates, index: int) -> float | None:
    return None if candidates.quality.threshold == -math.inf else _finite(candidates.score(index))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
