"""What the pack leaves of the server's process: memory, models, and everything that belongs to all packs."""

import json
import time
from typing import Any

from tests.comfyui import graphs
from tests.comfyui.client import Graph, Server

SIZE = "sampler.height=64\nsampler.width=64"


def probe(server: Server, graph: Graph | None = None) -> dict[str, Any]:
    """The state of the process, asked after the nodes of ``graph``, if one is given, ran in the prompt before."""
    if graph:
        server.run(graph)
    found = server.run({"9": {"class_type": "Probe", "inputs": {"number": 0}}})
    return dict(json.loads(found["9"]["text"][0]))


def both(seed: int, model: str = "tiny") -> Graph:
    """One shot by the shot node and one by the story node."""
    graph = graphs.single_shot(steps=1)
    graph["1"] = graphs.loader(model)
    graph["3"]["inputs"] |= {"seed": seed, "num_frames": 9}
    text = "story_name: Short\nscenes:\n  - {scene_num: 1, video_prompts: [A ball.], cut: [true]}\n"
    settings = f"sampler.seed={seed}\nsampler.num_frames=9\nsampler.num_inference_steps=1\n{SIZE}"
    graph |= {f"1{key}": one for key, one in graphs.storyboard(text, output="short", settings=settings).items()}
    graph["13"]["inputs"] |= {"models": ["1", 0], "story": ["12", 0]}
    del graph["11"]
    return graph


def test_a_run_leaves_the_process_as_it_was(server: Server) -> None:
    server.run(both(seed=1))  # libraries that are imported at the first use may set what they like
    before = probe(server)["state"]
    assert probe(server, both(seed=2))["state"] == before


def test_free_unloads_the_models_and_the_next_run_loads_them_again(server: Server) -> None:
    server.run(both(seed=3))
    graph = {"1": graphs.loader(), "9": {"class_type": "Probe", "inputs": {"number": 1}}} | {
        "2": graphs.node("Info", models=["1", 0])
    }

    def loaded() -> tuple[list[str], int]:
        found = json.loads(server.run(graph)["9"]["text"][0])
        return found["loaded"], found["books"]

    assert loaded() == (["tiny"], 1)
    server.post("/free", {"unload_models": True})
    until = time.monotonic() + 20
    while loaded() != ([], 0):
        assert time.monotonic() < until, loaded()
    server.run(both(seed=4))
    assert loaded() == (["tiny"], 1)


def test_other_models_in_the_next_graph_take_the_place_of_those_before(server: Server) -> None:
    server.run(both(seed=5, model="nano"))
    server.run(both(seed=6))
    graph = both(seed=7) | {"9": {"class_type": "Probe", "inputs": {"number": 2}}}
    found = json.loads(server.run(graph)["9"]["text"][0])
    assert found["loaded"] == ["tiny"] and found["books"] == 1


def test_the_memory_of_the_process_is_flat_after_the_third_run(server: Server) -> None:
    resident = []
    for number in range(20):
        graph = both(100 + number)
        if number % 4:  # the story node takes most of the time
            graph = {key: node for key, node in graph.items() if key not in ("12", "13")}
        server.run(graph)
        resident.append(server.resident_mib())
    print("resident MiB after each run:", *(round(value) for value in resident))
    assert max(resident[3:]) - resident[2] < 24, resident
    assert resident[-1] - resident[9] < 12, resident
