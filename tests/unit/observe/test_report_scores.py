"""The scores in the report: a column for each measure, the cards of shots, and two runs side by side."""

import json
from pathlib import Path

import pytest

from storymem_dist.artifacts.scores import SCORES_FILE, RunScores, ShotScores, StoryScores, read_scores, write_scores
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.report.model import read_run
from tests.helpers.fake_run import FakeRun


def scored_run(root: Path, sharpness: float, flicker: float) -> Path:
    """One story of two shots; the second one was rendered again after it was scored."""
    run = FakeRun(root, num_stories=1, num_shots=2)
    with run.replica() as replica:
        for shot in range(2):
            run.shot(replica, 0, shot)
        run.finish(replica)
    records = {shot.shot_id: shot.scores for shot in read_run(root).shots}
    assert records == {"shot_01": {}, "shot_02": {}}
    place = run.folder.shot("story_0", "shot_01")
    record = json.loads((root / "stories/story_0/shot_01.json").read_text())
    assert place.shot_id == record["shot_id"]
    shots = {
        "shot_01": ShotScores(clip=record["files"]["clip.mp4"]["sha256"], values={"sharpness": sharpness}),
        "shot_02": ShotScores(clip="0" * 64, values={"sharpness": 999.0}),
    }
    story = StoryScores(values={"sharpness": sharpness, "flicker": flicker}, shots=shots, notes=["a <note>"])
    values = {"consistency_top10": 0.5337, "sharpness": sharpness, "flicker": flicker}
    write_scores(root, RunScores(run_id=run.run_id, written=1.0, values=values, stories={"story_0": story}))
    return root


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    root = scored_run(tmp_path / "run", 12.5, 0.25)
    scores = read_scores(root)
    assert scores is not None and scores.values["consistency_top10"] == 0.5337
    assert scores.stories["story_0"].notes == ["a <note>"]
    assert read_scores(tmp_path) is None


def test_the_report_has_a_column_for_each_measure_and_leaves_out_old_scores(tmp_path: Path) -> None:
    root = scored_run(tmp_path / "run", 12.5, 0.25)
    page = write_report(root, root / "report.html").read_text()
    section = page[page.index('<section id="scores"') :].partition("</section>")[0]
    for name in ("consistency, top 10", "sharpness", "flicker"):
        assert f'<th scope="col" class="num">{name}</th>' in section
    assert "keyframe agreement" not in section, "no shot has it"
    assert "0.5337" in section and "12.5" in section and "a &lt;note&gt;" in section
    assert "999.0" not in page and "older than the clips of story_0/shot_02" in section
    assert '<p class="quiet">sharpness 12.5</p>' in page, "on the shot's card"


@pytest.mark.parametrize("value", ['"high"', "1" + 400 * "0", "true", "null"])
def test_a_run_without_scores_says_so_and_damaged_ones_are_left_out(tmp_path: Path, value: str) -> None:
    root = scored_run(tmp_path / "run", 12.5, 0.25)
    text = f'{{"format": 1, "run_id": "a", "written": 1, "values": {{"sharpness": {value}}}}}'
    (root / SCORES_FILE).write_text(text)
    page = write_report(root, root / "report.html").read_text()
    assert "Not scored yet" in page and "scores.json: " in page
    with pytest.raises(ValueError, match="expected where it holds"):
        read_scores(root)


def test_two_runs_are_compared_and_the_better_one_is_named(tmp_path: Path) -> None:
    one, other = scored_run(tmp_path / "a", 12.5, 0.25), scored_run(tmp_path / "b", 25.0, 0.5)
    page = write_comparison(one, other, tmp_path / "comparison.html").read_text()
    figures = page[page.index('<section id="figures"') :].partition("</section>")[0]
    assert "12.5" in figures and "25.0" in figures and "+100.0 %" in figures
    section = page[page.index('<section id="scores"') :].partition("</section>")[0]
    rows = [row for row in section.split("<tr>") if "story_0" in row]
    better = {name: row.rpartition("<td>")[2][0] for row in rows for name in ("sharpness", "flicker") if name in row}
    assert better == {"sharpness": "B", "flicker": "A"}
