"""The request log of a run folder: what people ask of its queue, while jobs run or before the next one starts.

    requests/<thousands>/<number>.json    one request: who, when, what; numbered from 1 without gaps
    requests/jobs/<hash of a job>.json    the last request before that job began

A request is published by an exclusive hard link under the next free number, so all processes see one order. Nobody
removes or rewrites one. Each replica folds the same log into the same ``QueueState``: a request is applied once, for
any number of jobs, restarts and kills. A reader looks for the next number by its name and lists nothing.

Knows stories and files; nothing of what is rendered.
"""

import contextlib
import difflib
import getpass
import hashlib
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storymem_dist.errors import ConfigError, StoryboardError, shown
from storymem_dist.files import (
    UnsafePath,
    canonical_json,
    create_exclusively,
    names_in,
    parse_json,
    read_limited,
    resolve_inside,
)
from storymem_dist.story.checking import build_story
from storymem_dist.story.loading import story_id_from
from storymem_dist.story.schema import Story
from storymem_dist.story.values import MAX_SEED
from storymem_dist.story.warnings import Warnings
from storymem_dist.story.writing import story_document
from storymem_dist.terminal.text import printable

ACTIONS = ("add", "pause", "resume", "skip", "unskip", "first", "rerender", "stop")
DAMAGED = "damaged"
"""Action of a request whose file cannot be used. It changes nothing."""

REQUESTS_FOLDER = "requests"
PER_FOLDER = 1000
MAX_REQUEST_BYTES = 4 * 2**20
_OF_ONE_STORY = ("add", "skip", "unskip", "first", "rerender")
_SHOT_ID = re.compile(r"shot_\d{1,9}")
_LONGEST_NAME = 200
_FIRST_PRIORITY = -(2**40)  # below every priority of a storyboard
_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What somebody asks. ``number`` is 0 until it is published, ``when`` is in seconds since the epoch.

    ``story_id``: of ``add``, ``skip``, ``unskip``, ``first`` and ``rerender``. ``shots``: ids of those to render again;
    none: all shots of the story. ``only``: shots that need these keep their records. ``seed``: that of these shots from
    then on, or of the whole story. ``now``: stop after the running step, not after the running shots. ``story``: the
    story to add, with the id, priority and seed that it is rendered with. ``problem``: why a damaged one cannot be
    used, or the added story cannot be rendered.
    """

    action: str
    number: int = 0
    who: str = ""
    when: float = 0.0
    via: str = ""
    story_id: str = ""
    shots: tuple[str, ...] = ()
    only: bool = False
    seed: int | None = None
    now: bool = False
    story: Story | None = None
    problem: str = ""

    def describe(self) -> str:
        """Return what is asked, as a person would type it. Not escaped."""
        target = self.story_id + (f":{','.join(self.shots)}" if self.shots else "")
        seed = "" if self.seed is None else f"--seed {self.seed}"
        words = [self.action, target, "--only" if self.only else "", seed, "--now" if self.now else ""]
        return " ".join(word for word in words if word)


class RequestLog:
    """The request log of the run folder ``root``, as one process reads it. Creating the object touches no file.

    ``number``: of the last request that was read.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / REQUESTS_FOLDER
        self.number = 0

    def path(self, number: int) -> Path:
        """Path of the request with this number."""
        return self.folder / f"{number // PER_FOLDER:03d}" / _file_name(number)

    def read_new(self) -> list[Request]:
        """Return the requests that this object has not read yet, in order. Raises ``OSError`` if one is unreadable."""
        found = []
        while (request := self._read(self.number + 1)) is not None:
            self.number += 1
            found.append(request)
        return found

    def publish(self, request: Request) -> Request:
        """Write ``request`` under the next free number; return it with number, author and time. Raises ``OSError``.

        It gets the permissions of the run folder, since jobs of others must read it.
        """
        request = replace(request, who=request.who or who_asks(), when=request.when or time.time())
        number, mode = self._first_free(max(1, self.number + 1)), self.folder.parent.stat().st_mode & 0o7777
        while True:
            path = self.path(number)
            for folder in (self.folder, path.parent):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    with contextlib.suppress(OSError):  # a file system without permissions
                        folder.chmod(mode)
                resolve_inside(self.folder.parent, folder.relative_to(self.folder.parent))  # no link that leads out
            data = canonical_json(_as_json(replace(request, number=number)))
            if create_exclusively(path, data, mode=mode & 0o666):
                return replace(request, number=number)
            number += 1

    def number_before(self, job: str) -> int:
        """Return the number of the last request that was made before ``job`` began.

        The first of its processes that asks decides; all others, those of a restart too, get the same answer. Without
        a name: the number of the last request there is. Raises ``OSError``.
        """
        number = self._first_free(1) - 1
        if not job:
            return number
        path = self.folder / "jobs" / f"{hashlib.sha256(job.encode()).hexdigest()[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        create_exclusively(path, canonical_json({"job": job[:_LONGEST_NAME], "requests": number}), durable=False)
        try:
            decided = parse_json(read_limited(path, MAX_REQUEST_BYTES))["requests"]
        except (ValueError, KeyError, TypeError, UnsafePath):
            return number
        return decided if type(decided) is int else number

    def _first_free(self, number: int) -> int:
        """The lowest free number from ``number`` on: folders before the last are full."""
        while True:
            folder = number // PER_FOLDER
            names = set(names_in(self.path(number).parent))
            free = (one for one in range(number, (folder + 1) * PER_FOLDER) if _file_name(one) not in names)
            if (found := next(free, None)) is not None:
                return found
            number = (folder + 1) * PER_FOLDER

    def _read(self, number: int) -> Request | None:
        path = self.path(number)
        try:
            path.lstat()  # mostly there is none: one look by name
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            inside = resolve_inside(self.folder.parent, path.relative_to(self.folder.parent))
            return _from_json(parse_json(read_limited(inside, MAX_REQUEST_BYTES)), number)
        except (FileNotFoundError, PermissionError, UnsafePath, ValueError, KeyError, TypeError) as error:
            return Request(action=DAMAGED, number=number, problem=f"{path} is no request: {error}"[:500])


