"""Adds storyboards to the queue of a run folder: each as a request that holds the checked story.

They are read as a render reads them. A bad one is refused alone. What only the settings of the job can tell (its sizes,
its memory) is checked by the job that takes the story.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from storymem_dist.artifacts.requests import Request, check_request
from storymem_dist.errors import ConfigError, StoryboardError, require_whole
from storymem_dist.observe.queue.asking import came_first, publish, who_and_when, writing_to
from storymem_dist.observe.queue.known import known_stories, read_requests
from storymem_dist.story.listing import MAX_PRIORITY
from storymem_dist.story.loading import folded_id, load_storyboards, story_id_from
from storymem_dist.story.schema import Story
from storymem_dist.story.values import MAX_SEED


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryOptions:
    """What a person sets for all storyboards of one call; None leaves what they say. ``is_first``: before all others.

    Several storyboards with one ``story_id`` are numbered, as in a list. Raises ``ConfigError``.
    """

    story_id: str | None = None
    priority: int | None = None
    seed: int | None = None
    is_first: bool = False

    def __post_init__(self) -> None:
        if self.story_id is not None and not self.story_id.strip():
            raise ConfigError("--id is empty; give a name")
        if self.priority is not None:
            require_whole("--priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.seed is not None:
            require_whole("--seed", self.seed, 0, MAX_SEED)

    def applied_to(self, stories: Sequence[Story]) -> list[Story]:
        """The stories with these options over what their storyboards say."""
        changed = []
        for number, story in enumerate(stories, start=1):
            story_id = story.story_id
            if self.story_id is not None:
                story_id = story_id_from(self.story_id if len(stories) == 1 else f"{self.story_id}-{number}")
            priority = story.priority if self.priority is None else self.priority
            seed = story.seed if self.seed is None else self.seed
            changed.append(replace(story, story_id=story_id, priority=priority, seed=seed))
        return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """Stories that were added, in the order of the call; and why others were refused. The texts are not escaped."""

    stories: tuple[Story, ...]
    refused: tuple[str, ...]
    warnings: tuple[str, ...]


def add_stories(root: Path, entries: Sequence[str | Path], options: StoryOptions, *, via: str) -> Added:
    """Add the storyboards that ``entries`` name (files, folders, globs, lists) to the queue of the run folder ``root``.

    Raises as ``asking.ask`` when the folder cannot be used.
    """
    with writing_to(root):
        log, queue = read_requests(root)
        taken = {folded_id(story_id): story_id for story_id in known_stories(root, queue)}
        try:
            batch = load_storyboards(entries)
        except StoryboardError as error:
            return Added(stories=(), refused=(str(error),), warnings=())
        refused = [one.message for one in batch.rejected]
        added: list[Story] = []
        for story in options.applied_to(batch.stories):
            request = Request(action="add", story_id=story.story_id, story=story, via=via)
            try:
                other = taken.get(folded_id(story.story_id), "")
                check_request(request, {story.story_id: ()} if other else {})
            except ConfigError as error:
                refused.append(f"{story.source}: {error}" + (" (--id NAME gives another)" if other else ""))
                continue
            published = publish(log, queue, request)
            if (first := came_first(published, queue)) is not None:
                refused.append(f"{story.source}: the story id {story.story_id} was taken, {who_and_when(first)}")
                continue
            taken[folded_id(story.story_id)] = story.story_id
            added.append(story)
        if options.is_first:
            for story in reversed(added):  # the newest request comes first
                publish(log, queue, Request(action="first", story_id=story.story_id, via=via))
    return Added(stories=tuple(added), refused=tuple(refused), warnings=batch.all_warnings)
