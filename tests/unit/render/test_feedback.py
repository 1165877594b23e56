"""What a render measures for the planner: steps with a known size, without those that load, compile or are skipped."""

from pathlib import Path

import pytest
import torch

from storymem_dist.events import Event, NullObserver, ShotStarted, StepFinished
from storymem_dist.planner.calibration import load_constants
from storymem_dist.planner.hardware import hardware_here
from storymem_dist.render import feedback as module
from storymem_dist.render.feedback import LEAST_SECONDS, LEAST_STEPS, Feedback
from tests.helpers.small_job import render_small, write_storyboard


def started(shot: str = "shot_01", num_tokens: int | None = 100, replicas: tuple[int, ...] = ()) -> ShotStarted:
    return ShotStarted(story_id="fox", shot_id=shot, num_tokens=num_tokens, replicas=replicas)


def steps(
    number: int, seconds: float, shot: str = "shot_01", expert: str = "high", reused: bool = False
) -> list[Event]:
    return [
        StepFinished(
            story_id="fox",
            shot_id=shot,
            step=step,
            num_steps=number,
            expert=expert,
            elapsed_seconds=seconds,
            reused=reused,
        )
        for step in range(1, number + 1)
    ]


def recorded(*events: Event) -> list[tuple[float, float, int]]:
    found: list[tuple[float, float, int]] = []
    feedback = Feedback(lambda num_tokens: num_tokens / 100, lambda *figures: found.append(figures))
    observer = feedback.watching(NullObserver())
    for event in events:
        observer.notify(event)
    feedback.close()
    return found


def test_steps_are_compared_with_what_their_size_should_take() -> None:
    of_first = [started(), *steps(1, 60.0), *steps(9, 3.0)]
    of_second = [started("shot_02", 200), *steps(6, 5.0, "shot_02")]
    ((predicted, measured, num_steps),) = recorded(*of_first, *of_second)
    assert (predicted, num_steps) == (pytest.approx((9 * 1.0 + 5 * 2.0) / 14), 14)
    assert measured / predicted == pytest.approx(3.0), "the median step takes three times what was predicted"


def test_the_first_step_of_each_expert_and_of_each_attempt_is_left_out() -> None:
    both = [started(), *steps(6, 10.0), *steps(6, 10.0, expert="low")]
    assert recorded(*both, *both) == [(1.0, 10.0, 20)]


@pytest.mark.parametrize(
    "odd",
    [
        [started(num_tokens=None), *steps(50, 9.0)],
        [started(replicas=(0, 1)), *steps(50, 9.0)],
        [started(), *steps(50, 9.0, reused=True)],
        steps(50, 9.0),
        [started(), *steps(LEAST_STEPS, LEAST_SECONDS)],
        [started(), *steps(100, LEAST_SECONDS / 200)],
    ],
    ids=["no size", "a team of replicas", "skipped by the step cache", "no start", "too few", "too short"],
)
def test_what_says_nothing_about_the_layout_is_not_recorded(odd: list[Event]) -> None:
    assert recorded(*odd) == []


def test_what_a_render_measured_changes_the_next_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)
    hardware = hardware_here(torch.device("cpu"))
    before = load_constants(hardware)
    assert before.num_renders == 0
    assert render_small(board, tmp_path / "run", "sampler.num_inference_steps=12") == 0
    after = load_constants(hardware)
    assert after.num_renders == 1 and after.step_factor != before.step_factor
    assert after.without_renders == before
    (kept,) = (tmp_path / "cache").glob("planner/*.json")
    assert '"num_steps": 10' in kept.read_text(), "twelve steps, without the first one of each expert"