@dataclass(kw_only=True, slots=True)
class QueueState:
    """What the requests of a log ask for together.

    ``requests``: all of them, without their stories. ``paused``: the request that holds the queue. ``skipped``: by
    story id. ``first``: a priority by story id, below every priority of a storyboard; the newest request's is the
    lowest. ``added``: the stories, in order. ``stop``: the newest request to stop.
    """

    requests: list[Request] = field(default_factory=list)
    paused: Request | None = None
    skipped: dict[str, Request] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    added: dict[str, Story] = field(default_factory=dict)
    stop: Request | None = None
    _again: dict[str, list[Request]] = field(default_factory=dict)  # requests to rerender, by story id

    def apply(self, request: Request) -> None:
        """Apply the next request of the log."""
        self.requests.append(replace(request, story=None))
        match request.action:
            case "pause":
                self.paused = self.paused or request
            case "resume":
                self.paused = None
            case "skip":
                self.skipped.setdefault(request.story_id, request)
            case "unskip":
                self.skipped.pop(request.story_id, None)
            case "first":
                self.skipped.pop(request.story_id, None)
                self.first[request.story_id] = _FIRST_PRIORITY - request.number
            case "rerender":
                self._again.setdefault(request.story_id, []).append(request)
            case "add" if request.story is not None:
                self.added.setdefault(request.story_id, request.story)
            case "stop":
                self.stop = request

    def again(self, story_id: str, shot_id: str) -> tuple["Again", "Again"]:
        """Return how often a shot is to be rendered again, and how often as the shots see it that need this one: up to
        the last request that they follow.
        """
        own = for_others = Again()
        for request in self._again.get(story_id, ()):
            if not request.shots or shot_id in request.shots:
                seeded = own if request.seed is None else Again(seed=request.seed, of_story=not request.shots)
                own = replace(seeded, generation=own.generation + 1)
                for_others = for_others if request.only else own
        return own, for_others


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """How often a shot is to be rendered again, and the newest seed for that: the shot's, or the seed ``of_story``."""

    generation: int = 0
    seed: int | None = None
    of_story: bool = False


