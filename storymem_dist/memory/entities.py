"""Fills the places of a shot's memory by what is seen in it, from a schedule alone: no model looks at a picture.

References come first, then the first keyframes of each entity of the shot, then the latest ones, in turns over the
entities. This is not StoryMem's rule. What it buys: a character that was away for ten shots is still shown. Knows
nothing of storyboards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storymem_dist.memory.bank import REFERENCE_SHOT_INDEX, Keyframe, MemoryBank, Recall
from storymem_dist.memory.settings import MemorySettings


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityPlaces:
    """Where a bank may hold pictures of one entity.

    ``references``: slots of its own images among the reference images. ``first``: index of the first shot that shows
    it, None where none before does. ``latest``: later shots that show it, the newest first.
    """

    name: str
    references: tuple[int, ...] = ()
    first: int | None = None
    latest: tuple[int, ...] = ()


def num_latest_shots(num_entities: int, num_given: int, settings: MemorySettings) -> int:
    """How many of the latest shots of each entity are needed, so that one keyframe of each fills all places.

    ``num_given`` reference images have a place before.
    """
    places = settings.max_keyframes - max(settings.num_fixed, num_given + num_entities)
    return max(0, -(-places // num_entities)) if num_entities else 0


def recall_entities(bank: MemoryBank, entities: Sequence[EntityPlaces], settings: MemorySettings) -> Recall:
    """Choose at most ``max_keyframes`` keyframes of ``bank``, in the order of the bank.

    Given images that belong to no entity come first, then those of the entities in turns, then the first keyframes of
    the entities in turns: ``num_fixed`` places with the references, but one for each entity at least. Then their latest
    keyframes in turns, and where those end, further ones of the first shots.
    """
    of_entities = {slot for entity in entities for slot in entity.references}
    given = [
        index
        for index, keyframe in enumerate(bank.keyframes)
        if keyframe.slot < 0 or (keyframe.shot_index == REFERENCE_SHOT_INDEX and keyframe.slot not in of_entities)
    ]
    references = [
        [index for index, kept in enumerate(bank.keyframes) if _is_reference(kept) and kept.slot in entity.references]
        for entity in entities
    ]
    first = [_of_shots(bank, [entity.first]) for entity in entities]
    latest = [_of_shots(bank, entity.latest) for entity in entities]

    places = _Places(settings.max_keyframes)
    for index in given:
        places.fill(index, "sink", "a reference image")
    places.in_turns(references, entities, "sink", "a reference image of", settings.max_keyframes)
    places.in_turns([one[:1] for one in first], entities, "sink", "the first of", settings.max_keyframes)
    places.in_turns(first, entities, "sink", "one of the first of", settings.num_fixed)
    places.in_turns(latest, entities, "recent", "one of the latest of", settings.max_keyframes)
    places.in_turns(first, entities, "sink", "one of the first of", settings.max_keyframes)
    names = ", ".join(entity.name for entity in entities)
    return bank.recalled(places.reasons, f"no place was left for it next to others of {names}")


class _Places:
    """The positions in a bank that have a place, and why."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self.reasons: dict[int, tuple[str, str]] = {}

    def fill(self, index: int, verdict: str, why: str) -> None:
        if len(self.reasons) < self._num_places:
            self.reasons.setdefault(index, (verdict, why))

    def in_turns(
        self, queues: Sequence[Sequence[int]], entities: Sequence[EntityPlaces], verdict: str, why: str, until: int
    ) -> None:
        """Take one of each queue in turns, as long as fewer than ``until`` places are filled."""
        left = [[index for index in queue if index not in self.reasons] for queue in queues]
        while any(left) and len(self.reasons) < min(until, self._num_places):
            for queue, entity in zip(left, entities, strict=True):
                while queue and queue[0] in self.reasons:
                    queue.pop(0)
                if queue and len(self.reasons) < until:
                    self.fill(queue.pop(0), verdict, f"{why} {entity.name}")


def _is_reference(keyframe: Keyframe) -> bool:
    return keyframe.shot_index == REFERENCE_SHOT_INDEX


def _of_shots(bank: MemoryBank, shots: Sequence[int | None]) -> list[int]:
    """Positions of the keyframes of these shots, in this order of the shots, without given images."""
    return [
        index
        for shot in shots
        for index, keyframe in enumerate(bank.keyframes)
        if keyframe.shot_index == shot and keyframe.slot >= 0 and not _is_reference(keyframe)
    ]
