from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from storymem_dist.artifacts.storyboard_copy import write_storyboard
from storymem_dist.events import MemoryDecided
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.wandb.media import _is_given, _picture_of
from storymem_dist.story.schema import ShotReference
from tests.helpers.fake_renderer import make_story


def decided(shot_index: int, slot: int | None, frame_index: int = 0) -> MemoryDecided:
    return MemoryDecided(
        story_id="fox",
        shot_id="shot_03",
        verdict="recalled",
        source_shot_index=shot_index,
        source_frame_index=frame_index,
        slot=slot,
    )


def test_each_picture_of_the_memory_is_another_one() -> None:
    """Two reference images of the story, two of a shot, and two frames of its clip: all but one are at frame 0."""
    decisions = [
        decided(-1, 0),
        decided(-1, 1),
        decided(1, -2),
        decided(1, -1),
        decided(1, 0),
        decided(1, 1, frame_index=8),
        decided(1, None, frame_index=5),
    ]
    assert len({_picture_of(decision) for decision in decisions}) == len(decisions)
    assert [_is_given(decision) for decision in decisions] == [True] * 4 + [False] * 3


@pytest.mark.parametrize(("shot_index", "slot"), [(-1, 0), (-1, 1), (1, -2), (1, -1)])
def test_the_copy_of_a_given_picture_is_found_by_its_keyframe(tmp_path: Path, shot_index: int, slot: int) -> None:
    paths = {place: tmp_path / f"{number}.png" for number, place in enumerate([(-1, 0), (-1, 1), (1, -2), (1, -1)])}
    for number, path in enumerate(paths.values()):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(path)
    story = make_story("fox", 2, reference_images=(paths[-1, 0], paths[-1, 1]))
    (scene,) = story.scenes
    references = (ShotReference(path=paths[1, -2]), ShotReference(path=paths[1, -1]))
    shots = (scene.shots[0], replace(scene.shots[1], references=references))
    story = replace(story, scenes=(replace(scene, shots=shots),))
    write_storyboard(tmp_path / "run" / "stories" / "fox", story)
    copy = Image.open(tmp_path / "run" / RunFiles.reference_path("fox", shot_index, slot)).convert("RGB")
    original = Image.open(paths[shot_index, slot])
    assert abs(copy.getpixel((4, 4))[0] - original.getpixel((4, 4))[0]) < 9  # type: ignore[index, operator]
