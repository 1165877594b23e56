"""The contents of a report, read from a run's event files, records and requests alone, once or again and again.

Works on a run that is still going and on a broken one. Knows nothing of HTML.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storymem_dist.artifacts.requests import QueueState, RequestLog
from storymem_dist.artifacts.scores import SCORES_FILE, RunScores, read_scores
from storymem_dist.observe.journal import JournalTail, read_journal
from storymem_dist.observe.queue.order import queue_order
from storymem_dist.observe.report.stories import story_view
from storymem_dist.observe.report.views import QueuePlace, RequestView, RunView, StoryView
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.files import RunFiles, StoryFiles
from storymem_dist.observe.run.state import RunState
from storymem_dist.story.schema import Story

ALIVE_SECONDS = 120.0
"""A replica that sent an event within this time counts as running."""

LOOKED_AT = 64
"""Stories without news whose folders one call of ``refresh`` looks at."""

LISTED_EVERY = 16
"""Calls of ``refresh`` after which it looks for stories that no event has named."""

_STILL_NS = 2_000_000_000  # a folder that changed this shortly before it was read may change again at the same time

_DIGITS = frozenset("0123456789")
_NUMBER = re.compile(r"([0-9]{1,18})")

_Result = TypeVar("_Result")


def read_run(root: Path, *, now: float | None = None) -> RunView:
    """Read the run folder at ``root``; ``now`` (seconds since the epoch) decides what still runs.

    Raises:
        RunFolderError: ``root`` is not a run folder.
    """
    return RunReader(root).refresh(now)


class RunReader:
    """Reads the run folder at ``root`` again and again: only new events, and the stories that changed.

    Stories that events name are looked at in every call, ``LOOKED_AT`` others in turn. Not thread-safe: ``RunView``
    holds the same ``RunState`` each time; ``num_events`` counts what it was made of. Raises ``RunFolderError`` when
    ``root`` is not a run folder.
    """

    def __init__(self, root: Path) -> None:
        self._files = RunFiles(root)
        self._tail = JournalTail(self._files.events_folder)
        self._state = RunState()
        self.num_events = 0
        self._log = RequestLog(root)
        self._queue = QueueState()
        self._scores: RunScores | None = None
        self._config = ("", "")
        self._folders: dict[str, StoryFiles] = {}
        self._seen_at: dict[str, int] = {}
        self._notes: dict[str, Sequence[str]] = {}
        self._bare: dict[str, StoryView] = {}
        self._views: dict[str, tuple[StoryView, tuple[object, ...]]] = {}
        self._turn = 0
        self._num_calls = 0

    @property
    def num_event_files(self) -> int:
        """Event files that every call opens: one for each start of a replica."""
        return len(self._tail.offsets)

    def refresh(self, now: float | None = None) -> RunView:
        """Read what is new and return the run as it is; views of stories that did not change are the same objects."""
        touched = self._read_events()
        self._read_requests()
        changed = self._read_folders(touched)
        if self._is_new("config"):
            self._config = self._noted("config", self._files.newest_config)
        if self._is_new(SCORES_FILE) or (changed and self._scores is not None):
            self._noted(SCORES_FILE, self._read_scores)
        stories = self._story_views(touched | changed)
        moment = time.time() if now is None else now
        unreadable = self._tail.num_unreadable
        requests = tuple(self._request_view(number) for number in range(len(self._queue.requests)))
        paused = self._queue.paused.number if self._queue.paused is not None else None
        return RunView(
            root=self._files.root,
            name=self._files.root.resolve().name,
            run_id=self._files.run_id,
            created=self._files.created,
            status=_status(self._state, stories, moment),
            written_at=moment,
            stories=stories,
            state=self._state,
            config_hash=self._config[0],
            config=self._config[1],
            left_out=(
                *(note for _, notes in sorted(self._notes.items()) for note in notes),
                *([f"events: {unreadable} lines are no events"] if unreadable else ()),
            ),
            scores=self._scores,
            requests=requests,
            paused=next((request for request in requests if request.number == paused), None),
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_events(self) -> set[str]:
        """Apply new events; return the ids of the stories that they may have changed."""
        state = self._state
        num_rows, touched = len(state.rows), self._open_stories()
        for stamped in read_journal(self._tail):
            state.apply(stamped)
            self.num_events += 1
            if story_id := getattr(stamped.event, "story_id", None):
                touched.add(story_id)
        if len(state.rows) != num_rows:  # a job turned out to be two, and attempts moved from one to the other
            return set(state.stories)
        return touched | self._open_stories()

    def _open_stories(self) -> set[str]:
        """The stories of the shots that are being rendered: an event of their replica alone may end them."""
        rows = self._state.rows.values()
        return {
            attempt.started.story_id for row in rows for attempt in (row.attempt, row.saving) if attempt is not None
        }

    def _read_requests(self) -> None:
        try:
            for request in self._log.read_new():
                self._queue.apply(request)
            self._notes["requests"] = [one.problem for one in self._queue.requests if one.problem]
        except OSError as error:
            self._notes["requests"] = [f"requests: {str(error)[:300]}"]

    def _read_folders(self, touched: set[str]) -> set[str]:
        """Read the stories whose folders changed; return their ids."""
        new: set[str] = set()
        is_due = self._num_calls % LISTED_EVERY == 0 or not touched <= self._folders.keys()
        self._num_calls += 1
        if is_due and self._is_new("stories", self._files.stories_changed_at):
            found = set(self._noted("stories", self._files.story_ids))
            for gone in self._folders.keys() - found:
                del self._folders[gone]
                self._notes.pop(f"stories/{gone}", None)
                self._seen_at.pop(self._files.story_path(gone), None)
                touched.add(gone)
            new = found - self._folders.keys()
        names = sorted(self._folders)
        first = self._turn % max(1, len(names))
        self._turn = first + LOOKED_AT
        looked_at = {*names[first : first + LOOKED_AT], *(touched & self._folders.keys()), *new}
        changed = {name for name in looked_at if self._is_new(self._files.story_path(name))}
        for name in changed:
            self._folders[name] = self._noted(f"stories/{name}", partial(self._files.story, name))
        return changed

    def _is_new(self, path: str, look: Callable[[], int] | None = None) -> bool:
        """Whether a file or folder may have changed since the last call; remembers when it did."""
        changed_at, before = self._files.changed_at(path) if look is None else look(), self._seen_at.get(path)
        still = time.time_ns() - changed_at > _STILL_NS
        self._seen_at[path] = changed_at if still else -2
        return before is None or before != changed_at

    def _noted(self, path: str, read: Callable[[], _Result]) -> _Result:
        """Return what ``read`` returns, and keep what it left out."""
        self._files.left_out.clear()
        result = read()
        self._notes[path] = tuple(self._files.left_out)
        return result

    def _read_scores(self) -> None:
        self._scores = None
        try:
            self._scores = _current(read_scores(self._files.root), self._folders)
        except (OSError, ValueError) as error:
            self._files.left_out.append(f"{SCORES_FILE}: {str(error)[:300]}")

    # -- views ---------------------------------------------------------------------------------------------------------

    def _story_views(self, changed: set[str]) -> tuple[StoryView, ...]:
        """All stories by id: those with a folder, those that only events name, and those that were added."""
        known = {*self._folders, *self._state.stories, *self._queue.added}
        for name in changed & known | known - self._bare.keys():
            folder = self._folders.get(name)
            if folder is None:
                board = _planned(self._queue.added[name]) if name in self._queue.added else {}
                folder = StoryFiles(story_id=name, storyboard=board, records={}, video=None)
            new = story_view(self._files, folder, self._state)
            if self._bare.get(name) != new:
                self._bare[name] = new
        places, before, self._views = self._places(known), self._views, {}
        for name in sorted(known, key=_natural):
            bare, scores, place = made_of = (self._bare[name], self._scores, places[name])
            view, of = before.get(name, (bare, (None, None, place)))
            if of[0] is not bare or of[1] is not scores or of[2] != place:
                view = replace(_with_scores(bare, scores), queue=place)
            self._views[name] = (view, made_of)
        return tuple(view for view, _ in self._views.values())

    def _places(self, known: set[str]) -> dict[str, QueuePlace]:
        """The place of each story in the queue; what is left of stories is rendered in this order."""
        queue, status = self._queue, {name: self._bare[name].status for name in known}
        left = [name for name in known if status[name] in ("running", "waiting") and name not in queue.skipped]
        order = queue_order(self._state, queue)
        left.sort(key=lambda name: order(name, status[name] == "running"))
        places = {name: number for number, name in enumerate(left, start=1)}
        return {
            name: QueuePlace(
                place=places.get(name),
                is_first=name in queue.first and name in places,
                skipped=f"skipped by {queue.skipped[name].who}" if name in queue.skipped else "",
            )
            for name in known
        }

    def _request_view(self, position: int) -> RequestView:
        request = self._queue.requests[position]
        applied = self._state.requests.get(request.number)
        effect = request.problem
        if applied is not None:
            seconds = applied.seconds_to_effect
            effect = "; ".join(applied.messages) or "applied"
            effect += f" (after {fmt.duration(seconds)})" if seconds is not None else ""
        return RequestView(
            number=request.number,
            who=request.who,
            when=request.when,
            via=request.via,
            what=request.describe(),
            effect=effect,
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """What a name is sorted by: ``story_2`` comes before ``story_10``."""
    return [(int(part), "") if part[:1] in _DIGITS else (-1, part) for part in _NUMBER.split(name) if part]


def _planned(story: Story) -> dict[str, Any]:
    """The storyboard of an added story, as far as a report shows it."""
    shots = [
        {"index": shot.index, "prompt": shot.prompt, "cut": shot.cut, "scene_num": shot.scene_num}
        for shot in story.shots
    ]
    return {"name": story.name, "overview": story.overview, "scenes": [{"shots": shots}]}


def _current(scores: RunScores | None, folders: dict[str, StoryFiles]) -> RunScores | None:
    """Scores without those of shots that were rendered again, which are named in the notes."""
    if scores is None:
        return None
    stories, stale = {}, []
    for story_id, story in scores.stories.items():
        records = folders[story_id].records if story_id in folders else {}
        clips = {shot_id: record.files[record.clip].sha256 for shot_id, record in records.items()}
        stale += [f"{story_id}/{key}" for key, shot in story.shots.items() if clips.get(key) != shot.clip]
        shots = {key: shot for key, shot in story.shots.items() if clips.get(key) == shot.clip}
        stories[story_id] = replace(story, shots=shots)
    note = f"older than the clips of {', '.join(stale[:5])}{', ...' * (len(stale) > 5)}: score the run again"
    return replace(scores, stories=stories, notes=[*([note] if stale else []), *scores.notes])


def _with_scores(story: StoryView, scores: RunScores | None) -> StoryView:
    found = scores.stories[story.story_id].shots if scores is not None and story.story_id in scores.stories else {}
    shots = (replace(s, scores=found[s.shot_id].values) if s.shot_id in found else s for s in story.shots)
    return replace(story, shots=tuple(shots))


def _status(state: RunState, stories: tuple[StoryView, ...], now: float) -> str:
    shots = [shot for story in stories for shot in story.shots]
    if any(not row.is_over and now - row.last_seen < ALIVE_SECONDS for row in state.rows.values()):
        return "running"
    if not shots:
        return "empty"
    if all(shot.status == "finished" for shot in shots):
        return "finished"
    outcomes = [row.starts[-1].outcome for row in state.rows.values() if row.starts]
    return "stopped" if outcomes and all(outcome == "stopped" for outcome in outcomes) else "incomplete"
