"""What a job chooses once its ranks have started, on devices that are not there: by name and by free memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel import weight_memory
from storymem_dist.parallel.choice import Choice, RankFacts, StartedRanks
from storymem_dist.render import choice as module
from storymem_dist.render import compilation
from storymem_dist.render.check import CheckedJob, check_job
from storymem_dist.render.choice import chooser
from storymem_dist.render.inputs import choose_stories
from storymem_dist.weights.sizes import text_encoder_sizes
from tests.helpers.small_job import render_small, small_point, write_storyboard

H100, RTX5090 = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 5090"
FULL_SIZE = (
    "model.experts=auto",
    "sampler.num_frames=81",
    "sampler.height=480",
    "sampler.width=832",
    "sampler.num_inference_steps=40",
)


@pytest.fixture(autouse=True)
def a_machine(job: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_tool", lambda: None)
    monkeypatch.setattr(module, "has_compiled_code", lambda: False)
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))  # with no measured times


def ranks(number: int, free_gib: float | None, host_gib: float = 1800.0, per_node: int | None = None) -> StartedRanks:
    free = None if free_gib is None else int(free_gib * GIB)
    fact = RankFacts(host="node0", free_bytes=free, host_bytes=int(host_gib * GIB))
    device = torch.device("cpu") if free_gib is None else torch.device("cuda", 0)
    return StartedRanks(device=device, ranks_per_node=per_node or number, facts=[fact] * number)


Chosen = Callable[..., Choice]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckedJob]:
    """Eight stories of three shots, checked with the files of a small model."""
    root = tmp_path_factory.mktemp("job")
    for number in range(8):
        write_storyboard(root / "in" / f"s{number}.json", [[True, False, False]])
    return root, check_job([small_point(f"stories.path='{root / 'in'}'", f"output='{root / 'run'}'", *FULL_SIZE)])


@pytest.fixture
def chosen(job: tuple[Path, CheckedJob], monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Choose for a job of A14B: its sizes stand in for those of the small model."""
    root, checked = job

    def choose(started: StartedRanks, *overrides: str, device: str = H100, stories: int = 8, shots: int = 3) -> Choice:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: device)
        monkeypatch.setattr(weight_memory, "free_device_memory_bytes", lambda _: started.free_bytes)
        given = (f"stories.path='{root / 'in'}'", f"output='{root / 'run'}'", *FULL_SIZE, "model.dtype=bfloat16")
        point = small_point(*given, f"stories.max_stories={stories}", f"stories.max_shots={shots}", *overrides)
        (batch,) = checked.batches
        own = replace(checked, batches=[choose_stories(batch, point.settings.stories)])
        own = replace(own, model=replace(checked.model, dtype="bfloat16", experts=point.settings.model.experts))
        return chooser([point], a14b(own))(started)

    return choose


def a14b(checked: CheckedJob) -> CheckedJob:
    checkpoints = {
        kind: replace(checkpoint, dit_config=getattr(WAN22_A14B, "t2v" if kind == "t2v" else "i2v"))
        for kind, checkpoint in checked.weights.checkpoints.items()
    }
    return replace(checked, weights=replace(checked.weights, checkpoints=checkpoints), num_tokens=48_360)


def test_many_stories_on_cards_that_hold_the_experts_become_replicas(chosen: Chosen) -> None:
    choice = chosen(ranks(8, 78.0))
    assert choice.parallel.axes == (1, 1, 1) and choice.parallel.weights == "replicated"
    assert choice.parallel.free == () and choice.parallel.compile in (True, False)
    assert choice.is_planned and choice.reasons and choice.considered
    assert choice.total_seconds and choice.seconds_per_shot and choice.seconds_per_step
    assert dict(choice.memory_gib)["weights"] > 26


def test_one_story_takes_all_cards(chosen: Chosen) -> None:
    choice = chosen(ranks(8, 78.0), stories=1)
    assert choice.parallel.ranks_per_replica == 8
    alone = chosen(ranks(8, 78.0), "parallel=replicas", stories=1)
    assert (choice.total_seconds or 0) < 0.5 * (alone.total_seconds or 0)


def test_the_fullest_device_counts(chosen: Chosen) -> None:
    """Seven idle cards and one with little left: nothing that needs more than that one has is chosen."""
    started = ranks(8, 78.0)
    full = replace(started.facts[0], free_bytes=20 * GIB)
    choice = chosen(replace(started, facts=[*started.facts[:7], full]))
    assert sum(gib for _, gib in choice.memory_gib) <= 20


