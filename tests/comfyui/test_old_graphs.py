"""The two graphs that the older pack publishes, as its users have them: they run, and leave pictures and a video."""

from storymem_dist.artifacts.video import read_clip, read_png
from tests.comfyui import graphs
from tests.comfyui.client import Server, failure


def test_the_single_shot_leaves_its_frames_as_pictures(server: Server) -> None:
    outputs = server.run(graphs.single_shot())
    pictures = [read_png(path) for path in server.files(outputs["4"])]
    assert len(pictures) == 25 and {tuple(picture.shape) for picture in pictures} == {(3, 64, 64)}
    assert any((one != pictures[0]).any() for one in pictures[1:])
    (text,) = outputs["5"]["text"]
    assert "tiny" in text


def test_five_shots_become_pictures_a_memory_and_a_video_that_plays(server: Server) -> None:
    outputs = server.run(graphs.five_shots())
    frames = 25 + 8 + 8 + 9 + 9
    assert len(server.files(outputs["21"])) == frames
    (video,) = server.files(outputs["22"])
    assert video.suffix == ".mp4"
    assert read_clip(video).shape == (frames, 3, 64, 64)
    (memory,) = server.files(outputs["24"])
    assert read_png(memory).float().std() > 1
    assert len(server.files(outputs["26"])) in (1, 2, 3), "keyframes"
    assert len(server.files(outputs["28"])) == 5, "motion frames"


def test_motion_frames_go_on_with_the_other_lora(server: Server) -> None:
    graph = graphs.five_shots()
    graph["1"] = graphs.loader(m2v_lora="MM2V")
    graph["10"]["inputs"] |= {"generation_mode": "MM2V", "motion_frames": ["29", 0]}
    graph["29"] = graphs.node("GetMotionFrames", video=["3", 0], num_frames=5)
    shown = {key: graph[key] for key in ("1", "2", "3", "10", "29")}
    shown["30"] = graphs.core("PreviewImage", images=["10", 0])
    assert len(server.files(server.run(shown)["30"])) == 9 - 5


def test_a_mode_whose_lora_is_not_the_loaded_one_is_one_sentence_on_its_node(server: Server) -> None:
    graph = graphs.five_shots()
    graph["10"]["inputs"] |= {"generation_mode": "MM2V", "motion_frames": ["3", 0]}
    shown = {key: graph[key] for key in ("1", "2", "3", "10")} | {"30": graphs.core("PreviewImage", images=["10", 0])}
    ended = server.wait(server.queue(shown))
    assert ended["status"]["status_str"] == "error"
    said = failure(ended)
    assert said.startswith("StoryMemContinuationShot: mode MM2V needs the LoRA MM2V") and "\n" not in said


def test_pictures_join_the_memory_before_the_first_shot(server: Server) -> None:
    graph = graphs.single_shot()
    seen = server.files(server.run(graph)["4"])[0]
    (server.input / "face.png").write_bytes(seen.read_bytes())
    graph["6"] = graphs.core("LoadImage", image="face.png")
    graph["7"] = graphs.node("ReferenceImages", memory=["2", 0], images=["6", 0])
    graph["3"]["inputs"]["memory"] = ["7", 0]
    with_memory = server.files(server.run(graph)["4"])[0]
    assert (read_png(with_memory) != read_png(seen)).any()
