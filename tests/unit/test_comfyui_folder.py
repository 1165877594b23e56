"""The folder that goes into ComfyUI's ``custom_nodes``, where no server is needed (``tests/comfyui`` starts one)."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "comfyui"
EXAMPLES = FOLDER / "example_workflows"
NAMES = ("first_shot", "three_shots", "storyboard")

ENTER = """\
import asyncio, importlib.util, sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
spec = importlib.util.spec_from_file_location("nodes", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "ComfyUI would take it for an older kind of pack"
try:
    asyncio.run(module.comfy_entrypoint())
except ImportError as error:
    print(error)
"""


def test_where_the_package_is_missing_one_line_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENTER, str(FOLDER / "__init__.py")]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert said.stdout.count("\n") == 1 and "storymem_dist" in said.stdout
    assert f'"{sys.executable}" -m pip install' in said.stdout


def test_the_registry_knows_the_pack() -> None:
    described = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert described["project"]["version"] == project["version"]
    assert described["project"]["requires-python"] == project["requires-python"]
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(described["tool"]["comfy"])
    assert not [one for one in described["project"]["dependencies"] if "==" in one], "a pin keeps other packs out"


def test_modules_stay_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 400 for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_the_same_in_both_formats(name: str) -> None:
    saved = {str(node["id"]): node for node in json.loads((EXAMPLES / f"{name}.json").read_text())["nodes"]}
    prompt: dict[str, Any] = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    assert {key: node["class_type"] for key, node in prompt.items()} == {key: one["type"] for key, one in saved.items()}
    for key, node in prompt.items():
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        widgets = [value for value in saved[key].get("widgets_values", []) if value != "fixed"]
        assert values == widgets, (key, node["class_type"])
        links = {one for one, value in node["inputs"].items() if isinstance(value, list)}
        assert links == {one["name"] for one in saved[key]["inputs"] if one.get("link") is not None}
