"""``storymem-plan``: tables, JSON and page without weights or a GPU, and one sentence for what cannot be planned."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.shot_workloads import make_chains
from storymem_dist.cli.plan import _write, main
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.hardware import known_hardware
from storymem_dist.planner.page import MOST_BARS, plan_page
from storymem_dist.planner.plan import Plan, PlanJob, make_plan
from storymem_dist.weights.settings import ModelSettings

PINNED = ["parallel.ring=1", "parallel.weights=replicated", "parallel.compile=false"]
JOB = ["stories=examples", "stories.max_stories=1", "stories.max_shots=2", "model.t2v_checkpoint=nowhere", *PINNED]
CARDS = ["hardware=l40s_48g", "hardware.gpus_per_node=2", "hardware.price_per_gpu_hour=2"]


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(str(ended.value.code))


@pytest.fixture(scope="module")
def large_plan() -> Plan:
    stories = make_chains(60)
    job = PlanJob(
        stories=stories, sampler=SamplerSettings(), model=ModelSettings(experts="resident"), dit_config=WAN22_A14B.i2v
    )
    hardware = replace(known_hardware("h100_80g"), nodes=16, device="<script>alert(1)</script> & H100")
    parallel = ParallelSettings(compile=False)
    return make_plan(job, hardware, parallel)


def test_a_plan_without_weights_or_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [f"--json={tmp_path / 'plan.json'}", f"--html={tmp_path / 'pages' / 'plan.html'}"]
    assert _exit_code(*JOB, *CARDS, "output=run", *files) == 0
    text = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert not (tmp_path / "run").exists()
    assert "sizes are those of Wan2.2-A14B" in text
    assert "2 shots of 1 story on 1 node of 2 x L40S (l40s_48g)" in text
    assert f"best: {plan['best']}: " in text
    assert {option["fits"] for option in plan["options"]} == {True, False}
    best = plan["options"][0]
    assert best["layout"] == plan["best"]
    assert best["cost"] == pytest.approx(2 * best["gpu_hours"])
    assert sum(best["phases"][-1]["device_bytes"].values()) == best["phases"][-1]["device_bytes_total"]
    for option in plan["options"]:
        assert option["fits"] or (option["reason"] and option["remedy"])
    assert len(plan["timeline"]) == 2
    assert "does not fit" in (tmp_path / "pages" / "plan.html").read_text()


def test_json_on_the_terminal_is_json_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _exit_code(*JOB, *CARDS, "model.experts=stream", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["pinned"][-1] == "model.experts=stream"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["hardware=h100_80gb"], 2, "h100_80g"),
        (["hardware=h100_80g", "hardware.gpus_per_node=0"], 2, "hardware.gpus_per_node=0"),
        (["hardware=h100_80g", "stories=nowhere.json"], 3, "nowhere.json"),
        (["hardware=l40s_48g", "hardware.gpus_per_node=3", "parallel.cfg=2"], 2, "multiple of 2"),
    ],
)
def test_what_cannot_be_planned_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _exit_code(*JOB, *arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("storymem-plan: error: ")
    assert message in captured.err


def test_what_fits_nowhere_ends_with_2_and_names_what_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["hardware=rtx4090_24g", "hardware.gpus_per_node=1", "model.experts=stream"]
    assert _exit_code(*JOB, *small, "sampler.height=2160", "sampler.width=3840") == 2
    text = capsys.readouterr().out
    assert "nothing fits; the nearest is" in text
    assert re.search(r"the nearest possible: .*\d+x\d+ fits with 81 frames", text)


def test_calibrate_takes_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("calibrate", "stories=examples") == 2
    assert "calibrate takes no overrides" in capsys.readouterr().err


def test_the_page_holds_itself_and_escapes(large_plan: Plan) -> None:
    page = plan_page(large_plan)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; H100" in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "replicas 0-1" in page  # 128 replicas in 64 lanes
    assert len(page) < 3_000_000


def test_a_small_dispatch_is_drawn_shot_by_shot(large_plan: Plan) -> None:
    best = large_plan.options[0]
    few = replace(best, num_replicas=8, timeline=tuple(bar._replace(replica=bar.replica % 8) for bar in best.timeline))
    page = plan_page(replace(large_plan, options=(few,)))
    assert page.count("(m2v)") + page.count("(t2v)") == large_plan.num_shots < MOST_BARS


def test_a_scorer_of_keyframes_is_a_reason_and_on_the_page() -> None:
    stories = make_chains(1)
    job = PlanJob(
        stories=stories, sampler=SamplerSettings(), model=ModelSettings(), dit_config=WAN22_A14B.i2v, scorer_bytes=2**35
    )
    plan = make_plan(job, replace(known_hardware("rtx4090_24g"), gpus_per_node=1), ParallelSettings(compile=False))
    assert plan.best is None
    assert "to choose keyframes (" in plan.options[0].reason
    assert "scorer 3" in plan_page(plan)


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_an_empty_name_of_a_file_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(*JOB, *CARDS, option, "") == 2
    assert "the path is empty" in capsys.readouterr().err


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="it is a folder, a device or a pipe"):
            _write(path, "")


def test_figures_of_this_machine_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=tiny", "hardware.nodes=2", "hardware.gpus_per_node=3", "hardware.price_per_gpu_hour=1"]
    assert _exit_code(*JOB[:3], *given, f"--json={tmp_path / 'plan.json'}") == 0
    hardware = json.loads((tmp_path / "plan.json").read_text())["hardware"]
    assert {name: hardware[name] for name in ("nodes", "gpus_per_node", "price_per_gpu_hour")} == {
        "nodes": 2,
        "gpus_per_node": 3,
        "price_per_gpu_hour": 1.0,
    }
    assert _exit_code(*JOB, *CARDS, "hardware.nodes=65536") == 2
    assert "the nearest that is: 65536 devices in all" in capsys.readouterr().err
