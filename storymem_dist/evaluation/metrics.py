"""The formulas of ST-Bench's metrics, on features that are unit vectors. The paper left no code; see each constant.

Shapes: S shots of a story, E values of a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

MOST_RELEVANT = 10
"""Pairs of the metric "top 10"; a story of fewer pairs uses all of them, where both metrics are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consistency:
    """Cross-shot consistency of a story: over all pairs of shots, and over the most relevant ones.

    Both are None for a story of fewer than two shots, which has no pairs.
    """

    overall: float | None
    top: float | None
    num_pairs: int


def cosine(one: Tensor, other: Tensor) -> float:
    """Dot product of two unit vectors, in float64. No logit scale: VBench and the paper (about .2) have none."""
    return float(one.double() @ other.double())


def consistency(clips_SE: Tensor, texts_SE: Tensor) -> Consistency:
    """Cross-shot consistency from the features of a story's clips and of their prompts.

    Relevance of a pair is the similarity of its prompts by ViCLIP's own text half: the paper names no other model of
    texts. Pairs of equal relevance come in the order of the story, so that the result never depends on sorting.
    """
    pairs = list(combinations(range(len(clips_SE)), 2))
    if not pairs:
        return Consistency(overall=None, top=None, num_pairs=0)
    clips = {pair: cosine(clips_SE[pair[0]], clips_SE[pair[1]]) for pair in pairs}
    texts = {pair: cosine(texts_SE[pair[0]], texts_SE[pair[1]]) for pair in pairs}
    relevant = sorted(pairs, key=lambda pair: (-round(texts[pair], 6), pair))[:MOST_RELEVANT]
    return Consistency(
        overall=sum(clips.values()) / len(pairs),
        top=sum(clips[pair] for pair in relevant) / len(relevant),
        num_pairs=len(pairs),
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def finite(value: Tensor) -> float | None:
    """A number, or None for NaN and infinity."""
    return value.item() if bool(torch.isfinite(value)) else None
