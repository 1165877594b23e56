"""The memory bank: order, recall, and the recorded reasons."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storymem_dist.memory.bank import Keyframe, MemoryBank, reference_keyframes
from storymem_dist.memory.settings import MemorySettings

IMAGE = torch.zeros(3, 2, 2, dtype=torch.uint8)


def bank_of(num_keyframes: int) -> MemoryBank:
    return MemoryBank(
        Keyframe(image=IMAGE, shot_index=index // 3, slot=index % 3, frame_index=index)
        for index in range(num_keyframes)
    )


@settings(deadline=None, derandomize=True, database=None)
@given(num_keyframes=st.integers(0, 40), max_keyframes=st.integers(1, 12), data=st.data())
def test_recall_is_the_sink_and_the_newest_and_never_more_than_allowed(
    num_keyframes: int, max_keyframes: int, data: st.DataObject
) -> None:
    num_fixed = data.draw(st.integers(0, max_keyframes))
    bank = bank_of(num_keyframes)
    recall = bank.recall(MemorySettings(max_keyframes=max_keyframes, num_fixed=num_fixed))

    everything = list(range(num_keyframes))
    num_recent = max_keyframes - num_fixed
    expected = everything
    if num_keyframes > max_keyframes:
        expected = everything[:num_fixed] + (everything[-num_recent:] if num_recent else [])
    assert [keyframe.frame_index for keyframe in recall.keyframes] == expected
    assert len(recall.decisions) == num_keyframes
    shown = [decision for decision in recall.decisions if decision.position is not None]
    assert [decision.frame_index for decision in shown] == expected
    assert [decision.position for decision in shown] == list(range(len(expected)))


def test_recall_says_why_for_every_keyframe_in_values_that_json_takes() -> None:
    recall = bank_of(6).recall(MemorySettings(max_keyframes=4, num_fixed=1))
    decisions = [dataclasses.asdict(decision) for decision in recall.decisions]
    assert json.loads(json.dumps(decisions)) == decisions
    assert [decision["verdict"] for decision in decisions] == [
        "sink",
        "evicted",
        "evicted",
        "recent",
        "recent",
        "recent",
    ]
    assert decisions[1] == {
        "keyframe": "shot_01 keyframe 1",
        "shot_index": 0,
        "slot": 1,
        "frame_index": 1,
        "verdict": "evicted",
        "position": None,
        "why": "neither one of the first 1 nor one of the newest 3",
    }
    assert (decisions[3]["keyframe"], decisions[3]["position"], decisions[3]["why"]) == (
        "shot_02 keyframe 0",
        1,
        "one of the newest 3",
    )


def test_a_bank_is_ordered_by_shot_and_slot_whatever_the_order_of_adding() -> None:
    late = Keyframe(image=IMAGE, shot_index=10, slot=0, frame_index=5)
    early = Keyframe(image=IMAGE, shot_index=2, slot=1, frame_index=7)
    earlier = Keyframe(image=IMAGE, shot_index=2, slot=0, frame_index=0)
    empty = MemoryBank()
    bank = empty.add([late]).add([early, earlier])
    assert bank.keyframes == (earlier, early, late)
    assert (len(bank), len(empty)) == (3, 0)


def test_reference_images_come_before_the_first_shot() -> None:
    first_shot = Keyframe(image=IMAGE, shot_index=0, slot=0, frame_index=0)
    bank = MemoryBank([first_shot]).add(reference_keyframes([IMAGE, IMAGE]))
    assert [keyframe.name for keyframe in bank.keyframes] == [
        "reference image 1",
        "reference image 2",
        "shot_01 keyframe 0",
    ]


def test_two_keyframes_in_one_place_are_a_bug_that_shows() -> None:
    keyframe = Keyframe(image=IMAGE, shot_index=0, slot=0, frame_index=0)
    with pytest.raises(AssertionError, match="same shot and slot"):
        MemoryBank([keyframe]).add([dataclasses.replace(keyframe, frame_index=9)])
