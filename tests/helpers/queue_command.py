"""``storymem-queue`` in this process, and a run folder for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.requests import RequestLog
from storymem_dist.cli.queue import main
from tests.helpers.fake_run import FakeRun

BOARD = {"story_name": "new", "scenes": [{"scene_num": 1, "video_prompts": ["a", "b"], "cut": [True, False]}]}


def killed_run(root: Path) -> FakeRun:
    """A run whose job was killed: story_0 is complete, story_1 has one shot, story_2 and story_3 have none."""
    run = FakeRun(root, num_stories=4, num_shots=3)
    with run.replica(0) as replica:
        for shot in range(3):
            run.shot(replica, 0, shot)
        run.finish_story(replica, 0)
        run.shot(replica, 1, 0)
    return run


def copy_of(run: FakeRun, root: Path) -> FakeRun:
    """The same run in another folder."""
    shutil.copytree(run.root, root)
    copy = FakeRun(root, num_stories=run.num_stories, num_shots=run.num_shots)
    copy._starts = run._starts
    return copy


def storyboard(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**BOARD, **changes}))
    return path


class Said:
    """What a command printed and returned."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        self.code = main([str(one) for one in arguments])
        self.out, self.err = capsys.readouterr()


def listed(capsys: pytest.CaptureFixture[str], root: Path) -> dict[str, Any]:
    said = Said(capsys, root, "--json")
    assert said.code == 0 and not said.err
    values: dict[str, Any] = json.loads(said.out)
    return values


def states(capsys: pytest.CaptureFixture[str], root: Path) -> list[tuple[str, str, int | None]]:
    return [(one["story_id"], one["state"], one["place"]) for one in listed(capsys, root)["stories"]]


def asked(root: Path) -> list[str]:
    return [request.describe() for request in RequestLog(root).read_new()]
