"""Real jobs of the tiny model whose idle replicas render the last shots together: same latents, records and stories."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from storymem_dist.diffusion.denoise import denoise
from storymem_dist.diffusion.solver import Solver
from storymem_dist.dispatch import tail
from storymem_dist.events import Event, StepFinished
from storymem_dist.parallel.progress import ProgressBoard
from storymem_dist.render import clip as render_clip
from storymem_dist.render import job as render_job
from storymem_dist.render.build import Engine
from tests.helpers.lora_shots import write_lora
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.small_job import records, render_small
from tests.helpers.tiny_dit import largest_error
from tests.helpers.workers import quick_folder

TOLERANCE = 1e-5
NUM_STEPS = 4
OVERRIDES = (
    "parallel=replicas",
    "parallel.weights=replicated",
    "parallel.compile=false",
    "model.experts=resident",
    f"sampler.num_inference_steps={NUM_STEPS}",
    "dispatch.checkpoint_every_steps=0",
    "sampler.step_cache_threshold=1.0",
    "dispatch.poll_seconds=0.5",
)
ELASTIC = "dispatch.elastic_tail=always"


def render(
    board: Path, run: Path, *overrides: str, act: Callable[[str, int], None] = lambda fingerprint, step: None
) -> tuple[int, dict[str, Tensor]]:
    """Render; return the exit code and the latents of all shots that this rank denoised, by fingerprint.

    ``act`` is called before each step with the shot's fingerprint and the number of its steps so far.
    """
    steps: list[str] = []
    latents: dict[str, Tensor] = {}
    num_steps = {"taken": 0, "noted": 0}
    step, note = Solver.step, ProgressBoard.note

    def counted(*arguments: Any) -> Tensor:
        act(steps[0], len(steps) - 1)
        steps.append("")
        num_steps["taken"] += 1
        return step(*arguments)

    def noted(board: ProgressBoard, event: Event) -> None:
        num_steps["noted"] += isinstance(event, StepFinished)
        note(board, event)

    def kept(*arguments: Any, **options: Any) -> Tensor:
        steps[:] = [options["fingerprint"]]
        made = denoise(*arguments, **options)
        latents[options["fingerprint"]] = made
        return made

    with (
        patch.object(Solver, "step", counted),
        patch.object(ProgressBoard, "note", noted),
        patch.object(render_clip, "denoise", kept),
        patch.object(tail, "_LONGEST_HOLD", 100.0),  # a busy machine may delay one rank by seconds
    ):
        code = render_small(board, run, *OVERRIDES, *overrides)
    assert num_steps["noted"] == num_steps["taken"], "each rank shows signs of life, whichever reports the shot"
    return code, latents


def with_various_experts(board: Path, run: Path) -> tuple[int, dict[str, Tensor]]:
    """The last rank has loaded the experts of M2V when the job begins, and loading others always pays."""

    def load(parts: Any, engine: Engine, *arguments: Any, **options: Any) -> str:
        engine.clips.prepare(kind := "m2v" if os.environ["RANK"] == "3" else "t2v")
        return kind

    with (
        patch.object(render_job, "_load_together", load),
        patch.object(tail.ElasticTail, "_able", lambda *given: given[1]),
    ):
        return render(board, run, ELASTIC, "model.experts=stream")


def killed(board: Path, run: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]]:
    """Kill the rank that helps in the second step of a shot; the other is then asked to stop, as torchrun would."""

    def act(of: str, step: int) -> None:
        if (of, step) == (fingerprint, 1):
            holder = json.loads(next((run / "leases").glob("*.0.lease")).read_text())
            if holder["pid"] != os.getpid():
                os.kill(holder["pid"], signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGKILL)

    return render(board, run, ELASTIC, act=act)


def stopped(board: Path, run: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]]:
    """Stop all ranks in the second step of a shot."""

    def act(of: str, step: int) -> None:
        if (of, step) == (fingerprint, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    return render(board, run, ELASTIC, "parallel.ulysses=2", act=act)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    return sorted((line for line in lines if line["event"] == name), key=lambda line: line["wall_time"])


@dataclass(frozen=True)
class Alone:
    """A storyboard of three shots in a chain, the second with a LoRA of its own, and what one rank makes of it."""

    board: Path
    run: Path
    latents: dict[str, Tensor]

    def fingerprint(self, shot: str) -> str:
        return str(records(self.run)[f"fox/{shot}"]["fingerprint"])


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with quick_folder() as folder:
        lora = write_lora(folder / "style.safetensors", 1)
        shots: list[dict[str, Any]] = [{"prompt": f"a fox, {number}", "cut": number != 1} for number in range(3)]
        shots[1]["loras"] = [lora]
        board = folder / "fox.json"
        board.write_text(
            json.dumps({"story_name": "Fox", "story_overview": "", "scenes": [{"scene_num": 1, "shots": shots}]})
        )
        ((code, latents),) = run_ranks(render, 1, (board, folder / "run"))
        assert code == 0 and len(latents) == 3
        yield Alone(board, folder / "run", latents)


def require_equal(found: list[tuple[int, dict[str, Tensor]]], alone: Alone, run: Path) -> None:
    """All ranks ended well, with latents and records of one rank."""
    assert [code for code, _ in found] == [0] * len(found)
    for _, latents in found:
        for fingerprint, one in latents.items():
            assert largest_error(one, alone.latents[fingerprint]) <= TOLERANCE
    frames = [
        {
            shot: (record["fingerprint"], record["seed"], [kept["frame_index"] for kept in record["keyframes"]])
            for shot, record in records(which).items()
        }
        for which in (run, alone.run)
    ]
    assert frames[0] == frames[1] and len(frames[0]) == 3
    assert (run / "stories/fox/story.mp4").exists()
    assert not list((run / "leases").glob("*.lease"))


def require_shared(run: Path, size: int) -> None:
    """At least one shot was rendered by ``size`` replicas of four ranks together, and reported by one of them."""
    together = [event for event in events(run, "ShotStarted") if event["replicas"] == list(range(size))]
    assert together, "no shot was rendered by all replicas together"
    assert all(event["num_devices"] == 4 for event in together)
    finished = {event["shot_id"] for event in events(run, "ShotFinished")}
    for event in together:
        shot, helped = event["shot_id"], events(run, "ReplicaHelped")
        helpers = sorted(one["replica"] for one in helped if one["shot_id"] == shot)
        assert helpers == [replica for replica in range(size) if replica != event["replica"]]
        assert {one["leader"] for one in helped if one["shot_id"] == shot} == {event["replica"]}
        if shot in finished:
            record = json.loads((run / f"stories/fox/{shot}.json").read_text())
            assert record["host"]["replicas"] == list(range(size))
    steps = [(event["shot_id"], event["step"]) for event in events(run, "StepFinished")]
    assert len(steps) == len(set(steps)), "one replica alone reports a shot"


def test_the_last_shots_of_merged_replicas_are_those_of_one_rank(alone: Alone, tmp_path: Path) -> None:
    """With streamed experts, of different kinds at first, a LoRA of one shot, and steps from the step cache."""
    run = tmp_path / "run"
    require_equal(run_ranks(with_various_experts, 4, (alone.board, run)), alone, run)
    require_shared(run, 4)
    assert [event["shot_id"] for event in events(run, "LorasUsed")] == ["shot_02"]
    assert any(event["reused"] for event in events(run, "StepFinished"))


def test_a_stop_in_a_shot_of_merged_replicas_keeps_its_checkpoint(alone: Alone, tmp_path: Path) -> None:
    """Here with two replicas of two ranks each, whose tokens are spread already."""
    run = tmp_path / "run"
    found = run_ranks(stopped, 4, (alone.board, run, alone.fingerprint("shot_03")))
    assert [code for code, _ in found] == [0] * 4
    assert json.loads((run / "stop.json").read_text())["state"] == "stopped"
    assert events(run, "ShotStarted")[-1]["replicas"] == [0, 1]
    assert len(list(run.glob("checkpoints/**/*.safetensors"))) == 1
    require_shared(run, 2)
    require_equal([*run_ranks(render, 1, (alone.board, run)), *((0, latents) for _, latents in found)], alone, run)
    assert [(event["shot_id"], event["step"]) for event in events(run, "ShotResumed")] == [("shot_03", 2)]


def test_after_a_kill_in_a_shot_of_merged_replicas_two_groups_of_ranks_go_on_together(
    alone: Alone, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match="died with exit code -9"):
        run_ranks(killed, 2, (alone.board, run, alone.fingerprint("shot_01")))
    (begun,) = events(run, "ShotStarted")
    assert begun["replicas"] == [0, 1]

    found = dict[int, list[tuple[int, dict[str, Tensor]]]]()

    def go_on(group: int) -> None:
        env = {"STORYMEM_JOB_ID": f"job-{group}"}
        found[group] = run_ranks(render, 2, (alone.board, run, ELASTIC), env=env)

    threads = [threading.Thread(target=go_on, args=(group,)) for group in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require_equal([*found[0], *found[1]], alone, run)
    after = events(run, "ShotStarted")[1:]
    assert [event["shot_id"] for event in after] == ["shot_01", "shot_02", "shot_03"], "each shot once"
    assert after[0]["replicas"] == [], "a process died on it, so one replica renders it"
    assert [0, 1] in [event["replicas"] for event in after]
