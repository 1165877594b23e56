"""Whole storyboards through the Python API: the run folders of the command, interrupted, continued and changed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem_dist.artifacts.video import write_png
from storymem_dist.errors import ConfigError, ShotError, StoryboardError, StoryMemError
from storymem_dist.events import ShotStarted, StampedEvent
from storymem_dist.pipeline import (
    Interrupted,
    Progress,
    StoryMemory,
    StoryModels,
    StoryOutput,
    check_story,
    child,
    open_models,
    render_shot,
    render_story,
    save_video,
    story_files,
    story_seed,
)
from storymem_dist.render import shot as shot_module
from tests.helpers.host_programs import CUTS, OVERRIDES, clips_of, storyboard
from tests.helpers.small_job import media_bytes, records, render_small, write_storyboard

FEW = ("sampler.num_inference_steps=2", "sampler.num_frames=5")


@pytest.fixture(scope="module")
def models() -> Iterator[StoryModels]:
    opened = open_models("tiny", device="cpu", overrides=(*OVERRIDES, *FEW))
    yield opened
    opened.unload()


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the command."""
    root = tmp_path_factory.mktemp("commanded")
    assert render_small(write_storyboard(root / "fox.json", CUTS), root / "run", *FEW) == 0
    return root


@pytest.fixture(scope="module")
def rendered(
    models: StoryModels, commanded: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StoryOutput, list[Progress]]:
    seen: list[Progress] = []
    output = render_story(
        models, commanded / "fox.json", tmp_path_factory.mktemp("api") / "run", on_progress=seen.append
    )
    return output, seen


def test_a_story_has_the_bytes_and_records_of_the_command(
    commanded: Path, rendered: tuple[StoryOutput, list[Progress]]
) -> None:
    output, _ = rendered
    assert media_bytes(output.run_folder) == media_bytes(commanded / "run")
    assert records(output.run_folder) == records(commanded / "run")
    assert output.video.read_bytes() == (commanded / "run/stories/fox/story.mp4").read_bytes()
    assert (output.num_rendered, output.num_found, output.resumed_at, len(output.clips)) == (3, 0, 0, 3)
    assert output.contact_sheet.ndim == 3 and output.contact_sheet.float().std() > 5
    assert (output.run_folder / "report.html").exists()


def test_progress_counts_steps_and_shows_pictures(rendered: tuple[StoryOutput, list[Progress]]) -> None:
    _, seen = rendered
    steps = [one.done_steps for one in seen]
    assert steps == sorted(steps) and (steps[-1], seen[-1].total_steps) == (6, 6)
    assert [one.num_done_shots for one in seen][-1] == seen[-1].num_shots == 3
    assert {"shot_01: step 1 of 2", "shot_03: step 2 of 2", "shot_02 is finished"} <= {one.text for one in seen}
    previews = [one.preview for one in seen if one.preview is not None]
    assert previews and all(path.suffix == ".png" and path.exists() for path in previews)


def test_shots_one_by_one_have_the_bytes_of_the_story(
    models: StoryModels, rendered: tuple[StoryOutput, list[Progress]], tmp_path: Path
) -> None:
    output, _ = rendered
    memory, last = StoryMemory(), None
    for index, (mode, in_scene) in enumerate([("t2v", 0), ("mi2v", 1), ("m2v", 0)]):
        scene = 2 if index == 2 else 1
        shot = render_shot(
            models,
            f"fox: scene {scene}, shot {in_scene}",
            memory=memory,
            mode=mode,
            seed=story_seed(0, index, in_scene),
            first_frame=last,
        )
        memory, last = shot.memory, shot.last_frame
        assert save_video(shot.frames, tmp_path / "shot.mp4").read_bytes() == output.clips[index].read_bytes()
    assert [one.name for one in memory.keyframes] == [one.name for one in output.memory.keyframes]
    pairs = zip(memory.keyframes, output.memory.keyframes, strict=True)
    assert all(torch.equal(one.image, other.image) for one, other in pairs)
    assert output.memory.next_shot == memory.next_shot == 3


def test_the_command_finds_everything_rendered_in_a_folder_of_the_api(
    models: StoryModels, commanded: Path, rendered: tuple[StoryOutput, list[Progress]]
) -> None:
    output, _ = rendered
    before = clips_of(output.run_folder)
    assert render_small(commanded / "fox.json", output.run_folder, *FEW) == 0
    assert clips_of(output.run_folder) == before
    assert len(list(output.run_folder.glob("stories/*/shot_*/attempts/*"))) == 3
    again = render_story(models, commanded / "fox.json", output.run_folder)
    assert (again.num_rendered, again.num_found) == (0, 3)


