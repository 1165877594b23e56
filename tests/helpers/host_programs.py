"""Small models and stories for the Python API, as a host program uses it."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.small_job import SMALL

OVERRIDES = tuple(one for one in SMALL if not one.startswith(("model=", "tracking.", "parallel.")))
"""``SMALL`` as overrides of ``open_models``."""

CUTS = ((True, False), (True,))
SETTINGS_OF_A_HOST = ("parallel=single", "parallel.compile=false")


def storyboard(cuts: Any = CUTS, **extra: object) -> str:
    """The text of a storyboard with the prompts of ``small_job.write_storyboard`` for a file ``fox``."""
    scenes = [
        {
            "scene_num": number,
            "video_prompts": [f"fox: scene {number}, shot {index}" for index in range(len(scene))],
            "cut": list(scene),
        }
        for number, scene in enumerate(cuts, start=1)
    ]
    return json.dumps({"story_name": "Fox", "story_overview": "A test.", "scenes": scenes, **extra})


def clips_of(run: Path) -> dict[str, bytes]:
    """The bytes of the clips and keyframes that people see, by name."""
    files = [*(run / "stories").rglob("shot_*.mp4"), *(run / "stories").glob("*/keyframes/*.png")]
    return {path.relative_to(run / "stories").as_posix(): path.read_bytes() for path in sorted(files)}
