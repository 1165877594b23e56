"""Small render jobs of the tiny model, in this process: the settings the command line would compose, and stories."""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from storymem_dist.config.composing import register_schema, to_plain, to_settings
from storymem_dist.config.points import Point
from storymem_dist.config.schema import RenderConfig
from storymem_dist.render.job import render_job
from storymem_dist.resources import config_folder

SMALL = (
    "model=tiny",
    "sampler.num_frames=9",
    "sampler.height=32",
    "sampler.width=48",
    "sampler.num_inference_steps=3",
    "memory.quality=none",
    "tracking.console.mode=off",
    "tracking.wandb.mode=off",
    "tracking.report=false",
    "tracking.system_interval_seconds=0",
    "parallel.device=cpu",
)


_PATH = re.compile(r"(stories\.path|output)='([^'\\$]+)'")


def write_storyboard(path: Path, cuts: Sequence[Sequence[bool]], **extra: object) -> Path:
    """A storyboard with one scene per entry of ``cuts``."""
    scenes = [
        {
            "scene_num": number,
            "video_prompts": [f"{path.stem}: scene {number}, shot {index}" for index in range(len(scene))],
            "cut": list(scene),
        }
        for number, scene in enumerate(cuts, start=1)
    ]
    document = {"story_name": path.stem.title(), "story_overview": "A test.", "scenes": scenes, **extra}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def small_settings(*overrides: str) -> RenderConfig:
    """What the command line makes of ``SMALL`` and ``overrides``. Paths of stories and outputs may differ for free."""
    paths = {found[1]: found[2] for override in overrides if (found := _PATH.fullmatch(override))}
    settings = copy.deepcopy(_composed(tuple(one for one in overrides if not _PATH.fullmatch(one))))
    if "stories.path" in paths:
        settings.stories.path = paths["stories.path"]
    return replace(settings, output=paths.get("output", settings.output))


@cache
def _composed(overrides: tuple[str, ...]) -> RenderConfig:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        return to_settings(compose("render", overrides=[*SMALL, *overrides]))


def small_point(*overrides: str, name: str = "") -> Point:
    """The same as one point of a job."""
    settings = small_settings(*overrides)
    return Point(settings=settings, plain=to_plain(settings), name=name)


def render_small(stories: Path, output: Path, *overrides: str) -> int:
    """Render ``stories`` into ``output`` in this process; the exit code."""
    settings = small_settings(f"stories.path='{stories}'", f"output='{output}'", *overrides)
    return render_job([Point(settings=settings, plain=to_plain(settings))])


def media_bytes(run: Path) -> dict[str, bytes]:
    """All videos and pictures that people see, by path in the run folder."""
    stories = run / "stories"
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(stories.rglob("*"))
        if path.suffix in (".mp4", ".png") and "attempts" not in path.parts
    }


def records(run: Path) -> dict[str, dict[str, Any]]:
    """The records of all finished shots, without what may differ between equal runs."""
    found = {}
    for path in sorted((run / "stories").glob("*/shot_*.json")):
        record = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.stem}"] = {k: v for k, v in record.items() if k not in ("timing", "host")}
    return found