SHOT_FAILS = """
from pathlib import Path
from storymem_dist.events import ShotFailed
from storymem_dist.observe.journal import JournalWriter
from storymem_dist.observe.observers import Observers
[output] = [one.partition("=")[2].strip("'") for one in sys.argv if one.startswith("output=")]
with Observers(journal=JournalWriter(Path(output) / "events", "child"), writer="child") as observers:
    observers.notify(ShotFailed(story_id="story", shot_id="shot_01", reason="too dark"))
sys.exit(3)"""
"""A child whose only shot fails."""


class HostsOwn(BaseException):
    """How ComfyUI interrupts."""


def test_a_story_interrupted_in_mid_shot_goes_on_at_its_step_and_renders_what_was_edited(
    models: StoryModels, commanded: Path, tmp_path: Path
) -> None:
    steps = [0]

    def count(progress: Progress) -> None:
        steps[0] = progress.done_steps

    def interrupt() -> None:
        if steps[0] >= 3:
            raise HostsOwn

    arguments: dict[str, Any] = {"models": models, "output": tmp_path / "run"}
    with pytest.raises(HostsOwn):
        render_story(story=storyboard(), on_progress=count, should_stop=interrupt, **arguments)
    assert models.is_loaded and steps[0] == 3
    output = render_story(story=storyboard(), **arguments)
    assert (output.num_rendered, output.num_found, output.resumed_at) == (2, 1, 1)
    expected = [path.read_bytes() for path in sorted((commanded / "run/stories/fox").glob("shot_*.mp4"))]
    assert [path.read_bytes() for path in output.clips] == expected

    edited = json.loads(storyboard())
    edited["scenes"][1]["video_prompts"] = ["something else"]
    started: list[str] = []

    def note(stamped: StampedEvent) -> None:
        if isinstance(stamped.event, ShotStarted):
            started.append(stamped.event.shot_id)

    other = render_story(story=json.dumps(edited), on_event=note, **arguments)
    assert started == ["shot_03"] and (other.num_rendered, other.num_found) == (1, 2)
    assert other.clips[:2] == output.clips[:2]

    with pytest.raises(Interrupted, match="the same call continues"):
        render_story(
            story=json.dumps(edited),
            rerender="shot_02",
            rerender_id="a",
            should_stop=iter([False, True]).__next__,
            **arguments,
        )
    started.clear()
    for _ in range(2):
        render_story(story=json.dumps(edited), rerender="shot_02", rerender_id="a", on_event=note, **arguments)
    assert started == ["shot_02", "shot_03"], "one request, one render"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rerender": "shot_09"}, "has no shot 'shot_09'; it has shot_01"),
        ({"rerender": "1-3"}, "has no shot '1-3'; it has shot_01"),
        ({"rerender": "9" * 5000}, "has no shot '9999.* characters.; it has shot_01"),
        ({"output": "a\0b"}, "output='.*b' cannot be a path"),
        ({"output": "a\ud800b"}, "output='.*b' cannot be a path"),
        ({"output": __file__}, "cannot be used as a run folder"),
        ({"gpus": 0}, "gpus=0 is not allowed"),
        ({"gpus": 1.5}, "gpus=1.5 is not allowed; it must be a whole number"),
        ({"overrides": ["output=elsewhere"]}, "output cannot be set here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_rendered_is_one_sentence_and_leaves_no_folder(
    models: StoryModels, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoryMemError, match=message):
        render_story(models, storyboard(), **{"output": tmp_path / "run"} | arguments)
    assert not any(tmp_path.iterdir())


def test_a_memory_is_the_reference_images_of_a_story(models: StoryModels, tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    memory = StoryMemory(max_keyframes=10, num_fixed=2).with_references(picture)
    text = storyboard(((True,),))
    output = render_story(models, text, tmp_path / "run", memory=memory)  # of another size than the clip
    assert output.memory.keyframes[0].name == "reference image 1"
    assert (output.memory.num_fixed, output.memory.num_references) == (2, 1)
    write_png(tmp_path / "a.png", picture.permute(2, 0, 1))
    write_storyboard(tmp_path / "in" / "fox.json", ((True,),))
    command = (f"stories.references=['{tmp_path / 'a.png'}']",)
    assert render_small(tmp_path / "in" / "fox.json", tmp_path / "command", *FEW, *command) == 0
    assert (tmp_path / "command/stories/fox/shot_01.mp4").read_bytes() == output.clips[0].read_bytes()
    [found] = records(tmp_path / "command").values()
    assert found["mode"] == "m2v" and found["fingerprint"] == records(tmp_path / "run")["story/shot_01"]["fingerprint"]


@pytest.fixture
def of_a_host_with_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a host that is one of several ranks, which is no obstacle."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")


