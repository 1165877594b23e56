"""A whole storyboard in one node: interrupted, queued again, edited; next to the same story from the command line."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.video import read_clip, read_png
from tests.comfyui import graphs
from tests.comfyui.client import Graph, Server, failure
from tests.comfyui.graphs import core

LONG = 60
"""Denoising steps of the second shot, so that there is time to interrupt it."""

SIZE = ("sampler.num_frames=9", "sampler.height=64", "sampler.width=64", "sampler.num_inference_steps=3")


def story(third: str = "The fox meets an owl.") -> str:
    return f"""\
story_name: Fox
scenes:
  - scene_num: 1
    shots:
      - prompt: A red fox crosses a frozen lake.
      - {{prompt: It stops and listens., cut: false, num_inference_steps: {LONG}}}
      - prompt: {third}
      - {{prompt: The owl flies off., cut: false}}
"""


def graph(text: str | None = None, **more: Any) -> Graph:
    return graphs.storyboard(text or story(), settings="\n".join(SIZE), **more)


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened in a run folder, in order of time."""
    lines = [line for path in folder.glob("events/*.jsonl") for line in path.read_text().splitlines() if line.strip()]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["wall_time"])


def rendered(folder: Path, since: int = 0) -> list[str]:
    return [event["shot_id"] for event in events(folder)[since:] if event["event"] == "ShotStarted"]


