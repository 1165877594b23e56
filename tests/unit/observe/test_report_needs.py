"""The graph of a story in the report, and the time that is left with it."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import storymem_dist.events as ev
from storymem_dist.observe.report import write_report
from storymem_dist.observe.report.model import read_run
from storymem_dist.observe.report.needs import needs_picture
from storymem_dist.observe.report.views import StoryView
from storymem_dist.observe.run.rates import seconds_left
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import levels
from tests.helpers.fake_run import whole_run

ANCHORED = ((), *((0,) for _ in range(11)))


class Shapes(HTMLParser):
    """The tags of a picture with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> StoryView:
    root = tmp_path_factory.mktemp("runs") / "run"
    whole_run(root, num_stories=1, num_shots=12, max_keyframes=2)
    return read_run(root).stories[0]


def test_twelve_shots_that_need_the_first_alone_stand_in_two_columns_and_no_two_on_one_place(story: StoryView) -> None:
    shapes = Shapes(needs_picture(replace(story, waits_for=ANCHORED)))
    boxes = [(int(box["x"]), int(box["y"])) for box in shapes.all("rect")]
    assert len(boxes) == len(set(boxes)) == 12 and len({x for x, _ in boxes}) == 2
    assert len(shapes.all("path")) == 11
    (picture,) = shapes.all("svg")
    assert int(picture["height"]) < 600 and int(picture["width"]) < 400
    assert [link["data-tip"] for link in shapes.all("a")][1] == "shot_02: finished; waits for shot_01"


def test_a_story_of_the_papers_form_is_a_sentence_and_an_unknown_graph_is_nothing(story: StoryView) -> None:
    chain = tuple((index - 1,) if index else () for index in range(12))
    assert "waits for the one before it" in needs_picture(replace(story, waits_for=chain))
    assert needs_picture(story) == "" and needs_picture(replace(story, waits_for=(*ANCHORED, (0,)))) == ""


def test_levels_count_the_shots_that_come_before_and_leave_out_what_cannot_be() -> None:
    assert levels([(), (0,), (0,), (1, 2), (99, -4, 4)]) == [0, 1, 1, 2, 0]


def test_the_time_left_is_that_of_the_longest_path_not_of_all_shots_of_a_story() -> None:
    def left(waits_for: tuple[tuple[int, ...], ...]) -> float | None:
        state, sequence = RunState(), iter(range(1000))

        def apply(event: ev.Event, at: float, replica: int = 0) -> None:
            stamp = {"wall_time": at, "writer": f"w{replica}", "replica": replica, "sequence": next(sequence)}
            state.apply(ev.StampedEvent(event=event, **stamp))  # type: ignore[arg-type]

        for replica in range(12):
            apply(ev.JobStarted(num_shots=12, num_stories=1), 0.0, replica)
        apply(ev.StoryStarted(story_id="s", num_shots=12, waits_for=waits_for), 0.0)
        apply(ev.ShotStarted(story_id="s", shot_id="shot_01", attempt_id="a"), 0.0)
        apply(ev.ShotFinished(story_id="s", shot_id="shot_01", attempt_id="a"), 10.0)
        return seconds_left(state)

    assert left(()) == 110.0
    assert left(ANCHORED) == 10.0


def test_the_graph_is_in_the_page(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=3, max_keyframes=2)
    with run.replica(1) as replica:
        replica.observers.notify(ev.StoryStarted(story_id="story_0", num_shots=3, waits_for=((), (0,), (0,))))
        run.finish(replica)
    assert '<svg class="graph"' in write_report(tmp_path / "run", tmp_path / "page.html").read_text()
