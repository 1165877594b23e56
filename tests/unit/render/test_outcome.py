"""The last line of a job counts every storyboard file and every replica's shots."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storymem_dist.dispatch.summary import Replica
from storymem_dist.render.outcome import last_line, print_outcome
from storymem_dist.story.loading import StoryBatch
from tests.helpers.batches import STORIES, render
from tests.helpers.fake_renderer import FakeRenderer
from tests.helpers.workers import exit_code, start_worker


def test_refused_files_are_no_stories_that_are_done(tmp_path: Path) -> None:
    summary = render(tmp_path / "run", part={"num_refused": 10})
    assert last_line(summary) == (
        "done: 2 of 12 stories are done; 10 files refused; 6 shots rendered, 0 found finished, 0 failed, "
        "0 blocked by them"
    )
    again = render(tmp_path / "run", part={"num_refused": 1})
    assert last_line(again) == (
        "done: 2 of 3 stories are done; 1 file refused; 0 shots rendered, 6 found finished, 0 failed, 0 blocked by them"
    )


def test_the_end_counts_the_warnings_and_says_where_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my run"
    summary = render(output)
    point: Any = SimpleNamespace(name="seed=1", settings=SimpleNamespace(output=str(output)))
    session: Any = SimpleNamespace(rank=0)
    for warnings in ((), ("a", "b")):
        story = replace(STORIES[0], warnings=warnings)
        print_outcome([point], [StoryBatch(stories=(story,), rejected=())], summary, session)
        said = f"seed=1: 2 warnings about storyboards: storymem-report '{output}' shows them"
        assert (said in capfd.readouterr().out.splitlines()) == bool(warnings)


def test_shots_of_all_replicas_count(tmp_path: Path) -> None:
    peer = start_worker(tmp_path / "run", STORIES, step_seconds=0.05, replica=Replica(index=1, count=2, job_id="job"))
    summary = render(
        tmp_path / "run", renderer=FakeRenderer(step_seconds=0.05), replica=Replica(index=0, count=2, job_id="job")
    )
    assert exit_code(peer) == 0
    assert summary.num_rendered < 6
    assert summary.num_finished == 6
    assert "2 of 2 stories are done; " in last_line(summary)