def hashes(folder: Path) -> dict[str, str]:
    """Digests of the clips, the joined video and the keyframes of a story."""
    paths = [*folder.glob("*.mp4"), *folder.glob("keyframes/*.png")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


PAIR = """\
story_name: Pair
scenes:
  - scene_num: 1
    shots:
      - {prompt: A red fox crosses a frozen lake., seed: 5}
      - {prompt: It stops and listens., cut: false, seed: 6}
      - {prompt: An owl looks down., seed: 7}
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stories, uninterrupted, by storymem-render: the folder of stories."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "boards").mkdir()
    (folder / "boards" / "fox.yaml").write_text(story())
    (folder / "boards" / "pair.yaml").write_text(PAIR)
    command = [sys.executable, "-m", "storymem_dist", f"stories={folder}/boards", "model=tiny", f"output={folder}/run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "tracking=none", *SIZE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run" / "stories"


@pytest.fixture(scope="module")
def resumed(server: Server, reference: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The story in a node, interrupted over HTTP in its second shot and queued again."""
    folder = server.output / "fox"

    def in_the_second_shot() -> bool:
        return any(event["event"] == "StepFinished" and event["shot_id"] == "shot_02" for event in events(folder))

    ended = server.run_until(graph(output="fox"), in_the_second_shot)
    kinds = [kind for kind, _ in ended["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds, failure(ended)
    yield folder, server.run(graph(output="fox"))


def test_interrupted_in_mid_shot_and_queued_again_it_resumes_at_its_step(resumed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = resumed
    happened = events(folder)
    (again,) = [event for event in happened if event["event"] == "ShotResumed"]
    assert again["shot_id"] == "shot_02" and 0 < again["step"] < LONG
    steps = [event["step"] for event in happened if event["event"] == "StepFinished" and event["shot_id"] == "shot_02"]
    assert steps == list(range(1, LONG + 1)), "no step was computed twice"
    assert rendered(folder) == ["shot_01", "shot_02", "shot_02", "shot_03", "shot_04"]


def test_clips_and_keyframes_are_those_of_the_command_line_byte_for_byte(
    resumed: tuple[Path, dict[str, Any]], reference: Path
) -> None:
    found = hashes(resumed[0] / "stories" / "story")
    assert {"shot_01.mp4", "shot_04.mp4", "story.mp4"} <= set(found)
    assert sum(name.startswith("keyframes/") for name in found) > 0
    assert found == hashes(reference / "fox")


def test_the_node_shows_the_video_and_it_plays(resumed: tuple[Path, dict[str, Any]], server: Server) -> None:
    (shown,) = server.files(resumed[1]["3"])
    assert len(read_clip(shown)) == 9 + 8 + 9 + 8


def test_queued_again_unchanged_nothing_runs(resumed: tuple[Path, dict[str, Any]], server: Server) -> None:
    before = len(events(resumed[0]))
    ended = server.wait(server.queue(graph(output="fox")))
    cached = next(facts["nodes"] for kind, facts in ended["status"]["messages"] if kind == "execution_cached")
    assert "3" in cached and len(events(resumed[0])) == before


def test_a_lost_video_is_made_again_without_rendering(resumed: tuple[Path, dict[str, Any]], server: Server) -> None:
    folder, outputs = resumed
    (video,) = server.files(outputs["3"])
    before, bytes_before = len(events(folder)), video.read_bytes()
    video.unlink()
    server.run(graph(output="fox"))
    assert video.read_bytes() == bytes_before and rendered(folder, before) == []


def test_an_edited_third_prompt_renders_the_third_shot_and_those_after_it(
    resumed: tuple[Path, dict[str, Any]], server: Server
) -> None:
    folder = resumed[0]
    before, clips = len(events(folder)), hashes(folder / "stories" / "story")
    server.run(graph(story("The fox meets a hare."), output="fox"))
    assert rendered(folder, before) == ["shot_03", "shot_04"]
    after = hashes(folder / "stories" / "story")
    changed = {name for name, digest in after.items() if clips.get(name) != digest and name.endswith(".mp4")}
    assert changed == {"shot_03.mp4", "shot_04.mp4", "story.mp4"}


def test_a_shot_is_rendered_again_on_request_with_those_that_follow(
    resumed: tuple[Path, dict[str, Any]], server: Server
) -> None:
    folder = resumed[0]
    before = len(events(folder))
    server.run(graph(story("The fox meets a hare."), output="fox", rerender="shot_04"))
    assert rendered(folder, before) == ["shot_04"]


def test_a_storyboard_file_that_is_edited_runs_again(server: Server) -> None:
    def queued() -> Graph:
        one = graph(output="filed")
        one["2"]["inputs"] = {"file": "filed.yaml", "text": ""}
        return one

    short = "story_name: Filed\nscenes:\n  - {scene_num: 1, video_prompts: [%s], cut: [true]}\n"
    (server.input / "filed.yaml").write_text(short % "A ball.")
    assert "filed.yaml" in json.dumps(server.get("/object_info/StoryMemStoryboard"))
    server.run(queued())
    assert rendered(server.output / "filed") == ["shot_01"]
    (server.input / "filed.yaml").write_text(short % "A box.")
    server.run(queued())
    assert rendered(server.output / "filed") == ["shot_01", "shot_01"]


def test_progress_and_pictures_come_while_it_renders(server: Server) -> None:
    texts, previews = server.watch(graph(output="watched"))
    steps = [said["data"] for said in texts if said["type"] == "progress" and said["data"]["node"] == "3"]
    assert {at["max"] for at in steps} == {3 + LONG + 3 + 3}
    values = [at["value"] for at in steps]
    assert values == sorted(values) and values[-1] == steps[-1]["max"] and len(set(values)) > LONG
    with_keyframes = {path.name[:7] for path in (server.output / "watched").glob("stories/*/keyframes/*.png")}
    assert len(previews) == len(with_keyframes) > 1, "one of each shot that has added keyframes"
    assert all(b"\xff\xd8\xff" in preview[:64] for preview in previews), "JPEG pictures"


def test_two_processes_render_what_one_renders(server: Server, reference: Path) -> None:
    server.run(graph(output="two", gpus=2), seconds=280)
    assert hashes(server.output / "two" / "stories" / "story") == hashes(reference / "fox")


def test_shot_nodes_give_the_clips_and_keyframes_of_the_command_line(server: Server, reference: Path) -> None:
    common = {"models": ["1", 0], "num_frames": 9, "width": 64, "height": 64, "steps": 3, "cfg_scale": 3.5}
    first = {"prompt": "A red fox crosses a frozen lake.", "seed": 5, "memory": ["2", 0], "use_t2v": True}
    second = {"prompt": "It stops and listens.", "seed": 6, "memory": ["3", 1], "first_frame": ["3", 2]}
    third = {"prompt": "An owl looks down.", "seed": 7, "memory": ["4", 1]}
    built = {
        "1": graphs.loader(),
        "2": graphs.node("MemoryBuffer", max_memory_size=10, fixed_frames=3),
        "3": graphs.node("FirstShot", **common, **first),
        "4": graphs.node("ContinuationShot", **common, **second, generation_mode="MI2V", is_scene_cut=False),
        "5": graphs.node("ContinuationShot", **common, **third, generation_mode="MI2V", is_scene_cut=True),
    }
    for number, (shot, before) in enumerate([("3", "2"), ("4", "3"), ("5", "4")], 1):
        built |= {
            f"{number}0": graphs.node("VideoCombine", video1=[shot, 0]),
            f"{number}1": core("SaveVideo", video=[f"{number}0", 1], filename_prefix="p", format="auto", codec="auto"),
            f"{number}2": graphs.node("UpdateMemory", memory=[before, 1 if number > 1 else 0], video=[shot, 0]),
            f"{number}3": core("SaveImage", images=[f"{number}2", 1], filename_prefix=f"keyframe_{number}"),
        }
    before = set((server.base / "temp").glob("storymem_*/combined.mp4"))
    outputs = server.run(built)
    combined = set((server.base / "temp").glob("storymem_*/combined.mp4")) - before
    clips = {path.read_bytes() for path in (reference / "pair").glob("shot_0?.mp4")}
    assert {path.read_bytes() for path in combined} == clips and len(clips) == 3
    for number in (1, 2, 3):
        kept = [read_png(one) for one in sorted((reference / "pair").glob(f"keyframes/shot_0{number}*.png"))]
        if kept or number == 1:
            saved = [read_png(one) for one in server.files(outputs[f"{number}3"])]
            assert len(saved) == len(kept) > 0
            assert all((one == other).all() for one, other in zip(saved, kept, strict=True))
