"""Stories that were added to the queue, as a job checks them: at its start, and while it runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.errors import StoryboardError
from storymem_dist.render.check import admission, check_job
from storymem_dist.story.loading import load_storyboard
from storymem_dist.story.schema import Story
from tests.helpers.lora_shots import write_lora
from tests.helpers.small_job import small_point, write_storyboard


def with_lora(path: Path, lora: str) -> Story:
    path.write_text(json.dumps({"scenes": [{"scene_num": 1, "shots": [{"prompt": "x", "loras": [{"path": lora}]}]}]}))
    return load_storyboard(path)


def test_an_added_story_whose_picture_is_gone_is_refused_by_name_until_it_is_skipped(tmp_path: Path) -> None:
    picture, log = tmp_path / "a.png", RequestLog(tmp_path / "run")
    Image.new("RGB", (64, 48)).save(picture)
    late = load_storyboard(write_storyboard(tmp_path / "late.json", [[True]], reference_images=[str(picture)]))
    RunFolder(tmp_path / "run").open()
    log.publish(Request(action="add", story_id="late", story=late))
    fox = write_storyboard(tmp_path / "fox.json", [[True]])
    point = small_point(f"stories.path='{fox}'", f"output='{tmp_path / 'run'}'")
    assert [len(batch.stories) for batch in check_job([point]).batches] == [2]
    picture.unlink()
    checked = check_job([point], job="one")
    assert [len(batch.stories) for batch in checked.batches] == [1]
    assert [(one.source, "a.png" in one.message) for one in checked.batches[0].rejected] == [("late", True)]
    with pytest.raises(StoryboardError, match=r"a\.png"):
        check_job([small_point(f"output='{tmp_path / 'run'}'")])
    log.publish(Request(action="skip", story_id="late"))
    assert not check_job([point]).batches[0].rejected


def test_what_does_not_fit_a_running_job_is_refused_alone(tmp_path: Path) -> None:
    loras = [write_lora(tmp_path / f"{rank}.safetensors", seed=rank, rank=rank) for rank in (2, 3, 9)]
    stories = [with_lora(tmp_path / f"lora_{Path(lora).stem}.json", lora) for lora in loras]
    assert stories[1].source is not None
    point = small_point(f"stories.path='{stories[1].source}'", f"output='{tmp_path / 'run'}'")
    admit = admission(point, check_job([point]))
    plain = load_storyboard(write_storyboard(tmp_path / "plain.json", [[True]]))
    two = load_storyboard(write_storyboard(tmp_path / "two.json", [[True, True]]))
    for _ in range(2):  # a story that was refused changes nothing for the next ones
        with pytest.raises(StoryboardError, match="larger LoRAs"):
            admit(stories[2])
        with pytest.raises(StoryboardError, match="m2v experts, which this job has not opened"):
            admit(two)
        assert [admit(story).story_id for story in (stories[0], plain)] == ["lora_2", "plain"]
