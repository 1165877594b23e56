"""The stories of a run folder with their shots: those that jobs announced, that lie there, and that were added.

Reads as little as it can: of the event files the announcements of stories, and storyboards only where nothing else
names the shots.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from storymem_dist.artifacts.requests import QueueState, RequestLog
from storymem_dist.errors import ConfigError, shown
from storymem_dist.events import StoryStarted
from storymem_dist.observe.journal import JournalTail
from storymem_dist.observe.run.files import RunFiles

MAX_SHOTS = 10_000
"""Most shots of a story that an event file is believed to announce."""


def read_requests(root: Path) -> tuple[RequestLog, QueueState]:
    """Return the request log of a run folder, read to its end, and what its requests ask for. Raises ``OSError``."""
    log, queue = RequestLog(root), QueueState()
    for request in log.read_new():
        queue.apply(request)
    return log, queue


def known_stories(root: Path, queue: QueueState | None = None) -> dict[str, tuple[str, ...]]:
    """Return the stories of a run folder by id, each with the ids of its shots in order.

    A story is known when a job has announced it, a request has added it (``queue``: the requests of the log, where they
    are read already), or it has a folder.

    Raises ``RunFolderError`` when ``root`` is not a run folder, and ``OSError`` when its requests cannot be read.
    """
    files = RunFiles(root)
    added = (queue or read_requests(root)[1]).added
    known = {story_id: tuple(shot.shot_id for shot in story.shots) for story_id, story in added.items()}
    tail = JournalTail(files.events_folder, only=[StoryStarted])
    while events := tail.poll():
        for stamped in events:
            event = stamped.event
            if isinstance(event, StoryStarted) and len(known.get(event.story_id, ())) < event.num_shots:
                known[event.story_id] = shot_ids_of(event.num_shots)
    for story_id in files.story_ids():
        if not known.get(story_id):
            known[story_id] = tuple(own_names(files, story_id)) or tuple(sorted(files.story(story_id).records))
    return known


def shot_ids_of(num_shots: int) -> tuple[str, ...]:
    """The ids of a story's shots, ``MAX_SHOTS`` at most."""
    return tuple(f"shot_{index + 1:02d}" for index in range(min(num_shots, MAX_SHOTS)))


def own_names(files: RunFiles, story_id: str) -> dict[str, str]:
    """The shots of a storyboard in the run folder: their ids with their own names ("": none). {}: there is none yet."""
    names: dict[str, str] = {}
    scenes = files.storyboard(story_id).get("scenes")
    for scene in scenes if isinstance(scenes, list) else ():
        shots = scene.get("shots") if isinstance(scene, dict) else ()
        for shot in shots if isinstance(shots, list) else ():
            index = shot.get("index") if isinstance(shot, dict) else None
            if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < MAX_SHOTS:
                name = shot.get("name", "")
                names[f"shot_{index + 1:02d}"] = name if isinstance(name, str) else ""
    return names


def find_shots(
    root: Path, queue: QueueState, known: Mapping[str, Sequence[str]], texts: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return the shots that ``STORY`` and ``STORY:SHOT`` name, by story id; none: all shots of the story.

    A shot is ``shot_03``, ``3`` or its own name (of an added story, or of a storyboard in the run folder). Names that
    nothing has are returned as they are: ``check_request`` refuses them. Raises ``ConfigError`` for ``STORY:``.
    """
    found: dict[str, dict[str, None]] = {}
    whole: set[str] = set()
    for text in texts:
        story_id, colon, name = text.partition(":")
        if not story_id or (colon and not name):
            raise ConfigError(f"{shown(text)} names no shot; write STORY or STORY:SHOT, for example ocean:3")
        shots = found.setdefault(story_id, {})
        if colon:
            shots[_find_shot(root, queue, known, story_id, name)] = None
        else:
            whole.add(story_id)
    return {story_id: () if story_id in whole else tuple(shots) for story_id, shots in found.items()}


def _find_shot(root: Path, queue: QueueState, known: Mapping[str, Sequence[str]], story_id: str, name: str) -> str:
    if story_id not in known or name in known[story_id]:
        return name
    story = queue.added.get(story_id)
    own = own_names(RunFiles(root), story_id) if story is None else {one.shot_id: one.name for one in story.shots}
    named = [shot_id for shot_id, own_name in own.items() if own_name == name]
    if named:
        return named[0]
    return f"shot_{int(name):02d}" if name.isdecimal() and len(name) < 9 else name
