"""The places of a memory are filled by entity, evenly, and shown in the order of the story."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from storymem_dist.memory.bank import Keyframe, MemoryBank, given_keyframes, reference_keyframes
from storymem_dist.memory.entities import EntityPlaces, num_latest_shots, recall_entities
from storymem_dist.memory.settings import MemorySettings

IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


def bank_of(shots: dict[int, int], num_references: int = 0) -> MemoryBank:
    """A bank with ``shots[index]`` keyframes of each shot, and reference images."""
    keyframes = [
        Keyframe(image=IMAGE, shot_index=index, slot=slot, frame_index=8 * slot)
        for index, count in shots.items()
        for slot in range(count)
    ]
    return MemoryBank([*reference_keyframes([IMAGE] * num_references), *keyframes])


def shown(bank: MemoryBank, entities: list[EntityPlaces], **settings: int) -> list[tuple[int, int]]:
    recall = recall_entities(bank, entities, MemorySettings(**settings))  # type: ignore[arg-type]
    assert [d.position for d in recall.decisions if d.position is not None] == list(range(len(recall.keyframes)))
    assert {d.verdict for d in recall.decisions if d.position is None} <= {"evicted"}
    return [(keyframe.shot_index, keyframe.slot) for keyframe in recall.keyframes]


MIRA = EntityPlaces(name="Mira", first=0, latest=(7, 4))
TOM = EntityPlaces(name="Tom", first=2, latest=(6,))
BANK = bank_of({0: 3, 2: 3, 4: 2, 6: 3, 7: 2})


def test_each_entity_has_its_first_keyframe_then_the_latest_come_in_turns() -> None:
    assert shown(BANK, [MIRA, TOM], max_keyframes=2, num_fixed=0) == [(0, 0), (2, 0)]
    assert shown(BANK, [MIRA, TOM], max_keyframes=4, num_fixed=0) == [(0, 0), (2, 0), (6, 0), (7, 0)]
    assert shown(BANK, [MIRA, TOM], max_keyframes=6, num_fixed=4) == [(0, 0), (0, 1), (2, 0), (2, 1), (6, 0), (7, 0)]


def test_one_who_was_away_is_still_shown_and_the_other_does_not_take_all_places() -> None:
    away = EntityPlaces(name="Tom", first=0)
    here = EntityPlaces(name="Mira", first=1, latest=(12, 11, 10, 9))
    bank = bank_of({0: 1, 1: 3, 9: 3, 10: 3, 11: 3, 12: 3})
    assert (0, 0) in shown(bank, [here, away], max_keyframes=3, num_fixed=1)
    assert len(shown(bank, [here, away], max_keyframes=10, num_fixed=3)) == 10


def test_references_come_before_everything_and_those_of_no_entity_before_those_of_one() -> None:
    mira = EntityPlaces(name="Mira", references=(2, 3), first=0)
    bank = bank_of({0: 3}, num_references=4)
    assert shown(bank, [mira], max_keyframes=3, num_fixed=0) == [(-1, 0), (-1, 1), (-1, 2)]
    assert shown(bank, [mira], max_keyframes=5, num_fixed=0) == [(-1, 0), (-1, 1), (-1, 2), (-1, 3), (0, 0)]


def test_two_entities_that_were_first_seen_together_share_the_keyframes() -> None:
    together = [EntityPlaces(name=name, first=0) for name in ("Mira", "Tom")]
    assert shown(bank_of({0: 3}), together, max_keyframes=10) == [(0, 0), (0, 1), (0, 2)]
    assert shown(bank_of({0: 3}), together, max_keyframes=2, num_fixed=0) == [(0, 0), (0, 1)]


@given(
    st.dictionaries(st.integers(0, 9), st.integers(0, 3), max_size=8),
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), unique=True, max_size=4)), max_size=4),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_no_place_is_empty_while_a_keyframe_of_an_entity_is_left(
    shots: dict[int, int], seen: list[tuple[int, list[int]]], max_keyframes: int, num_fixed: int
) -> None:
    entities = [EntityPlaces(name=f"e{n}", first=first, latest=tuple(rest)) for n, (first, rest) in enumerate(seen)]
    places = shown(bank_of(shots), entities, max_keyframes=max_keyframes, num_fixed=min(num_fixed, max_keyframes))
    usable = {index for first, rest in seen for index in (first, *rest)}
    assert len(places) == min(max_keyframes, sum(count for index, count in shots.items() if index in usable))
    assert places == sorted(places) and len(set(places)) == len(places)


def test_the_latest_shots_are_as_many_as_fill_the_places_with_a_keyframe_each() -> None:
    settings = MemorySettings(max_keyframes=10, num_fixed=3)
    assert [num_latest_shots(n, 0, settings) for n in (0, 1, 2, 4, 9, 10, 12)] == [0, 7, 4, 2, 1, 0, 0]
    assert num_latest_shots(2, 8, settings) == 0
    assert num_latest_shots(2, 0, MemorySettings(max_keyframes=10, num_fixed=10)) == 0


def test_a_given_image_joins_before_its_shot_and_a_sink_is_always_shown() -> None:
    given = given_keyframes([IMAGE, IMAGE], shot_index=2, slots=[-2, -1], is_sink=[True, False])
    bank = MemoryBank([*given, *bank_of({0: 3, 1: 3, 2: 3, 3: 3}).keyframes])
    recalled = bank.recall(MemorySettings(max_keyframes=4, num_fixed=1))
    assert [(kept.shot_index, kept.slot) for kept in recalled.keyframes] == [(0, 0), (2, -2), (3, 1), (3, 2)]
    names = [decision.keyframe for decision in recalled.decisions]
    assert names[6:9] == ["reference image of shot_03", "reference image of shot_03", "shot_03 keyframe 0"]
    window = bank.recall(MemorySettings(max_keyframes=9, num_fixed=1))
    assert (2, -1) in [(kept.shot_index, kept.slot) for kept in window.keyframes]
