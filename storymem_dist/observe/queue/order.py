"""The order in which a job renders stories, as a reader knows it: the rule of ``dispatch.graph`` in few words."""

from collections.abc import Callable

from storymem_dist.artifacts.requests import QueueState
from storymem_dist.observe.run.state import RunState

Place = tuple[bool, int, int, str]


def queue_order(state: RunState, queue: QueueState) -> Callable[[str, bool], Place]:
    """Return a function of a story's id and whether it is running: what stories are sorted by.

    The running ones come first, then those of a lower priority. A request to put one first is a lower priority than
    any. Stories of one priority come as their jobs announced them, then those that no job has taken, as they were
    added. Which of these a replica takes next also depends on their length and on the weights it has loaded.
    """
    added = {story_id: len(state.stories) + number for number, story_id in enumerate(queue.added)}

    def place(story_id: str, is_running: bool) -> Place:
        story = state.stories.get(story_id)
        if story is not None:
            priority, number = story.priority, story.number
        else:
            found = queue.added.get(story_id)
            priority, number = found.priority if found is not None else 0, added.get(story_id, len(state.stories))
        return (not is_running, queue.first.get(story_id, priority), number, story_id)

    return place
