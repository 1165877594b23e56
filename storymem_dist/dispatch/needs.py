"""What each shot of a story needs of the shots before it: their keyframes for its memory, or the end of the last one.

A pure function of the storyboard and the job's rules, so every replica knows the same graph before anything is
rendered. A shot that continues another needs its last frames. A shot with a memory needs the shots that it recalls:
those that the storyboard names, else those of the job's rule (``memory.recall``). Given clips and T2V shots need
nothing. Reads no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.memory.entities import EntityPlaces, num_latest_shots
from storymem_dist.memory.settings import ENTITIES, WINDOW, MemorySettings
from storymem_dist.story.modes import CONDITIONED_MODES, GIVEN, KIND_OF_MODE, M2V, MI2V, NO_CONTINUATION
from storymem_dist.story.schema import REFERENCES, Shot, Story


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What one shot needs. Indices are those of shots before it, ascending.

    ``mode``: how it is conditioned. ``memory``: the shots whose keyframes its memory may use. ``continues``: it needs
    the last frames of the shot just before it. ``references``: its memory has the story's reference images. ``given``:
    the references of shots before it that its memory has too, as index and position. ``entities``: how its places are
    filled; none: by sink and window. ``keeps_first``: a later shot names this one, or it is the first that shows an
    entity, so it leaves a keyframe even if it looks like what it remembers itself.
    """

    mode: str = GIVEN
    memory: Sequence[int] = ()
    continues: bool = False
    references: bool = False
    given: tuple[tuple[int, int], ...] = ()
    entities: tuple[EntityPlaces, ...] = ()
    keeps_first: bool = False

    @property
    def kind(self) -> str:
        """The kind of experts that render the shot, or ``given``."""
        return KIND_OF_MODE.get(self.mode, GIVEN)

    def uses(self, index: int, *, by: int) -> bool:
        """Whether the shot at ``by``, whose needs these are, uses keyframes or the end of the shot at ``index``."""
        return index in self.memory or (self.continues and index == by - 1)

    def num_references(self, story: Story, shot: Shot) -> int:
        """How many given images the memory of ``shot`` has."""
        of_entities = sum(len(entity.references) for entity in self.entities)
        of_story = len(story.reference_images) if self.references else 0
        return of_story + of_entities + len(self.given) + len(shot.references)


def story_needs(story: Story, sampler: SamplerSettings, memory: MemorySettings) -> tuple[Needs, ...]:
    """Return what each shot of ``story`` needs, in order."""
    rules = _Rules(story, memory)
    needs = []
    for shot in story.shots:
        recalled = Needs() if shot.video is not None else rules.recalled(shot)
        mode = _mode(story, shot, sampler, recalled)
        if mode not in CONDITIONED_MODES:
            recalled = Needs()
        needs.append(replace(recalled, mode=mode, continues=_continues(shot, sampler)))
        rules.saw(shot)
    named = {index for shot in story.shots for index in shot.recall or () if index >= 0}
    named |= rules.first_appearances  # also where no later shot shows the entity yet: one may be added
    shots = story.shots
    for index in named:
        if needs[index].memory or needs[index].num_references(story, shots[index]):  # else it leaves one anyway
            needs[index] = replace(needs[index], keeps_first=True)
    return tuple(needs)


def memory_warnings(story: Story, memory: MemorySettings) -> list[str]:
    """Return, a sentence each, what ``memory`` does not use of a story's entities, or misses."""
    if memory.recall == ENTITIES:
        if any(shot.entities for shot in story.shots):
            return []
        return [f"memory.recall={ENTITIES} recalls as {WINDOW} here: no shot of this story names entities"]
    if any(entity.references for entity in story.entities):
        return [f"references of entities are used with memory.recall={ENTITIES} only, not with {memory.recall}"]
    return []


def waits_for(needs: Sequence[Needs]) -> list[tuple[int, ...]]:
    """Return for each shot the shots that it waits for, without those that these wait for themselves."""
    waits: list[tuple[int, ...]] = []
    before: list[int] = []  # bit sets: the shots that each shot waits for, also through others
    known: Sequence[int] = ()
    remembered = 0
    for index, need in enumerate(needs):
        known, remembered = need.memory, _bits(need.memory, known, remembered)
        wanted = remembered | ((1 << (index - 1)) if need.continues else 0)
        covered, direct = 0, []
        while missing := wanted & ~covered:
            newest = missing.bit_length() - 1
            direct.append(newest)
            covered |= before[newest] | (1 << newest)
        waits.append(tuple(reversed(direct)))
        before.append(covered)
    return waits


