"""Graphs as API prompts: the two that the older StoryMem pack publishes, with its inputs, and a whole storyboard."""

from typing import Any

from tests.comfyui.client import Graph

SIZE = {"width": 64, "height": 64}
"""Small clips: the only thing about the old graphs that is changed, apart from the folders of weights and the steps."""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of this pack."""
    return {"class_type": f"StoryMem{kind}", "inputs": inputs}


def core(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of ComfyUI itself."""
    return {"class_type": kind, "inputs": inputs}


def loader(t2v_model: str = "tiny", m2v_lora: str = "MI2V", **more: Any) -> dict[str, Any]:
    """The loader as the old pack's graphs have it: ``i2v_model`` still names the old folder."""
    values = {"i2v_model": "Wan2.2-I2V-A14B", "device": "auto", "enable_offload": True, "use_fsdp": False}
    return node("ModelLoader", t2v_model=t2v_model, m2v_lora=m2v_lora, **(values | more))


def single_shot(steps: int = 2) -> Graph:
    """Load, an empty memory, one first shot, and a preview: with the old pack's widgets and values."""
    return {
        "1": loader(),
        "2": node("MemoryBuffer", max_memory_size=10, fixed_frames=3),
        "3": node(
            "FirstShot",
            models=["1", 0],
            memory=["2", 0],
            prompt="A red fox crosses a frozen lake at dawn.",
            num_frames="25",
            **SIZE,
            seed=42,
            steps=steps,
            cfg_scale=7.5,
            use_t2v=True,
            keyframes_to_extract=3,
        ),
        "4": core("PreviewImage", images=["3", 0]),
        "5": node("Info", models=["1", 0], memory=["3", 1]),
    }


def five_shots(steps: int = 1) -> Graph:
    """Five shots: MI2V continuations, M2V, a cut; joined; the memory shown and updated. Frames as the old strings."""
    graph = single_shot(steps)
    del graph["4"]
    shots = [
        ("10", "MI2V", False, ["3", 2]),
        ("11", "MI2V", False, ["10", 2]),
        ("12", "M2V", False, None),
        ("13", "MI2V", True, ["12", 2]),
    ]
    before = "3"
    for key, mode, cut, first in shots:
        graph[key] = node(
            "ContinuationShot",
            models=["1", 0],
            memory=[before, 1],
            prompt=f"The fox goes on, part {key}.",
            generation_mode=mode,
            num_frames="9",
            seed=int(key),
            steps=steps,
            cfg_scale=7.5,
            is_scene_cut=cut,
            **({"first_frame": first} if first else {}),
            **SIZE,
            keyframes_to_extract=3,
        )
        before = key
    videos = {f"video{number}": [key, 0] for number, key in enumerate(["3", "10", "11", "12", "13"], 1)}
    return graph | {
        "20": node("VideoCombine", **videos),
        "21": core("SaveImage", images=["20", 0], filename_prefix="story"),
        "22": core("SaveVideo", video=["20", 1], filename_prefix="story", format="auto", codec="auto"),
        "23": node("MemoryVisualizer", memory=["13", 1]),
        "24": core("PreviewImage", images=["23", 0]),
        "25": node("UpdateMemory", memory=["3", 1], video=["10", 0], extract_count=3, similarity_threshold=0.9),
        "26": core("PreviewImage", images=["25", 1]),
        "27": node("GetMotionFrames", video=["10", 0], num_frames=5),
        "28": core("PreviewImage", images=["27", 0]),
    }


def storyboard(text: str, *, model: str = "tiny", output: str = "story", settings: str = "", **more: Any) -> Graph:
    """A whole storyboard."""
    return {
        "1": loader(model),
        "2": node("Storyboard", file="(text)", text=text),
        "3": node(
            "RenderStory",
            models=["1", 0],
            story=["2", 0],
            **({"output_name": output, "gpus": 1, "rerender": "", "settings": settings} | more),
        ),
    }
