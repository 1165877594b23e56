"""Resolves the names by which people call shots, ``STORY:SHOT``. Reads no files."""

from collections.abc import Iterable, Mapping, Sequence

from storymem_dist.errors import RunFolderError, shortened, shown


def shot_ids(names: Sequence[str], known: Iterable[tuple[str, Mapping[str, str]]]) -> list[tuple[str, str]]:
    """Resolve ``STORY:SHOT`` names (``ocean:shot_03``, ``ocean:3``, ``ocean:the reef``) against the known stories.

    ``known``: each story with the ids of its shots and their own names, "" for none. Raises ``RunFolderError`` with the
    first unknown name and the known ones.
    """
    stories = dict(known)
    resolved = []
    for name in names:
        story_id, _, shot = name.rpartition(":")
        if story_id not in stories:
            raise RunFolderError(
                f"dispatch.rerender={shortened(name)}: no story {shown(story_id)}; "
                f"there are: {', '.join(sorted(stories)[:20])}"
            )
        named = [shot_id for shot_id, own in stories[story_id].items() if own == shot]
        shot_id = named[0] if named else f"shot_{int(shot):02d}" if shot.isdecimal() and len(shot) < 9 else shot
        if shot_id not in stories[story_id]:
            raise RunFolderError(
                f"dispatch.rerender={shortened(name)}: {story_id} has no shot {shown(shot)}; it has "
                f"{', '.join(stories[story_id])}"
            )
        resolved.append((story_id, shot_id))
    return resolved