def _mode(story: Story, shot: Shot, sampler: SamplerSettings, recalled: Needs) -> str:
    """Return the mode of a shot whose memory has what ``recalled`` says.

    A given clip is ``given``; a shot with a start image is MI2V at any place. A shot that continues the one before it
    has the job's continuation mode, M2V when that is ``none``. A cut is M2V. But the first shot, and one that recalls
    nothing because its storyboard says so, is T2V, unless reference images (MR2V) or ``first_shot=m2v`` make it M2V.
    """
    if shot.video is not None:
        return GIVEN
    if shot.start_image is not None:
        return MI2V
    if _continues(shot, sampler):
        return sampler.continuation
    if not recalled.memory and not recalled.num_references(story, shot):
        return sampler.first_shot
    return M2V


def _continues(shot: Shot, sampler: SamplerSettings) -> bool:
    is_rendered = shot.video is None and shot.start_image is None
    return is_rendered and not shot.cut and shot.index > 0 and sampler.continuation != NO_CONTINUATION


def _bits(indices: Sequence[int], known: Sequence[int], known_bits: int) -> int:
    """The bit set of ``indices``. That of ``known`` is known: a story has thousands of shots that remember one more."""
    if isinstance(indices, range):
        return (1 << len(indices)) - 1
    bits, new = (known_bits, indices[len(known) :]) if indices[: len(known)] == known else (0, indices)
    for index in new:
        bits |= 1 << index
    return bits


class _Rules:
    """What a shot recalls, from the shots that were ``saw`` before it."""

    def __init__(self, story: Story, memory: MemorySettings) -> None:
        self._memory = memory
        self._has_references = bool(story.reference_images)
        self._rule = memory.recall
        if self._rule == ENTITIES and not any(shot.entities for shot in story.shots):
            self._rule = WINDOW  # there is no schedule
        self._num_before = 0
        self._remembered: list[int] = []
        self._given: list[tuple[int, int]] = []
        self._sinks: list[tuple[int, int]] = []
        self._seen: dict[str, list[int]] = {}
        self._slots = self._slots_of(story)

    def recalled(self, shot: Shot) -> Needs:
        """What the memory of ``shot`` has."""
        if shot.recall is not None:
            references = REFERENCES in shot.recall
            return Needs(
                memory=tuple(index for index in shot.recall if index >= 0),
                references=references and self._has_references,
                given=tuple(self._sinks) if references else (),
            )
        if self._rule == WINDOW:
            everything = len(self._remembered) == self._num_before
            return Needs(
                memory=range(self._num_before) if everything else tuple(self._remembered),
                references=self._has_references,
                given=tuple(self._given),
            )
        entities = self._entities_of(shot) if self._rule == ENTITIES else ()
        shown = {index for entity in entities for index in (entity.first, *entity.latest) if index is not None}
        if not shown and not any(entity.references for entity in entities):
            shown, entities = set(self._remembered[:1]), ()
        memory = tuple(sorted(shown))
        return Needs(
            memory=range(len(memory)) if memory == tuple(range(len(memory))) else memory,
            references=self._has_references,
            given=tuple(self._sinks),
            entities=entities,
        )

    def saw(self, shot: Shot) -> None:
        """Go on to the next shot."""
        self._num_before += 1
        for position, reference in enumerate(shot.references):
            self._given.append((shot.index, position))
            if reference.is_sink:
                self._sinks.append((shot.index, position))
        if shot.remember:
            self._remembered.append(shot.index)
            for name in shot.entities:
                self._seen.setdefault(name, []).append(shot.index)

    @property
    def first_appearances(self) -> set[int]:
        """The first shot of each entity that was seen, where shots recall by entity."""
        return {seen[0] for seen in self._seen.values()} if self._rule == ENTITIES else set()

    def _entities_of(self, shot: Shot) -> tuple[EntityPlaces, ...]:
        names = dict.fromkeys(shot.entities)
        num_given = sum(len(self._slots.get(name, ())) for name in names)
        num_first = max(0, self._memory.max_keyframes - num_given)
        seen = [name for name in names if self._seen.get(name)][:num_first]
        num_latest = num_latest_shots(len(seen), num_given, self._memory)
        places = []
        for name in names:
            shots = self._seen[name] if name in seen else []
            latest = tuple(reversed(shots[1:][-num_latest:])) if num_latest else ()
            first = shots[0] if shots else None
            if shots or self._slots.get(name):
                places.append(EntityPlaces(name=name, references=self._slots.get(name, ()), first=first, latest=latest))
        return tuple(places)

    @staticmethod
    def _slots_of(story: Story) -> dict[str, tuple[int, ...]]:
        """The slots of each entity's images: they follow those of the story's reference images."""
        slots, used = dict[str, tuple[int, ...]](), len(story.reference_images)
        for entity in story.entities:
            slots[entity.name] = tuple(range(used, used + len(entity.references)))
            used += len(entity.references)
        return slots
