"""Publishes a person's request to the queue of a run folder, unless it changes nothing, and says what it does.

The command ``storymem-queue`` and the buttons of the live page both ask here. Texts are not escaped.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.artifacts.records import RUN_FORMAT
from storymem_dist.artifacts.requests import QueueState, Request, RequestLog, check_request
from storymem_dist.artifacts.sharding import RUN_FORMATS
from storymem_dist.errors import RunFolderError, shown
from storymem_dist.hardware import machine_fault
from storymem_dist.observe.queue.jobs import RunningReplica, running_replicas
from storymem_dist.observe.queue.known import known_stories, read_requests
from storymem_dist.observe.queue.view import QueuedStory, read_queue
from storymem_dist.observe.run.files import RunFiles

_OF_ALL = ("pause", "resume", "stop")
_BY_STATE = ("skip", "first", "rerender")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a request: as it was published, or None where it changes nothing; and a sentence that says so."""

    published: Request | None
    text: str


def ask(root: Path, requests: Sequence[Request]) -> list[Answer]:
    """Publish ``requests``, in order, in the run folder ``root``; those that change nothing there are left out.

    Returns what each one does. All are checked before the first is published. Raises ``RunFolderError`` when ``root``
    is no run folder or cannot be read or written, ``MachineError`` for a full or broken disk, and ``ConfigError`` for a
    story or a shot that is not there, or a story to add whose id is taken.
    """
    answers = []
    with writing_to(root):
        log, queue = read_requests(root)
        if any(request.action not in _OF_ALL for request in requests):
            unusable = {one.story_id: () for one in queue.requests if one.action == "add" and one.problem}
            known = unusable | known_stories(root, queue)  # one that cannot be rendered any more may be skipped
            for request in requests:
                check_request(request, known)
        view = read_queue(root) if any(request.action in _BY_STATE for request in requests) else None
        stories = {} if view is None else {story.story_id: story for story in view.stories}
        replicas = running_replicas(root) if view is None else view.replicas
        for request in requests:
            if text := _why_needless(request, queue, stories.get(request.story_id)):
                answers.append(Answer(published=None, text=text))
                continue
            published = publish(log, queue, request)
            other = came_first(published, queue)
            text = "" if other is None else f"somebody else asked the same, {who_and_when(other)}"
            answers.append(Answer(published=published, text=text or _effect(published, replicas, queue)))
    return answers


@contextlib.contextmanager
def writing_to(root: Path) -> Iterator[None]:
    """Turn the ``OSError`` of a read or write into the error that a person understands. Raises ``RunFolderError`` at
    once when ``root`` is no run folder of this version.
    """
    found = RunFiles(root).format
    if found not in RUN_FORMATS:
        raise RunFolderError(f"{root} is a run folder of format {shown(found)}; this version works on {RUN_FORMAT}")
    try:
        yield
    except OSError as error:
        fault = machine_fault(error, while_writing=True)
        if fault is None:
            raise RunFolderError(f"{root}: the request cannot be written: {error.strerror or error}") from error
        raise type(fault)(str(fault).replace(" (no shot is marked as failed)", "")) from error


def publish(log: RequestLog, queue: QueueState, request: Request) -> Request:
    """Publish a request, and bring ``queue`` up to date with it and those before it. Raises ``OSError``."""
    published = log.publish(request)
    for one in log.read_new():
        queue.apply(one)
    return published


def came_first(request: Request, queue: QueueState) -> Request | None:
    """The request of somebody else that was published in the same moment and leaves nothing to this one."""
    other: Request | None = None
    if request.action == "pause":
        other = queue.paused
    elif request.action == "skip":
        other = queue.skipped.get(request.story_id)
    elif request.action == "add":
        same = (one for one in queue.requests if one.action == "add" and one.story_id == request.story_id)
        other = next((one for one in same if not one.problem), None)
    return other if other is not None and other.number < request.number else None


def who_and_when(request: Request) -> str:
    """``by lea@login1 at 2026-05-01 14:03:07 (request 4)``."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(request.when))
    return f"by {request.who or 'somebody'} at {when} (request {request.number})"


def will_be_applied(replicas: Sequence[RunningReplica]) -> str:
    """Who applies a request, as the end of a sentence."""
    if not replicas:
        return "no job is running here: the next one applies it"
    jobs = len({one.job for one in replicas})
    where = "" if jobs == 1 else f" of {jobs} jobs"
    many = f"{len(replicas)} replicas{where} apply" if len(replicas) > 1 else "the running replica applies"
    return f"{many} it within seconds"


def _why_needless(request: Request, queue: QueueState, found: QueuedStory | None) -> str:
    """Why a request would change nothing; empty where it does."""
    story = request.story_id
    skipped = queue.skipped.get(story)
    match request.action:
        case "pause" if queue.paused is not None:
            return f"the queue is paused already, {who_and_when(queue.paused)}"
        case "resume" if queue.paused is None:
            return "the queue is not paused"
        case "skip" if skipped is not None:
            return f"{story} is skipped already, {who_and_when(skipped)}"
        case "unskip" if skipped is None:
            return f"{story} is not skipped"
        case "first" if skipped is None and queue.first and min(queue.first, key=queue.first.__getitem__) == story:
            return f"{story} is first already"
    if found is not None and request.action in ("skip", "first") and found.state == "finished":
        return f"{story} is finished: nothing of it is left to render"
    if found is not None and request.action == "rerender" and request.seed is None and _is_untouched(found):
        return f"nothing of {story} is rendered yet, so there is nothing to render again; it is rendered in its turn"
    return ""


def _is_untouched(story: QueuedStory) -> bool:
    return story.shots_done == 0 and story.state in ("waiting", "paused", "added", "skipped")


def _effect(request: Request, replicas: Sequence[RunningReplica], queue: QueueState) -> str:
    """What a published request does."""
    name, who = f"request {request.number}: ", will_be_applied(replicas)
    story = request.story_id
    shots = f"{story}:{', '.join(request.shots)}" if request.shots else f"all shots of {story}"
    match request.action:
        case "pause":
            what = "no other shot begins until storymem-queue resume; shots that are rendered now go on"
        case "resume":
            what = "shots begin again"
        case "skip":
            what = f"{story} is skipped; a shot of it that is rendered now stops after its step and keeps its steps"
        case "unskip":
            what = f"{story} is rendered in its turn"
        case "first":
            what = f"{story} comes before all others"
        case "rerender":
            follow = "those that need them keep their clips" if request.only else "those that need them follow"
            seed = "" if request.seed is None else f" with seed {request.seed}"
            hint = f" ({story} is skipped: unskip it)" if story in queue.skipped else ""
            what = f"rendered again: {shots}{seed}, {follow}{hint}"
        case "stop":
            when = "after its step" if request.now else "when its running shots are done"
            if not replicas:
                return f"{name}no job shows a sign of life here; one that runs all the same stops {when}"
            what = f"every job here stops {when}, and can be resumed"
        case _:
            what = f"{story} is added"
    return f"{name}{what}; {who}"
