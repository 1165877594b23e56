"""The graphs as people open them: in the page of a real server, in headless Chromium.

Needs Chromium, Node.js and the packages of ``tests/browser`` (``npm ci --prefix tests/browser``); skipped without.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.client import NODES, ROOT, Server

BROWSER = ROOT / "tests" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
EXAMPLES = NODES / "example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("node") is None or not (BROWSER / "node_modules").is_dir(),
    reason="needs chromium, node and: npm ci --prefix tests/browser",
)


@pytest.fixture(scope="module")
def views(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the page shows after each graph is opened: one of the older pack and the examples; a picture of the last."""
    paths = [Path(__file__).with_name("old_graph.json"), *(EXAMPLES / f"{name}.json" for name in NAMES)]
    picture = tmp_path_factory.mktemp("browser") / "graph.png"
    command = ["node", str(BROWSER / "graph.mjs"), f"http://{server.address}", *map(str, paths)]
    done = subprocess.run(
        [*command, "--chromium", str(CHROMIUM), "--screenshot", str(picture)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert picture.stat().st_size > 20_000
    return dict(zip([path.stem for path in paths], json.loads(done.stdout), strict=True))


def test_graphs_open_without_red_with_their_widgets_and_queue_their_prompts(views: dict[str, dict[str, Any]]) -> None:
    for view in views.values():
        assert view["errors"] == [] and view["dialogs"] == []
        assert view["nodes"] and all(node["known"] and not node["wrong"] for node in view["nodes"]), view["nodes"]
    for name in NAMES:
        queued = {
            key: {"class_type": one["class_type"], "inputs": one["inputs"]}
            for key, one in views[name]["prompt"].items()
        }
        assert queued == json.loads((EXAMPLES / "api" / f"{name}.json").read_text()), name


def test_a_graph_saved_with_the_older_pack_keeps_its_values(views: dict[str, dict[str, Any]]) -> None:
    view = views["old_graph"]
    widgets = {node["type"]: node["widgets"] for node in view["nodes"]}
    shot = widgets["StoryMemFirstShot"]
    assert int(shot.pop("num_frames")) == 25
    assert shot == {
        "prompt": "A red fox crosses a frozen lake at dawn.",
        "width": 832,
        "height": 480,
        "seed": 42,
        "control_after_generate": "fixed",
        "steps": 50,
        "cfg_scale": 7.5,
        "use_t2v": True,
        "keyframes_to_extract": 3,
    }
    assert widgets["StoryMemModelLoader"] | {"linears": "exact"} == {
        "t2v_model": "Wan2.2-T2V-A14B",
        "i2v_model": "Wan2.2-I2V-A14B",
        "m2v_lora": "MI2V",
        "device": "auto",
        "enable_offload": True,
        "use_fsdp": False,
        "linears": "exact",
    }
    assert view["prompt"]["3"]["inputs"]["memory"] == ["2", 0]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name: str, server: Server) -> None:
    graph = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    for node in graph.values():  # noise, but soon
        node["inputs"] |= {"steps": 2} if "steps" in node["inputs"] else {}
        node["inputs"] |= {"settings": "sampler.num_inference_steps=2"} if "settings" in node["inputs"] else {}
    outputs = server.run(graph)
    assert any(path.suffix == ".mp4" for shown in outputs.values() if "images" in shown for path in server.files(shown))
