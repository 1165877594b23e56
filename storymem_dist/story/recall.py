"""Finds the shots that ``recall`` names: by ``shot_01`` or by their own ``name``."""

import difflib
from collections.abc import Mapping, Sequence

from storymem_dist.errors import StoryboardError
from storymem_dist.story.problems import named, short
from storymem_dist.story.schema import REFERENCES
from storymem_dist.story.shots import Draft
from storymem_dist.story.warnings import Warnings

REFERENCES_WORD = "references"
NONE_WORD = "none"


_AMBIGUOUS = -2


def name_shots(drafts: Sequence[Draft], warnings: Warnings) -> dict[str, int]:
    """The index of each shot by its id and by its name. Raises ``StoryboardError`` for a name with two meanings.

    A ``shot_id`` with two meanings, as that of another program often is, has a warning, and no shot.
    """
    by_id = {draft.shot.shot_id: draft.shot.index for draft in drafts}
    indices = dict(by_id)
    for draft in drafts:
        shot, where = draft.shot, draft.at["name"]
        if not shot.name or draft.shot_id:
            continue
        if shot.name.lower() in (REFERENCES_WORD, NONE_WORD):
            raise StoryboardError(f"{where}: the name {shot.name!r} has a meaning of its own in recall; take another")
        if indices.get(shot.name, shot.index) != shot.index:
            other = indices[shot.name]
            what = "the id of another shot" if shot.name in by_id else f"also that of {drafts[other].shot.shot_id}"
            raise StoryboardError(f"{where}: the name {short(shot.name)!r} is {what}; allowed: one that no shot has")
        indices[shot.name] = shot.index
    shared: dict[str, None] = {}
    for draft in drafts:
        if not draft.shot_id or draft.shot_id.lower() in (REFERENCES_WORD, NONE_WORD):
            continue
        if indices.setdefault(draft.shot_id, draft.shot.index) != draft.shot.index:
            indices[draft.shot_id] = _AMBIGUOUS
            shared[draft.shot_id] = None
    if shared:
        warnings.add(f"shot_id is that of several shots, so recall cannot name them by it: {named(list(shared), 4)}")
    return indices


def recalled(
    draft: Draft, indices: Mapping[str, int], drafts: Sequence[Draft], *, has_references: bool
) -> tuple[int, ...] | None:
    """The indices that ``recall`` of a shot names, ascending; None for the job's rule.

    ``references`` are the story's reference images, the sinks that shots before it were given, and its own. Raises
    ``StoryboardError`` for a name of no shot, a shot that is not before this one or does not stay in memory, and for
    ``references`` where there are none.
    """
    if draft.recall is None:
        return None
    where, index = draft.at["recall"], draft.shot.index
    is_default, what = "recall" in draft.defaults, "recall"
    if is_default:
        what = "the recall of defaults"
    words = [name.lower() for name in draft.recall]
    if NONE_WORD in words and len(words) > 1:
        raise StoryboardError(f"{where}: {what} holds none and more; write none alone, or remove it")
    found: set[int] = set()
    for name, word in zip(draft.recall, words, strict=True):
        if word == NONE_WORD:
            continue
        if word == REFERENCES_WORD:
            sinks = (reference.is_sink for other in drafts[:index] for reference in other.shot.references)
            if not (has_references or draft.shot.references or any(sinks)):
                raise StoryboardError(
                    f"{where}: {what} names references, and the story has no reference_images; add some, or remove it"
                )
            found.add(REFERENCES)
            continue
        if name not in indices:
            before = len(drafts) if is_default else index
            raise StoryboardError(
                f"{where}: {what} names {short(name)!r}, which is no shot; {_known(name, indices, before)}"
            )
        if (other := indices[name]) == _AMBIGUOUS:
            raise StoryboardError(
                f"{where}: {what} names {short(name)!r}, which may be one of several shots (shot_id); give the shot a"
                " name of its own"
            )
        if other >= index and is_default:
            continue
        if other >= index:
            problem = "the shot itself" if other == index else "a later shot"
            raise StoryboardError(
                f"{where}: recall names {short(name)!r}, {problem}; {_known(name, indices, index, may_guess=False)}"
            )
        if not drafts[other].shot.remember:
            raise StoryboardError(
                f"{where}: {what} names {short(name)!r}, whose keyframes do not enter the memory (remember: false);"
                " remove one of them"
            )
        found.add(other)
    if is_default and not found and NONE_WORD not in words:
        return None
    return tuple(sorted(found))


def _known(name: str, indices: Mapping[str, int], before: int, *, may_guess: bool = True) -> str:
    earlier = [one for one, index in indices.items() if 0 <= index < before]
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(part in earlier or part.lower() in (REFERENCES_WORD, NONE_WORD) for part in parts):
        return f"write a list: [{', '.join(parts)}]"
    if may_guess and (near := difflib.get_close_matches(name, earlier, n=1)):
        return f"did you mean {near[0]!r}?"
    shots = f"the shots before it ({named(earlier, 4)})" if earlier else "no shot, for none is before it"
    return f"allowed: {shots}, {REFERENCES_WORD}, or {NONE_WORD}"
