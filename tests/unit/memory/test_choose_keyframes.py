"""The rules for choosing a shot's keyframes, on clips with given similarities and scores."""

import dataclasses
import json
import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from storymem_dist.memory.bank import Keyframe, MemoryBank
from storymem_dist.memory.keyframes import Chosen, choose_keyframes
from storymem_dist.memory.scorers import NoQuality, Quality, QualityOfOne
from storymem_dist.memory.settings import MemorySettings

SIDE = 28


def clip_of(num_frames: int) -> Tensor:
    """Frames that carry their index in every pixel."""
    return torch.arange(num_frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


class TableSimilarity:
    """Similarities looked up by the indices that the frames carry."""

    def __init__(self, table: Sequence[Sequence[float]]) -> None:
        self.table = table
        self.described: list[tuple[int, int]] = []

    def describe(self, frames_NCHW: Tensor) -> Tensor:
        self.described += [(int(frame[0, 0, 0]), frame.shape[-1]) for frame in frames_NCHW]
        return frames_NCHW[:, 0, 0, 0]

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        return torch.tensor([self.table[int(one)][int(other)] for other in many], dtype=torch.float64)


class ListQuality(QualityOfOne):
    """Scores looked up by the index that the frame carries."""

    name = "score"

    def __init__(self, scores: Sequence[float], threshold: float = 0.5) -> None:
        self.by_frame = scores
        self.threshold = threshold
        self.scored: list[int] = []

    def score(self, frame_CHW: Tensor) -> float:
        self.scored.append(int(frame_CHW[0, 0, 0]))
        return self.by_frame[self.scored[-1]]


class ListQualityTogether(ListQuality):
    """The same, scored in batches."""

    def __init__(self, scores: Sequence[float], at_once: int) -> None:
        super().__init__(scores)
        self.at_once = at_once
        self.batches: list[list[int]] = []

    def scores(self, frames_NCHW: Tensor) -> list[float]:
        self.batches.append(frames_NCHW[:, 0, 0, 0].tolist())
        return super().scores(frames_NCHW)


def choose(
    table: Sequence[Sequence[float]],
    quality: Quality | None = None,
    bank: MemoryBank | None = None,
    settings: MemorySettings | None = None,
    keeps_first: bool = False,
) -> Chosen:
    return choose_keyframes(
        clip_of(len(table)),
        bank or MemoryBank(),
        TableSimilarity(table),
        quality or NoQuality(),
        settings or MemorySettings(),
        shot_index=4,
        keeps_first=keeps_first,
    )


def step_table(num_frames: int, *changes: int) -> list[list[float]]:
    """Frames are alike (1.0) between two changes and differ (0.2) across them."""
    part = [sum(index >= change for change in changes) for index in range(num_frames)]
    return [[1.0 if one == other else 0.2 for other in part] for one in part]


def kept_indices(chosen: Chosen) -> list[int]:
    return [keyframe.frame_index for keyframe in chosen.kept]


def naive_selection(table: Sequence[Sequence[float]], scores: Sequence[float], limit: int) -> list[int]:
    """The selection rule without caches, recomputed at each threshold."""
    good = [score >= 0.5 for score in scores]
    if True not in good:
        return []
    threshold = 0.9
    while True:
        chosen = [good.index(True)]
        for index in range(2, len(table)):
            if table[chosen[-1]][index] < threshold and good[index]:
                chosen.append(index)
        if len(chosen) <= limit:
            return chosen
        threshold -= 0.01


@pytest.mark.parametrize("seed", range(100))
def test_the_cached_search_chooses_what_the_rule_says(seed: int) -> None:
    random = Random(seed)
    num_frames, limit = random.randint(1, 12), random.randint(1, 4)
    values = [0.0, 0.3, 0.5, 0.62, 0.7, 0.8, 0.85, 0.89, 0.9, 0.95, 1.0, math.nan]
    table = [
        [1.0 if one == other else random.choice(values) for other in range(num_frames)] for one in range(num_frames)
    ]
    scores = random.choices([0.1, 0.5, 0.9], k=num_frames)
    quality = ListQuality(scores) if seed % 2 else ListQualityTogether(scores, at_once=random.randint(2, 8))
    similarity = TableSimilarity(table)

    chosen = choose_keyframes(
        clip_of(num_frames), MemoryBank(), similarity, quality, MemorySettings(max_per_shot=limit), shot_index=0
    )

    expected = naive_selection(table, scores, limit)
    if expected:
        assert kept_indices(chosen) == expected
    else:
        assert [decision.verdict for decision in chosen.decisions].count("kept_as_last_resort") == 1
    assert len(quality.scored) == len(set(quality.scored)), "a frame was scored twice"
    assert len(similarity.described) == num_frames, "a frame was described twice"


def test_frame_one_is_never_compared() -> None:
    flash = [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    assert kept_indices(choose(flash)) == [0]


def test_frames_are_scored_only_when_they_are_candidates() -> None:
    quality = ListQuality([1.0] * 20)
    choose(step_table(20, 10), quality)
    assert quality.scored == [0, 10]


def test_candidates_are_scored_together_though_some_turn_out_not_to_be_any() -> None:
    everything_differs = step_table(12, *range(12))
    quality = ListQualityTogether([0.1, 0.1, *[1.0] * 3, 0.1, *[1.0] * 6], at_once=4)
    settings = MemorySettings(max_per_shot=12)
    one_by_one = choose(everything_differs, ListQuality(quality.by_frame), settings=settings)
    together = choose(everything_differs, quality, settings=settings)
    assert quality.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert (kept_indices(together), together.decisions) == (kept_indices(one_by_one), one_by_one.decisions)


def test_the_kept_image_is_the_full_size_frame_and_not_a_view_of_the_clip() -> None:
    clip = clip_of(3)
    chosen = choose_keyframes(
        clip, MemoryBank(), TableSimilarity(step_table(3, 2)), NoQuality(), MemorySettings(), shot_index=4
    )
    clip.zero_()
    assert [(k.shot_index, k.slot, k.frame_index, int(k.image.amax())) for k in chosen.kept] == [
        (4, 0, 0, 0),
        (4, 1, 2, 2),
    ]
    assert chosen.kept[1].image.shape == (3, SIDE, SIDE)


def bank_of_frames(*frame_indices: int) -> MemoryBank:
    clip = clip_of(256)
    return MemoryBank(
        Keyframe(image=clip[index], shot_index=shot, slot=0, frame_index=index)
        for shot, index in enumerate(frame_indices)
    )


def test_a_duplicate_of_any_keyframe_of_the_bank_is_dropped_and_leaves_a_gap_in_the_slots() -> None:
    table = step_table(9, 3, 6)
    bank = bank_of_frames(4, 100)
    lookup = [[*row, *[0.0] * 247] for row in table] + [[0.0] * 256] * 247
    chosen = choose_keyframes(clip_of(9), bank, TableSimilarity(lookup), NoQuality(), MemorySettings(), shot_index=4)
    assert [(keyframe.slot, keyframe.frame_index) for keyframe in chosen.kept] == [(0, 0), (2, 6)]
    assert [(d.verdict, d.bank_similarity, d.against) for d in chosen.decisions] == [
        ("kept", 0.2, "shot_01 keyframe 0"),
        ("duplicate", 1.0, "shot_01 keyframe 0"),
        ("kept", 0.2, "shot_01 keyframe 0"),
    ]
    assert chosen.decisions[1].why == "too similar to shot_01 keyframe 0, which is in the bank: 1.000 > 0.9"


@pytest.mark.parametrize(("to_bank", "verdict"), [(0.9, "kept"), (0.9001, "duplicate"), (math.nan, "kept")])
def test_only_more_than_the_threshold_is_a_duplicate(to_bank: float, verdict: str) -> None:
    lookup = [[1.0] * 255 + [to_bank]] * 256
    (decision,) = choose_keyframes(
        clip_of(1), bank_of_frames(255), TableSimilarity(lookup), NoQuality(), MemorySettings(), shot_index=4
    ).decisions
    assert decision.verdict == verdict


def test_a_lowered_threshold_is_for_the_choice_alone_and_not_for_duplicates() -> None:
    gradual = [[1.0 - 0.2 * abs(one - other) for other in range(6)] for one in range(6)]
    lookup = [[*row, *[0.0] * 249, 0.85] for row in gradual] + [[0.85] * 256] * 250
    chosen = choose_keyframes(
        clip_of(6),
        bank_of_frames(255),
        TableSimilarity(lookup),
        NoQuality(),
        MemorySettings(max_per_shot=2),
        shot_index=4,
    )
    assert chosen.threshold < 0.85
    assert [decision.bank_similarity for decision in chosen.decisions] == [0.85, 0.85]
    assert kept_indices(chosen) == [0, 3]


def test_frames_of_one_shot_are_not_duplicates_of_each_other() -> None:
    there_and_back = [[1.0, 1.0, 0.2, 1.0], [1.0, 1.0, 0.2, 1.0], [0.2, 0.2, 1.0, 0.2], [1.0, 1.0, 0.2, 1.0]]
    assert kept_indices(choose(there_and_back)) == [0, 2, 3]


def test_when_no_frame_passes_an_empty_bank_gets_the_best_frame() -> None:
    chosen = choose(step_table(4, 2), ListQuality([0.1, 0.4, 0.4, 0.2]))
    assert [(keyframe.slot, keyframe.frame_index) for keyframe in chosen.kept] == [(0, 1)]
    assert [decision.verdict for decision in chosen.decisions] == [
        "low_quality",
        "kept_as_last_resort",
        "low_quality",
        "low_quality",
    ]
    assert chosen.decisions[1].why == (
        "no frame passes score >= 0.5 and the bank would stay empty: the best of 4 frames, 0.4, is kept"
    )
    assert chosen.decisions[0].why == "score 0.1 < 0.5"


def test_when_no_frame_passes_a_bank_that_holds_something_gets_nothing() -> None:
    chosen = choose(step_table(4, 2), ListQuality([0.1, 0.4, 0.4, 0.2]), bank_of_frames(9))
    assert chosen.kept == ()
    assert {decision.verdict for decision in chosen.decisions} == {"low_quality"}


def test_a_shot_that_a_later_one_names_keeps_its_first_frame_whatever_the_bank_has() -> None:
    chosen = choose(step_table(6, 3), bank=bank_of_frames(0, 3), keeps_first=True)
    assert kept_indices(chosen) == [0]
    assert [decision.verdict for decision in chosen.decisions] == ["kept", "duplicate"]
    assert chosen.decisions[0].why.endswith("; kept for a later shot that names this one")
    refused = choose(step_table(4), ListQuality([0.1, 0.4, 0.2, 0.3]), bank_of_frames(0), keeps_first=True)
    assert kept_indices(refused) == [1] and refused.decisions[-1].frame_index == 3


def test_scores_that_are_not_numbers_count_as_the_worst() -> None:
    chosen = choose(step_table(3), ListQuality([math.nan, 0.2, math.nan]))
    assert kept_indices(chosen) == [1]
    assert [decision.quality for decision in chosen.decisions] == [None, 0.2, None]
    assert kept_indices(choose(step_table(2), ListQuality([math.nan, math.nan]))) == [0]


def test_the_threshold_is_lowered_until_few_enough_frames_remain() -> None:
    table = [[1.0 - 0.2 * abs(one - other) for other in range(6)] for one in range(6)]
    chosen = choose(table, settings=MemorySettings(max_per_shot=2))
    assert kept_indices(chosen) == [0, 3]
    assert chosen.threshold == pytest.approx(0.6, abs=0.011)
    assert chosen.decisions[1].why == f"differs from frame 0: similarity 0.400 < {chosen.threshold:.2f}"


def test_decisions_are_values_that_json_takes_with_similarity_and_score() -> None:
    chosen = choose(step_table(5, 2, 3), ListQuality([1.0, 1.0, 0.0, 0.75, 1.0]))
    decisions = [dataclasses.asdict(decision) for decision in chosen.decisions]
    assert json.loads(json.dumps(decisions, allow_nan=False)) == decisions
    assert [(d["frame_index"], d["verdict"], d["slot"], d["similarity"], d["quality"]) for d in decisions] == [
        (0, "kept", 0, None, 1.0),
        (2, "low_quality", None, None, 0.0),
        (3, "kept", 1, 0.2, 0.75),
    ]
    assert decisions[0]["why"] == "the first frame that passes score: 1 >= 0.5"


def test_without_a_quality_test_no_score_is_recorded() -> None:
    (decision,) = choose(step_table(1)).decisions
    assert (decision.quality, decision.why) == (None, "the first frame that passes")