def test_a_failed_shot_is_reported_and_tried_again(
    models: StoryModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, choose = storyboard(((True, True),)), shot_module.choose_keyframes

    def fail_at_the_second(*arguments: Any, shot_index: int, **options: Any) -> Any:
        if shot_index == 1:
            raise ShotError("there is something wrong with it")
        return choose(*arguments, shot_index=shot_index, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shot_module, "choose_keyframes", fail_at_the_second)
        with pytest.raises(ShotError, match=r"shot_02: there is something wrong with it .finished shots are kept"):
            render_story(models, text, tmp_path / "run")
    output = render_story(models, text, tmp_path / "run")
    assert (output.num_rendered, output.num_found) == (1, 1)


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ("", "the storyboard text"),
        ("scenes: [", "the storyboard text"),
        ('{"scenes": []}', "the storyboard text.*scenes"),
        ("a fox\na crow", "the storyboard text: 2 stories; give one .each line of plain text is one"),
        ("no/such/file.json", "no/such/file.json"),
        ("/no/such/folder", "/no/such/folder"),
        ('```json\n{"scenes": [}\n```', "the storyboard text: not valid JSON or JSON5, line 2"),
        (None, "a story is a NoneType; allowed"),
        (storyboard(((True,),), reference_images=["no.png"]), "no.png"),
        (storyboard(((True,),), defaults={"loras": ["no.safetensors"]}), "no.safetensors"),
    ],
)
def test_a_wrong_storyboard_is_one_sentence(models: StoryModels, story: str, message: str) -> None:
    with pytest.raises(StoryboardError, match=message) as caught:
        check_story(story, models)
    assert "\n" not in str(caught.value) and "/tmp/storymem-" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff%s",
        "```json\n%s\n```\n",
        "// of a chat\n%s",
        "```\nscenes:\n- {scene_num: 1, video_prompts: [a], cut: [true]}\n```",
    ],
    ids=["byte order mark", "fence", "JSON5", "YAML in a fence"],
)
def test_a_pasted_storyboard_is_read_and_its_warnings_name_no_scratch_file(text: str) -> None:
    board = {"scenes": [{"scene_num": 1, "video_prompts": ["a"], "cut": [True]}]}
    story = check_story(text.replace("%s", json.dumps(board)))
    assert [shot.prompt for shot in story.shots] == ["a"]
    assert story.warnings == ("the storyboard text: story_name is missing; the name of the file is used",)


def test_a_typed_story_finds_its_files_in_the_folder_of_the_host(models: StoryModels, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    story = check_story(
        storyboard(((True,),), reference_images=["a.png"]), models, base_folder=tmp_path, name="my story"
    )
    assert story_files(story) == (tmp_path / "a.png",) and story.story_id == "my_story"
    assert check_story(story, models) == story


@pytest.mark.usefixtures("of_a_host_with_ranks")
def test_several_ranks_render_in_a_child_which_can_be_stopped(
    models: StoryModels, commanded: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    arguments: dict[str, Any] = {
        "models": models,
        "story": commanded / "fox.json",
        "output": tmp_path / "run",
        "gpus": 2,
        "overrides": ("sampler.num_inference_steps=200",),  # more than are done before the child is asked to stop
    }
    with pytest.raises(Interrupted, match="the same call continues"):
        render_story(on_progress=seen.append, should_stop=lambda: seen and seen[-1].done_steps >= 1, **arguments)
    assert not models.is_loaded and 1 <= seen[-1].done_steps < 600
    assert json.loads((tmp_path / "run/stop.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("print('storymem-render: error: two: ranks', file=sys.stderr); sys.exit(2)", 2, r"^two: ranks$"),
        ("print('storymem-render: error [rank 1]: lost', file=sys.stderr); sys.exit(5)", 5, r"^lost$"),
        ("raise ValueError('a bug')", 1, r"^storymem-render ended with exit code 1: .*ValueError: a bug$"),
        ("os.kill(os.getpid(), 9)", 1, r"^storymem-render ended with signal 9"),
        (SHOT_FAILS, ShotError.exit_code, r"^shot_01: too dark .finished shots are kept"),
    ],
)
def test_the_error_of_a_child_is_its_own_message(
    models: StoryModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: int, message: str
) -> None:
    monkeypatch.setattr(child, "_PROGRAM", f"import os, sys\n{program}\n")
    with pytest.raises(StoryMemError, match=message) as caught:
        render_story(models, storyboard(), tmp_path / "run", gpus=2)
    assert caught.value.exit_code == code and os.environ.get("STORYMEM_STOP_FILES") is None


@pytest.mark.usefixtures("of_a_host_with_ranks")
def test_a_host_with_ranks_of_its_own_is_no_obstacle(models: StoryModels, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.weights=fsdp needs process groups"):
        render_story(models, storyboard(((True,),)), tmp_path / "run", overrides=("parallel.weights=fsdp",))
    assert render_story(models, storyboard(((True,),)), tmp_path / "run").num_rendered == 1
