import dataclasses
import json
from pathlib import Path

from PIL import Image

from storymem_dist.artifacts.storyboard_copy import write_storyboard
from storymem_dist.story.loading import load_storyboard
from storymem_dist.story.schema import Entity, ShotOptions, ShotReference, Story
from tests.helpers.fake_renderer import make_story

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_of_70da1c0"


def with_shot(story: Story, index: int, **changes: object) -> Story:
    (scene,) = story.scenes
    shots = [dataclasses.replace(shot, **changes) if shot.index == index else shot for shot in scene.shots]
    return dataclasses.replace(story, scenes=(dataclasses.replace(scene, shots=tuple(shots)),))


def test_a_story_in_storymems_form_is_written_as_an_earlier_version_wrote_it(tmp_path: Path) -> None:
    before = json.loads((FIXTURE / "run/stories/old_run/storyboard.json").read_text())
    story = load_storyboard(FIXTURE / "old_run.json")
    write_storyboard(tmp_path, dataclasses.replace(story, source=Path(before["source"])))
    assert json.loads((tmp_path / "storyboard.json").read_text()) == {**before, "warnings": []}


def test_what_a_story_sets_is_written_and_defaults_are_not(tmp_path: Path) -> None:
    story = with_shot(make_story("fox", 2), 1, options=ShotOptions(duration=2.0), remember=False, recall=(0,))
    story = dataclasses.replace(story, entities=(Entity(name="Mira"),), priority=3)
    write_storyboard(tmp_path, story)
    written = json.loads((tmp_path / "storyboard.json").read_text())
    first, second = written["scenes"][0]["shots"]
    assert set(first) == {"index", "index_in_scene", "scene_num", "prompt", "cut"}
    assert {key: second[key] for key in set(second) - set(first)} == {
        "options": {"duration": 2.0},
        "remember": False,
        "recall": [0],
    }
    assert written["entities"] == [{"name": "Mira"}] and written["priority"] == 3


def test_all_pictures_of_a_story_have_small_copies(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (1200, 600), (50 * number, 0, 0)).save(paths[-1])
    story = make_story("fox", 2, reference_images=(paths[0],))
    story = dataclasses.replace(story, entities=(Entity(name="Mira", references=(paths[1],)),))
    story = with_shot(
        story, 1, start_image=paths[2], references=(ShotReference(path=paths[3]), ShotReference(path=paths[4]))
    )
    write_storyboard(tmp_path / "run", story)
    colours = {}
    for copy in (tmp_path / "run" / "references").iterdir():
        image = Image.open(copy)
        assert max(image.size) == 512
        colours[copy.stem] = round(image.convert("RGB").getpixel((9, 9))[0] / 50)  # type: ignore[index, operator]
    assert colours == {
        "reference_0": 0,
        "reference_1": 1,
        "shot_02_start": 2,
        "shot_02_reference_2": 3,
        "shot_02_reference_1": 4,
    }
