"""The whole batch loop over a run folder, with a renderer that draws instead of computing."""

from pathlib import Path

from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.render_batch import render_batch
from tests.helpers.fake_renderer import FakeRenderer, finished_files, make_part, make_story

QUICK = {"poll_seconds": 0.01, "lease_seconds": 1.0}


def test_a_batch_renders_every_shot_once_and_loads_each_model_once(tmp_path: Path) -> None:
    renderer = FakeRenderer()
    stories = [make_story("ocean", 4), make_story("city", 2)]
    summary = render_batch(
        parts=[make_part(tmp_path / "run", stories)], renderer=renderer, settings=DispatchSettings(**QUICK)
    )
    assert (summary.state, summary.num_rendered, summary.num_stories_done, summary.exit_code) == ("done", 6, 2, 0)
    assert sorted(renderer.rendered) == sorted(set(renderer.rendered))
    assert renderer.prepared == ["t2v", "m2v"]
    assert {name for name in finished_files(tmp_path / "run") if name.endswith("story.mp4")} == {
        "stories/ocean/story.mp4",
        "stories/city/story.mp4",
    }
