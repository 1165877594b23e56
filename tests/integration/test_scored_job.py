"""``evaluation=on_finish``: a whole job is scored at its end, and its exit code never depends on that."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from storymem_dist.artifacts.scores import read_scores
from storymem_dist.evaluation import on_finish
from storymem_dist.evaluation.export import export_run
from storymem_dist.render import job
from tests.helpers.small_job import render_small, small_point, write_storyboard


def test_a_job_is_scored_when_it_ends_whatever_comes_of_that(tmp_path: Path) -> None:
    story, run = write_storyboard(tmp_path / "in" / "fox.json", ((True, False),)), tmp_path / "run"
    assert render_small(story, run, "evaluation=on_finish", "evaluation.device=cpu") == 0
    scores = read_scores(run)
    assert scores is not None and list(scores.stories["fox"].shots) == ["shot_01", "shot_02"]
    assert {"sharpness", "flicker", "seam"} <= set(scores.stories["fox"].shots["shot_02"].values)
    assert len(scores.notes) == 2, "no weights are here: one sentence for each model"
    assert export_run(run, tmp_path / "out", "storymem").num_files == 2

    with patch.object(on_finish, "_in_own_process", return_value="signal 9") as started:
        assert render_small(story, run, "evaluation=on_finish") == 0
        assert started.call_count == 1


@pytest.mark.parametrize(
    ("state", "is_leader", "scored"),
    [("done", True, 2), ("failed", True, 2), ("stopped", True, 0), ("done", False, 0)],
)
def test_the_leader_of_a_replica_scores_every_run_that_was_not_stopped(
    tmp_path: Path, state: str, is_leader: bool, scored: int
) -> None:
    points = [small_point(f"output='{tmp_path / name}'", "evaluation=on_finish") for name in "ab"]
    session, summary = SimpleNamespace(is_leader=is_leader, rank=1), SimpleNamespace(state=state)
    outcome = SimpleNamespace(session=session, summary=summary, batches=[], exit_code=7)
    with patch.object(job, "run_job", return_value=outcome), patch.object(job, "score_finished_run") as score:
        assert job.render_job(points) == 7
    assert [call.args[0].name for call in score.call_args_list] == ["a", "b"][:scored]
