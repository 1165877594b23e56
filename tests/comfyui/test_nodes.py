"""What the server says about the nodes: all of them, with the ids, names, order and types of the older pack."""

import shutil
from typing import Any

import pytest

from storymem_dist.artifacts.video import read_clip, read_png
from tests.comfyui import graphs
from tests.comfyui.client import Refused, Server
from tests.comfyui.graphs import core, node

OLD_PACK: dict[str, tuple[str, str, str, str]] = {
    "StoryMemModelLoader": (
        "StoryMem/loaders",
        "t2v_model:COMBO i2v_model:COMBO m2v_lora:COMBO device:COMBO enable_offload:BOOLEAN",
        "use_fsdp:BOOLEAN",
        "models:STORYMEM_MODELS",
    ),
    "StoryMemMemoryBuffer": (
        "StoryMem/memory",
        "max_memory_size:INT fixed_frames:INT",
        "",
        "memory:STORYMEM_MEMORY",
    ),
    "StoryMemUpdateMemory": (
        "StoryMem/memory",
        "memory:STORYMEM_MEMORY video:IMAGE",
        "extract_count:INT similarity_threshold:FLOAT",
        "updated_memory:STORYMEM_MEMORY keyframes:IMAGE",
    ),
    "StoryMemFirstShot": (
        "StoryMem/generation",
        "models:STORYMEM_MODELS memory:STORYMEM_MEMORY prompt:STRING num_frames:INT width:INT height:INT seed:INT "
        "steps:INT cfg_scale:FLOAT use_t2v:BOOLEAN",
        "init_image:IMAGE keyframes_to_extract:INT",
        "video:IMAGE memory:STORYMEM_MEMORY last_frame:IMAGE",
    ),
    "StoryMemContinuationShot": (
        "StoryMem/generation",
        "models:STORYMEM_MODELS memory:STORYMEM_MEMORY prompt:STRING generation_mode:COMBO num_frames:INT seed:INT "
        "steps:INT cfg_scale:FLOAT is_scene_cut:BOOLEAN",
        "first_frame:IMAGE motion_frames:IMAGE width:INT height:INT keyframes_to_extract:INT",
        "video:IMAGE memory:STORYMEM_MEMORY last_frame:IMAGE",
    ),
    "StoryMemMemoryVisualizer": ("StoryMem/utils", "memory:STORYMEM_MEMORY", "", "visualization:IMAGE"),
    "StoryMemVideoCombine": (
        "StoryMem/utils",
        "video1:IMAGE",
        " ".join(f"video{number}:IMAGE" for number in range(2, 11)),
        "combined_video:IMAGE",
    ),
    "StoryMemGetMotionFrames": ("StoryMem/utils", "video:IMAGE num_frames:INT", "", "motion_frames:IMAGE"),
    "StoryMemInfo": ("StoryMem/utils", "", "models:STORYMEM_MODELS memory:STORYMEM_MEMORY", ""),
}
"""Category, required inputs, optional inputs and outputs, in the order of the widgets in saved graphs."""

NEW = {"StoryMemReferenceImages", "StoryMemStoryboard", "StoryMemRenderStory"}


@pytest.fixture(scope="module")
def described(server: Server) -> dict[str, Any]:
    found = server.get("/object_info")
    return {name: facts for name, facts in found.items() if name.startswith("StoryMem")}


def test_the_server_lists_every_node(described: dict[str, Any], server: Server) -> None:
    assert set(described) == set(OLD_PACK) | NEW
    assert "IMPORT FAILED: /" not in server.log.read_text()
    assert "Unable to parse pyproject.toml" not in server.log.read_text()


@pytest.mark.parametrize("name", OLD_PACK)
def test_inputs_and_outputs_begin_with_those_of_the_older_pack(name: str, described: dict[str, Any]) -> None:
    category, required, optional, outputs = OLD_PACK[name]
    facts = described[name]
    assert facts["category"] == category
    assert facts["display_name"].startswith("StoryMem ")
    for group, wanted in (("required", required), ("optional", optional)):
        inputs = facts["input"].get(group, {})
        types = ["COMBO" if isinstance(kind, list) else kind for kind, *_ in inputs.values()]
        found = [f"{key}:{kind}" for key, kind in zip(inputs, types, strict=True)]
        assert found[: len(wanted.split())] == wanted.split(), group
        assert group == "optional" or len(found) == len(wanted.split()), "a new required input breaks saved graphs"
    found = [f"{key}:{kind}" for key, kind in zip(facts["output_name"], facts["output"], strict=True)]
    assert found[: len(outputs.split())] == outputs.split()


def test_every_input_and_output_has_a_tooltip(described: dict[str, Any]) -> None:
    for name, facts in described.items():
        assert facts["description"], name
        for group in ("required", "optional"):
            for key, (_, options) in facts["input"].get(group, {}).items():
                assert options.get("tooltip"), (name, key)
        assert all(facts["output_tooltips"]), name