@pytest.mark.parametrize(
    ("pins", "axes"),
    [
        (["parallel.cfg=2"], lambda axes: axes[0] == 2),
        (["parallel.cfg=1", "parallel.ring=2"], lambda axes: axes[:2] == (1, 2)),
        (["parallel.num_replicas=2"], lambda axes: axes[0] * axes[1] * axes[2] == 4),
    ],
)
def test_what_is_pinned_stays(chosen: Chosen, pins: list[str], axes: Callable[[tuple[int, ...]], bool]) -> None:
    assert axes(chosen(ranks(8, 78.0), *pins).parallel.axes)


def test_weights_and_experts_can_be_pinned_too(chosen: Chosen) -> None:
    choice = chosen(ranks(8, 78.0), "parallel.weights=fsdp", "model.experts=swap", "parallel.compile=false")
    assert (choice.parallel.weights, choice.experts, choice.parallel.compile) == ("fsdp", "swap", False)
    assert choice.compile_reason == "off: parallel.compile=false"


def test_guidance_passes_stay_together_where_a_shot_has_one(chosen: Chosen) -> None:
    assert chosen(ranks(2, 78.0), "sampler.guidance_scale_low=1", stories=1).parallel.axes[0] == 1


def test_a_preset_stays_as_it_is_and_its_experts_are_chosen(chosen: Chosen) -> None:
    small = chosen(ranks(1, 30.0, per_node=1), "parallel=replicas", device=RTX5090)
    assert small.parallel.axes == (1, 1, 1) and small.parallel.weights == "replicated" and small.experts == "stream"
    large = chosen(ranks(1, 139.0), "parallel=replicas", device="NVIDIA H200")
    assert large.experts == "resident"
    shared = chosen(ranks(8, 22.0), "parallel=fsdp_8gpu", device="NVIDIA GeForce RTX 4090")
    assert shared.parallel.axes == (1, 1, 8) and shared.experts == "resident"


def test_a_long_job_compiles_and_a_short_one_does_not_pay_for_it(chosen: Chosen) -> None:
    long = chosen(ranks(1, 139.0), "parallel=replicas", device="NVIDIA H200", stories=8)
    assert long.parallel.compile is True
    assert "of work are ahead, of which compiled code saves" in long.compile_reason and "on: " in long.compile_reason
    given = ("parallel=replicas", "sampler.num_inference_steps=4")
    short = chosen(ranks(1, 139.0), *given, device="NVIDIA H200", stories=1, shots=1)
    assert short.parallel.compile is False and short.compile_reason.startswith("off: only about ")


def test_nothing_fits_is_one_sentence_with_the_nearest_possible_thing(chosen: Chosen) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(ranks(1, 3.0, host_gib=16.0), device=RTX5090)
    text = str(caught.value)
    assert "no layout fits this job on 1 x 1 NVIDIA GeForce RTX 5090. The nearest is " in text
    assert "GiB" in text and "\n" not in text


def test_one_rank_on_a_cpu_is_not_planned(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_plan", lambda *args: pytest.fail("there is nothing to compare"))
    choice = chosen(ranks(1, None))
    assert choice.parallel.axes == (1, 1, 1) and choice.parallel.weights == "replicated"
    assert (choice.experts, choice.compile_reason) == ("resident", "off: the default on CPUs")
    assert not choice.is_planned


def test_a_finished_job_has_nothing_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    step = "sampler.num_inference_steps=1"
    assert render_small(board, tmp_path / "run", step) == 0
    before = sorted(path for path in tmp_path.rglob("*"))
    point = small_point(f"stories.path='{board}'", f"output='{tmp_path / 'run'}'", step)
    monkeypatch.setattr(module, "make_plan", lambda *args: pytest.fail("nothing is left"))
    choice = chooser([point], check_job([point]))(ranks(4, None))
    assert choice.parallel.axes == (1, 1, 1) and not choice.is_planned
    assert sorted(path for path in tmp_path.rglob("*")) == before, "a choice writes nothing"


def test_the_text_encoder_counts_with_its_own_size(tmp_path: Path) -> None:
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    point = small_point(f"stories.path='{board}'", f"output='{tmp_path / 'run'}'")
    path = check_job([point]).weights.any_checkpoint.text_encoder_path
    assert text_encoder_sizes(path).dim < 100
    choice = chooser([point], check_job([point]))(ranks(4, None, host_gib=8.0))
    assert choice.is_planned, "four of these ranks fit a laptop"
