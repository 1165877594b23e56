"""Announces, each once, that a story ended without being complete, and which of its shots are blocked."""

from collections.abc import Iterable, Mapping, Sequence

from storymem_dist.artifacts.run_folder import FailureRecord
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.graph import ShotKey
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.story_graph import StoryGraph


class StoryEnds:
    """What one replica has announced of stories that end with a failure, to the observers of their ``parts``."""

    def __init__(self, parts: Sequence[BatchPart]) -> None:
        self._parts = parts
        self._announced: set[tuple[int, str]] = set()  # see ``announcing.ends_of``

    def know(self, stories: Iterable[StoryGraph]) -> None:
        """Take what has happened to ``stories`` so far as announced."""
        self._announced.update(*(announcing.ends_of(story) for story in stories))

    def announce_blocked(self, story: StoryGraph, failures: Mapping[ShotKey, FailureRecord]) -> None:
        """Announce that a shot of ``story`` has failed and blocks others; ``failures`` say why."""
        for event in announcing.shots_blocked(story, self._announced):
            self._parts[story.part].observers.notify(event)
        self.announce_if_failed(story, failures)

    def announce_if_failed(self, story: StoryGraph, failures: Mapping[ShotKey, FailureRecord]) -> None:
        """Announce that all that can be rendered of ``story`` is, if so, and it is not complete."""
        if story.is_failed and (story.number, "") not in self._announced:
            self._announced.add((story.number, ""))
            self._parts[story.part].observers.notify(announcing.story_failed(story, failures))
