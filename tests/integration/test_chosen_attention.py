"""A job with ``model.attention=auto`` where there are several kernels; and one with guidance in a part of its steps."""

from pathlib import Path

import pytest
from torch import Tensor

from storymem_dist.events import JobStarted, WarningIssued
from storymem_dist.models.attention import Attend
from storymem_dist.observe.journal import read_journal
from storymem_dist.render import attention as render_attention
from storymem_dist.render import job
from tests.helpers.small_job import render_small, write_storyboard


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return write_storyboard(tmp_path / "fox.json", ((True,),))


def test_all_attention_of_a_job_runs_the_kernel_that_was_chosen_and_the_start_says_so(
    board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()
    forward = Attend.forward

    def noting(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used.add(attend.backend)
        return forward(attend, q, k, v)

    seconds = iter([0.3, 0.1])
    decide = render_attention.decide_attention
    monkeypatch.setattr(render_attention, "CANDIDATES", ("sdpa_flash", "sdpa_math"))
    monkeypatch.setattr(render_attention, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(job, "cudnn_attention_off", lambda: "torch leaves the fastest kernel off")
    monkeypatch.setattr(job, "decide_attention", lambda *a, **k: decide(*a, **k, clock=lambda *_: next(seconds)))
    monkeypatch.setattr(Attend, "forward", noting)
    assert render_small(board, tmp_path / "run") == 0
    events = [stamped.event for stamped in read_journal(tmp_path / "run" / "events")]
    [started] = [event for event in events if isinstance(event, JobStarted)]
    assert started.attention == "sdpa_math (100 ms, 3.00x as fast as sdpa_flash)"
    assert used >= {"sdpa_math"}
    assert "auto" not in used
    [warning] = [event for event in events if isinstance(event, WarningIssued) and event.source == "attention"]
    assert warning.message == "torch leaves the fastest kernel off"
    assert len(list((tmp_path / "cache" / "attention").iterdir())) == 1


def test_a_job_that_is_guided_in_a_part_of_its_steps_renders_other_pixels(board: Path, tmp_path: Path) -> None:
    clips = []
    for name, overrides in (("whole", ()), ("part", ("sampler.guidance_interval=[0.0,0.4]",))):
        assert render_small(board, tmp_path / name, *overrides) == 0
        [clip] = (tmp_path / name).glob("stories/*/shot_01.mp4")
        clips.append(clip.read_bytes())
    assert clips[0] != clips[1]
