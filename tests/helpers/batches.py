"""One call that renders a small batch with the fake renderer, and helpers shared by tests of batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import Events, FakeRenderer, make_part, make_story

STORIES = [make_story("ocean", 4), make_story("city", 2)]


def render(
    root: Path,
    stories: list[Story] | None = None,
    *,
    renderer: FakeRenderer | None = None,
    events: Events | None = None,
    stop: StopSwitch | None = None,
    replica: Replica | None = None,
    check_contents: bool = False,
    part: dict[str, Any] | None = None,
    **settings: Any,
) -> BatchSummary:
    settings = {"poll_seconds": 0.01, "lease_seconds": 1.0, "checkpoint_every_steps": 0, **settings}
    return render_batch(
        parts=[make_part(root, STORIES if stories is None else stories, observers=events or Events(), **(part or {}))],
        renderer=renderer or FakeRenderer(),
        settings=DispatchSettings(**settings),
        stop=stop,
        replica=replica,
        check_contents=check_contents,
    )


def inodes(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_ino for path in (root / "stories").rglob("*") if path.is_file()}


def fail_at(name: str, make_error: Callable[[], BaseException], times: int = 10**9) -> Callable[[ShotJob, int], None]:
    """A ``before_step`` that raises in the first ``times`` attempts at one shot."""
    left = [times]

    def before_step(job: ShotJob, step: int) -> None:
        if f"{job.story_id}:{job.shot_id}" == name and left[0] > 0:
            left[0] -= 1
            raise make_error()

    return before_step
