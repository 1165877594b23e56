"""``storymem-queue``: lists the queue of a run folder and changes it, while jobs run or before the next one starts.

``observe.queue`` reads, checks and publishes; here are arguments and words.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from storymem_dist.artifacts.requests import Request
from storymem_dist.cli.arguments import a_path
from storymem_dist.errors import StoryboardError, StoryMemError, require_whole
from storymem_dist.observe.queue.adding import StoryOptions, add_stories
from storymem_dist.observe.queue.asking import ask, who_and_when, will_be_applied, writing_to
from storymem_dist.observe.queue.known import find_shots, known_stories, read_requests
from storymem_dist.observe.queue.view import QueuedStory, QueueView, read_queue
from storymem_dist.observe.run import format as fmt
from storymem_dist.story.values import MAX_SEED
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error, print_line, print_lines
from storymem_dist.terminal.text import printable

_VIA = "storymem-queue"
_MOST_NAMED = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """List or change the queue of one run folder; return the exit code."""
    with program("storymem-queue"):
        given = _parser().parse_args(arguments)
        try:
            return _run(given)
        except StoryMemError as error:
            print_error(f"storymem-queue: error: {printable(error)}")
            return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="storymem-queue",
        description="List the queue of a run folder, or change it: at any time, also while jobs render. Running jobs "
        "apply a request within seconds; where none runs, the next one does.",
    )
    parser.add_argument("run", type=a_path, metavar="RUN", help="run folder (output= of a render)")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    listing = actions.add_parser("list", help="all stories with state, place in the queue and time left (the default)")
    listing.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the list as JSON")
    add = actions.add_parser("add", help="add storyboards: files, folders, globs, and lists of them (JSON Lines)")
    add.add_argument("files", nargs="+", metavar="FILE")
    add.add_argument("--id", metavar="NAME", help="the story's id in the run folder (several stories are numbered)")
    add.add_argument("--priority", type=int, metavar="N", help="stories of a lower priority start first (default: 0)")
    add.add_argument("--seed", type=int, metavar="N", help="the story's seed")
    add.add_argument("--first", action="store_true", help="before all other stories")
    actions.add_parser("pause", help="no other shot begins, in any job, until resume")
    actions.add_parser("resume", help="end a pause")
    for action, text in (
        ("skip", "leave stories out; a shot that is rendered now stops after its step and keeps its steps"),
        ("unskip", "take a skip back"),
        ("first", "put stories before all others, in the order given"),
    ):
        actions.add_parser(action, help=text).add_argument("stories", nargs="+", metavar="STORY")
    again = actions.add_parser("rerender", help="render shots again, and those that need them")
    again.add_argument("shots", nargs="+", metavar="STORY[:SHOT]", help="ocean, ocean:3, ocean:shot_03, ocean:NAME")
    again.add_argument("--only", action="store_true", help="shots that need these keep their clips")
    again.add_argument("--seed", type=int, metavar="N", help="with another seed, from then on")
    stop = actions.add_parser("stop", help="end all jobs here when their running shots are done")
    stop.add_argument("--now", action="store_true", help="after the running step; the next job continues inside a shot")
    return parser


def _run(given: argparse.Namespace) -> int:
    action, root = given.action or "list", given.run
    if action == "list":
        with writing_to(root):
            view = read_queue(root)
        _print_queue(root, view, as_json=given.json)
        return 0
    if action == "add":
        options = StoryOptions(story_id=given.id, priority=given.priority, seed=given.seed, is_first=given.first)
        return _add(root, given.files, options)
    if action in ("skip", "unskip", "first"):
        names = list(dict.fromkeys(given.stories))
        asked = [Request(action=action, story_id=name, via=_VIA) for name in names]
        if action == "first":
            asked.reverse()  # the newest request comes first
    elif action == "rerender":
        if given.seed is not None:
            require_whole("--seed", given.seed, 0, MAX_SEED)
        with writing_to(root):
            queue = read_requests(root)[1]
            found = find_shots(root, queue, known_stories(root, queue), given.shots)
        asked = [
            Request(action=action, story_id=story_id, shots=shots, only=given.only, seed=given.seed, via=_VIA)
            for story_id, shots in found.items()
        ]
    else:
        asked = [Request(action=action, now=action == "stop" and given.now, via=_VIA)]
    for answer in ask(root, asked):
        print_line(printable(answer.text))
    return 0


def _add(root: Path, files: Sequence[str], options: StoryOptions) -> int:
    added = add_stories(root, files, options, via=_VIA)
    for message in added.refused:
        print_error(f"storymem-queue: error: {printable(message)}")
    for warning in added.warnings:
        print_error(f"storymem-queue: warning: {printable(warning)}")
    if added.stories:
        view = read_queue(root)
        places = {story.story_id: story.place for story in view.stories}
        for story in added.stories[:_MOST_NAMED]:
            place = f", place {places[story.story_id]}" if places.get(story.story_id) else ""
            print_line(printable(f"added {story.story_id}: {fmt.count(len(story.shots), 'shot')}{place}"))
        if len(added.stories) > _MOST_NAMED:
            print_line(f"and {fmt.count(len(added.stories) - _MOST_NAMED, 'other story', 'other stories')}")
        print_line(will_be_applied(view.replicas))
    return StoryboardError.exit_code if added.refused else 0


# -- the list ----------------------------------------------------------------------------------------------------------


def _print_queue(root: Path, view: QueueView, *, as_json: bool) -> None:
    if as_json:
        print_lines(json.dumps(view.as_json(), indent=1).splitlines())
        return
    left = "unknown" if view.seconds_left is None else fmt.duration(view.seconds_left)
    print_line(
        printable(f"{root}: {view.shots_done:,} of {fmt.count(view.shots_total, 'shot')} done, time left: {left}")
    )
    jobs = len({replica.job for replica in view.replicas})
    replicas = fmt.count(len(view.replicas), "replica")
    print_line(f"{replicas} of {fmt.count(jobs, 'job')} at work" if jobs else "no job is running")
    if view.paused is not None:
        print_line(printable(f"paused {who_and_when(view.paused)}"))
    if view.stories:
        SafeConsole(highlight=False).print(_table(view.stories))
    for request in view.pending[:_MOST_NAMED]:
        print_line(printable(f"not yet applied: {request.describe()} {who_and_when(request)}"))
    if len(view.pending) > _MOST_NAMED:
        print_line(f"and {fmt.count(len(view.pending) - _MOST_NAMED, 'other request')}")
    if view.pending:
        print_line(will_be_applied(view.replicas))
    for request in view.damaged[:_MOST_NAMED]:
        print_line(printable(f"without effect: request {request.number} ({request.describe()}): {request.problem}"))


def _table(stories: Sequence[QueuedStory]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, is_number in (
        ("place", True),
        ("story", False),
        ("state", False),
        ("shots", True),
        ("left", True),
        ("priority", True),
        ("", False),
    ):
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for story in stories:
        left = "" if story.place is None else "unknown" if story.seconds_left is None else _about(story.seconds_left)
        table.add_row(
            "" if story.place is None else str(story.place),
            Text(printable(story.story_id)),
            story.state,
            f"{story.shots_done}/{story.shots_total}",
            left,
            "first" if story.is_first else str(story.priority),
            Text(printable(story.message)),
        )
    return table


def _about(seconds: float) -> str:
    return fmt.duration(float(round(seconds)))


if __name__ == "__main__":
    sys.exit(main())
