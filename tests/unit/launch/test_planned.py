"""A dry run shows the layout that the job would choose and the time that it may take, from the planner's models."""

from pathlib import Path

import pytest

from storymem_dist.cli.render import run
from storymem_dist.config.composing import compose_settings
from storymem_dist.launch.forecast import describe, hardware_of
from tests.helpers.small_job import render_small, small_point, write_storyboard

ONE_STEP = "sampler.num_inference_steps=1"
CLUSTER = ("launch=slurm", "launch.dry_run=true", "launch.slurm.nodes=2", "launch.slurm.gpus_per_node=4")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_storyboard(tmp_path_factory.mktemp("in") / "fox.json", [[True, False]])


def lines(board: Path, output: Path, *overrides: str) -> list[str]:
    point = small_point(f"stories.path='{board}'", f"output='{output}'", ONE_STEP, *overrides)
    return describe([point], hardware=hardware_of(point.settings)).splitlines()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["hardware=h100_80g"], ("h100_80g", 1, 8)),
        (["hardware=h100_80g", "launch.processes_per_node=2"], ("h100_80g", 1, 2)),
        (["hardware=h100_80g", "hardware.nodes=3"], ("h100_80g", 3, 8)),
        (["hardware=l40s_48g", *CLUSTER], ("l40s_48g", 2, 4)),
        (["launch=torchrun", "launch.processes_per_node=4", "parallel.device=cpu"], ("here", 1, 4)),
        (["parallel.device=cpu"], ("here", 1, 1)),
        ([*CLUSTER], None),
    ],
)
def test_the_hardware_is_what_the_settings_say(overrides: list[str], expected: tuple[str, int, int] | None) -> None:
    found = hardware_of(compose_settings(overrides))
    assert (None if found is None else (found.name, found.nodes, found.gpus_per_node)) == expected


def test_a_described_machine_gets_a_layout_memory_and_a_time(board: Path, tmp_path: Path) -> None:
    said = lines(board, tmp_path / "run", "hardware=h100_80g", "hardware.gpus_per_node=2")
    assert "planned for 1 x 2 H100 80GB (h100_80g)" in said
    (layout,) = [line for line in said if line.startswith("layout: replica ")]
    assert "GiB on each device: " in layout
    assert said[-1].startswith("estimated time: ") and "by the planner's constants (constants of H100" in said[-1]
    assert not (tmp_path / "run").exists()


def test_measured_shots_come_before_the_planners_constants(board: Path, tmp_path: Path) -> None:
    assert render_small(board, tmp_path / "run", ONE_STEP, "stories.max_shots=1") == 0
    said = lines(board, tmp_path / "run", "hardware=h100_80g", "hardware.gpus_per_node=2", "parallel=replicas")
    assert said[-1].endswith(" with 2 replicas like those that rendered 1 shot before, and loading")
    assert [line for line in said if line.startswith("layout: replica 2 x cfg 1 x ring 1 x ulysses 1")]


def test_what_fits_nowhere_ends_a_dry_run_with_the_sentence_of_the_render(
    board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=tiny", f"stories.path='{board}'", f"output='{tmp_path / 'run'}'", "launch.dry_run=true"]
    given += ["hardware=rtx4090_24g", "hardware.memory_gib=0.3", "sampler.num_inference_steps=1"]
    assert run(given) == 2
    error = capsys.readouterr().err
    assert error.count("no layout fits this job on 1 x ") == 1 and error.count("\n") == 1


def test_a_cluster_of_unknown_devices_is_told_how_to_name_them(
    board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=tiny", f"stories.path='{board}'", f"output='{tmp_path / 'run'}'", *CLUSTER]
    assert run(given) == 0
    said = capsys.readouterr().out
    assert "name its devices for a plan, such as hardware=h100_80g" in said
    assert "estimated time: not known" in said