def test_the_defaults_are_storymems_own(described: dict[str, Any]) -> None:
    inputs = described["StoryMemFirstShot"]["input"]["required"]
    defaults = {key: options.get("default") for key, (_, options) in inputs.items()}
    assert (defaults["num_frames"], defaults["steps"], defaults["cfg_scale"]) == (81, 40, 3.5)
    assert (defaults["width"], defaults["height"], defaults["use_t2v"]) == (832, 480, True)
    frames = inputs["num_frames"][1]
    assert (frames["min"], frames["max"], frames["step"]) == (5, 161, 4)
    assert inputs["seed"][1]["control_after_generate"] is True


def test_folders_under_models_storymem_are_offered_and_the_small_models(server: Server) -> None:
    def offered(key: str) -> list[str]:
        inputs = server.get("/object_info/StoryMemModelLoader")["StoryMemModelLoader"]["input"]["required"]
        return list(inputs[key][0] if isinstance(inputs[key][0], list) else inputs[key][1]["options"])

    assert offered("t2v_model") == ["nano", "tiny"]
    home = server.base / "models" / "storymem"
    for name in ("Wan2.2-I2V-A14B", "Wan2.2-T2V-A14B", "StoryMem"):
        (home / name).mkdir(parents=True)
    try:
        assert offered("t2v_model") == ["Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "nano", "tiny"]
        assert offered("i2v_model") == ["Wan2.2-I2V-A14B", "Wan2.2-T2V-A14B", "nano", "tiny"]
    finally:
        shutil.rmtree(home)


def shot_with(**inputs: Any) -> graphs.Graph:
    graph = graphs.single_shot()
    graph["3"]["inputs"].update(inputs)
    return graph


def continuation_with(**inputs: Any) -> graphs.Graph:
    graph = graphs.five_shots()
    graph["10"]["inputs"].update(inputs)
    return {key: one for key, one in graph.items() if key in ("1", "2", "3", "10")} | {
        "4": core("PreviewImage", images=["10", 0])
    }


REFUSED: dict[str, tuple[graphs.Graph, str, str]] = {
    "size": (shot_with(width=100), "3", "100"),
    "frames": (shot_with(num_frames=26), "3", "26"),
    "mode without its frames": (continuation_with(generation_mode="MM2V"), "10", "motion_frames"),
    "missing weights": (
        {**shot_with(), "1": graphs.loader("Wan2.2-T2V-A14B")},
        "1",
        "hf download Wan-AI/Wan2.2-T2V-A14B",
    ),
    "memory": (
        {**shot_with(), "2": node("MemoryBuffer", max_memory_size=2, fixed_frames=3)},
        "2",
        "fixed_frames=3 is not allowed; it must be at least 0 and at most max_memory_size=2",
    ),
    "no memory": ({**shot_with(), "2": node("MemoryBuffer", max_memory_size=0, fixed_frames=0)}, "2", "between 1 and"),
    "steps": (shot_with(steps=0), "3", "steps=0 is not allowed"),
    "folder of models": ({**shot_with(), "1": graphs.loader("../elsewhere")}, "1", "folder under models/storymem"),
    "device": ({**shot_with(), "1": graphs.loader(device="cuda")}, "1", "cpu"),
    "storyboard": (graphs.storyboard("scenes: 3"), "2", "scenes"),
    "empty storyboard": (graphs.storyboard("  "), "2", "no prompt"),
    "missing storyboard": (
        {**graphs.storyboard(""), "2": node("Storyboard", file="gone.json", text="")},
        "2",
        "gone.json",
    ),
    "outside": (graphs.storyboard("A ball.", output="../outside"), "3", "outside"),
    "no name": (graphs.storyboard("A ball.", output="a\0b"), "3", "output_name='a"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_one_sentence_on_its_node_before_anything_runs(what: str, server: Server) -> None:
    graph, where, word = REFUSED[what]
    with pytest.raises(Refused) as refused:
        server.queue(graph)
    assert refused.value.answer["error"]["type"] == "prompt_outputs_failed_validation"
    (sentence,) = refused.value.sentences(where)
    assert word in sentence and "Traceback" not in sentence and "\n" not in sentence.strip()


def test_videos_of_an_odd_size_are_joined_and_a_threshold_of_zero_is_one(server: Server) -> None:
    graph = {
        "1": core("EmptyImage", width=51, height=33, batch_size=2, color=200),
        "2": node("VideoCombine", video1=["1", 0], video2=["1", 0]),
        "3": core("PreviewImage", images=["2", 0]),
        "4": core("SaveVideo", video=["2", 1], filename_prefix="odd", format="auto", codec="auto"),
        "5": node("MemoryBuffer", max_memory_size=10, fixed_frames=3),
        "6": node("UpdateMemory", memory=["5", 0], video=["1", 0], similarity_threshold=0.0),
        "7": node("Info", memory=["6", 0]),
    }
    outputs = server.run(graph)
    assert read_png(server.files(outputs["3"])[0]).shape == (3, 33, 51)
    assert read_clip(server.files(outputs["4"])[0]).shape == (4, 3, 32, 50)
    assert "shots: 1" in outputs["7"]["text"][0]
