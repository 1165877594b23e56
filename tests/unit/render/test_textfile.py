"""The file for Prometheus: a place that cannot be written ends a job before it begins, and each part has its own."""

from pathlib import Path

import pytest

from storymem_dist.errors import ConfigError
from storymem_dist.observe.settings import ConsoleSettings, PrometheusSettings, TrackingSettings
from storymem_dist.render.check import check_job
from storymem_dist.render.job import tracking_of_part
from tests.helpers.small_job import small_point


@pytest.mark.parametrize(
    ("rank", "overrides", "is_refused"),
    [
        (None, [], True),
        (None, ["launch=torchrun"], True),
        ("0", [], False),  # a rank that starts again must not end for it
        (None, ["launch=slurm"], False),  # its ranks run elsewhere
    ],
)
def test_a_folder_that_is_not_there_is_refused_where_ranks_will_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, overrides: list[str], is_refused: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    textfile = f"tracking.prometheus.textfile='{tmp_path}/none/x.prom'"
    point = small_point(f"stories.path='{tmp_path}/no.json'", textfile, *overrides)
    with pytest.raises(Exception, match="x.prom cannot be written" if is_refused else "no.json") as refused:
        check_job([point])
    assert isinstance(refused.value, ConfigError) is is_refused


def test_each_part_of_a_joined_sweep_has_a_file_and_plain_lines() -> None:
    tracking = TrackingSettings(
        console=ConsoleSettings(mode="live"), prometheus=PrometheusSettings(textfile="/a/night.prom")
    )
    parts = [tracking_of_part(tracking, number, num_parts=2) for number in range(2)]
    assert [part.prometheus.textfile for part in parts] == ["/a/night.point0.prom", "/a/night.point1.prom"]
    assert {part.console.mode for part in parts} == {"plain"}
    assert tracking_of_part(tracking, 0, num_parts=1) == tracking
    off = TrackingSettings(console=ConsoleSettings(mode="off"))
    assert tracking_of_part(off, 1, num_parts=2) == off
