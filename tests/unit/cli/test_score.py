"""``storymem-score``: tables, JSON and exit codes; what is wrong is one line, and other runs are scored."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from storymem_dist.artifacts.scores import MEASURES, RunScores, ShotScores, StoryScores
from storymem_dist.cli.score import _num_processes, main
from storymem_dist.config.composing import compose_settings
from storymem_dist.evaluation.ranks import choose_device
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.evaluation.table import run_table, runs_table
from tests.helpers.fake_run import FakeRun

NO_WEIGHTS = ["evaluation.viclip=none/a", "evaluation.clip_l=none/b", "evaluation.aesthetic=none/c"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = FakeRun(tmp_path_factory.mktemp("run") / "first", num_stories=1, num_shots=2)
    with run.replica() as replica:
        for shot in range(2):
            run.shot(replica, 0, shot)
        run.finish(replica)
    return run.root


def score(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *NO_WEIGHTS])
    return int(ended.value.code or 0)


def test_the_table_has_the_run_its_story_and_its_shots(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(str(root)) == 0
    shown = capsys.readouterr().out
    for text in ("story_0", "shot_01", "shot_02", "seam", "aesthetic quality is left out", "scores.json"):
        assert text in shown
    assert "consistency, overall" not in shown, "it was not computed"


def test_every_number_is_shown_whole_in_80_columns() -> None:
    values = {measure.key: -0.1234 for measure in MEASURES}
    shot = ShotScores(clip="0" * 64, values=values)
    scores = RunScores(
        run_id="x",
        written=0.0,
        values=values,
        stories={"a_story_of_some_length": StoryScores(values=values, shots={"shot_01": shot})},
    )
    file = StringIO()
    console = Console(file=file, width=80)
    root = Path("/a/rather/long/path/of/a/run/folder")
    console.print(run_table(root, scores), runs_table([(root, scores)] * 2))
    shown = file.getvalue()
    assert "…" not in shown
    assert [shown.count(text) for text in ("-0.1234", "-0.123 ", "-0.12 ", "-0.1 ")] == [25, 5, 5, 5]


def test_json_is_what_the_file_holds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(str(root), "--json") == 0
    (printed,) = json.loads(capsys.readouterr().out).values()
    stored = json.loads((root / "scores.json").read_text())
    assert printed["values"] == stored["values"] and printed["stories"]["story_0"]["shots"].keys() == {
        "shot_01",
        "shot_02",
    }


def test_a_bad_run_folder_is_one_line_and_the_others_are_scored(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(str(tmp_path / "none"), str(root)) == 5
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "is not a run folder" in shown.err
    assert "story_0" in shown.out


def test_several_runs_end_with_a_line_for_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(str(root), str(root)) == 0
    assert "all runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch=slurm"], "launch=slurm: scores are computed on one node"),
        (["evaluation.device=tpu"], "evaluation.device='tpu' is not allowed; use one of: auto, cpu, cuda"),
        (["evaluation.viclipp=x"], "evaluation.viclipp"),
        (["launch=torch"], "launch=torch"),
        (["launch=torchrun", "launch.num_nodes=2"], "launch.num_nodes=2: scores are computed on one node"),
        (["model=tiny"], "model=tiny: no run folder has this name, and no setting"),
        (["+evaluation.device=cpu"], "+evaluation.device=cpu: no run folder has this name"),
    ],
)
def test_wrong_settings_are_one_line(
    root: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(str(root), *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_launcher_starts_as_many_processes_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = ["evaluation.device=cpu"]
    assert _num_processes(compose_settings(["launch=torchrun", "launch.processes_per_node=2", *cpu])) == 2
    assert _num_processes(compose_settings(["launch=torchrun", *cpu])) == 1
    assert _num_processes(compose_settings(["launch.processes_per_node=2"])) == 1, "launch=inline is one process"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _num_processes(compose_settings(["launch=torchrun"])) == 4
    assert [choose_device(EvaluationSettings(), rank).index for rank in range(5)] == [0, 1, 2, 3, 0]


def test_a_report_that_is_there_is_written_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "report.html").write_text("old")
    assert score(str(root)) == 0
    assert '<section id="scores"' in (root / "report.html").read_text()


def test_ranks_that_torchrun_started_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert score(str(root)) == 2
    assert "with launch=torchrun" in capsys.readouterr().err


def test_export_prints_what_it_did(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(root), str(tmp_path / "out"), "--layout", "entitybench"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}: 2 clips\n"
    assert (tmp_path / "out" / "story_0" / "001_002.mp4").exists()
