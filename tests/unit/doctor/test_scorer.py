"""What the doctor says of HPSv3."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from storymem_dist.config.composing import compose_settings
from storymem_dist.config.schema import RenderConfig
from storymem_dist.doctor import job
from storymem_dist.doctor.finding import OK, PROBLEM, Finding
from storymem_dist.doctor.scorer import check_scorer
from tests.helpers.tiny_hpsv3 import WEIGHTS_NAME, write_package, write_tiny_hpsv3


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RenderConfig:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    monkeypatch.chdir(tmp_path)
    write_tiny_hpsv3(tmp_path / "weights" / "HPSv3")
    return compose_settings(["model=tiny", "memory=storymem_hpsv3", "parallel.device=cpu"])


def values(findings: Iterable[Finding]) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.state, finding.value) for finding in findings}


def test_the_scorer_is_counted_next_to_the_experts(settings: RenderConfig) -> None:
    assert values(check_scorer(settings)) == {"hpsv3": (OK, "0.0 GiB for the leader of each replica")}
    state, value = values(job.check_weights(settings))["t2v fit"]
    assert state == OK
    assert value.endswith(", and 0.0 GiB for HPSv3 of each leader (on the host, scoring on the CPU)")
    settings.memory.quality = "sharpness"
    assert "HPSv3" not in values(job.check_weights(settings))["t2v fit"][1]
    assert list(check_scorer(settings)) == []


def test_what_is_missing_is_a_problem_with_the_words_of_the_render(settings: RenderConfig) -> None:
    (Path("weights") / "HPSv3" / WEIGHTS_NAME).unlink()
    (finding,) = check_scorer(settings)
    assert (finding.state, finding.name, finding.value) == (PROBLEM, "hpsv3", "missing")
    assert "run: storymem-weights download hpsv3" in finding.fix
    assert values(job.check_weights(settings))["t2v fit"][0] == OK, "the experts fit all the same"