def check_request(request: Request, known: Mapping[str, Sequence[str]]) -> None:
    """Refuse a request that can have no effect. ``known``: the ids of the shots of every story of the run folder.

    Raises ``ConfigError`` that names what is known.
    """
    if request.action not in ACTIONS:
        raise ConfigError(f"{shown(request.action)} is no request; use one of: {', '.join(ACTIONS)}")
    if request.action == "add":
        if request.story is None or request.story.story_id != request.story_id:
            raise ConfigError("a request to add needs the story of its story id")
        if request.story_id in known:
            raise ConfigError(f"the story id {shown(request.story_id)} is taken in this run folder; give another one")
        if (num_bytes := len(canonical_json(_as_json(request)))) > MAX_REQUEST_BYTES:
            raise ConfigError(f"a request has at most {MAX_REQUEST_BYTES:,} bytes; this story needs {num_bytes:,}")
        return
    if request.action in _OF_ONE_STORY and request.story_id not in known:
        there = _near(request.story_id, sorted(known), "there are: ") if known else "it has none yet"
        raise ConfigError(f"no story {shown(request.story_id)} in this run folder; {there}")
    for shot_id in request.shots:
        if shot_id not in known[request.story_id]:
            there = _near(shot_id, known[request.story_id], "it has ")
            raise ConfigError(f"{request.story_id} has no shot {shown(shot_id)}; {there}")


def _near(name: str, names: Sequence[str], there: str) -> str:
    """What a person may have meant by ``name``, and the first of ``names``."""
    near = difflib.get_close_matches(name[:_LONGEST_NAME], names, n=3)
    meant = f"did you mean {', '.join(near)}? " if near else ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{meant}{there}{', '.join(names[:_NAMED])}{more}"


def _file_name(number: int) -> str:
    return f"{number:06d}.json"


def who_asks() -> str:
    """Return the name of this process's user and machine, ``lea@login1``."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        user = f"user {os.getuid()}"
    return printable(f"{user}@{socket.gethostname()}")[:_LONGEST_NAME]


def _as_json(request: Request) -> dict[str, Any]:
    values: dict[str, Any] = {
        "action": request.action,
        "who": request.who[:_LONGEST_NAME],
        "when": request.when,
        "via": request.via[:_LONGEST_NAME],
    }
    if request.story_id:
        values["story_id"] = request.story_id
    if request.shots:
        values["shots"] = list(request.shots)
    values |= {name: True for name in ("only", "now") if getattr(request, name)}
    if request.seed is not None:
        values["seed"] = request.seed
    if request.story is not None:
        values["story"] = story_document(request.story)
        values["priority"] = request.story.priority
        values["source"] = "" if request.story.source is None else str(request.story.source)
    return values


def _from_json(value: Any, number: int) -> Request:
    """Check what a file holds. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    action, story_id, shots = value["action"], value.get("story_id", ""), value.get("shots", [])
    texts = (value.get("who", ""), value.get("via", ""), story_id)
    if action not in ACTIONS or not all(isinstance(text, str) and len(text) <= _LONGEST_NAME for text in texts):
        raise ValueError("unknown action, or a name that is none")
    if not isinstance(shots, list) or not all(isinstance(one, str) and _SHOT_ID.fullmatch(one) for one in shots):
        raise ValueError("its shots are no shot ids")
    when = value.get("when", 0.0)
    if isinstance(when, bool) or not isinstance(when, int | float) or not 0 <= when < 1e12:
        raise ValueError("its time is none")
    seed = value.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        raise ValueError("its seed is none")
    if action in _OF_ONE_STORY and (not story_id or story_id_from(story_id) != story_id):
        raise ValueError("its story id is none")
    request = Request(
        action=action,
        number=number,
        who=value.get("who", ""),
        when=float(when),
        via=value.get("via", ""),
        story_id=story_id,
        shots=tuple(shots),
        only=value.get("only") is True,
        seed=seed,
        now=value.get("now") is True,
    )
    if action != "add":
        return request
    try:
        return replace(request, story=_story(value, story_id))
    except StoryboardError as error:
        return replace(request, problem=str(error))


def _story(value: Mapping[str, Any], story_id: str) -> Story:
    priority, source = value.get("priority", 0), value.get("source", "")
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > 2**31:
        raise ValueError("its priority is no number")
    if not isinstance(source, str) or "\0" in source:
        raise ValueError("its source is no path")
    story = build_story(
        value["story"],
        story_id=story_id,
        name=story_id,
        source=Path(source or "/"),
        where=source or story_id,
        warnings=Warnings(),
    )
    return replace(story, priority=priority, source=Path(source) if source else None)
