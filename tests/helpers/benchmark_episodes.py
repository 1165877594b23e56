"""Storyboards with the structure of EntityBench's episodes (cuts, lengths, further keys), in words of our own."""

from typing import Any

EPISODES = (
    "T T TF T TF T TFFFF TFFFFFFFFFFFFFFFF T TF T T T TFF T TFFFFF T TFF",
    "T T T TF T T T T T T TF TFF T T TF T TF TFFF T TFFFFFFFFFFF TFFF T T T TF T",
    "TFFF T TFFFFFF T TF TF TF T T T T TFF T TF T T T T TF T T T T T T T T TF T T T T",
    "TFF TFFFFFFFFF T TFFFFFFFFFFFFFFF TF T TFFFFFFFFF TFFF TF T",
    "TFFFFF T TFF",
    "TF T T TFF T TFFFFF T",
    "TFFFFFFFFFFFF TF",
    "TFFFFFFFF T TFFFFFFFFFFFFFF T TFF T TFF T TFFFFFF T TFFFFF T T",
    "TFFFF T TFF T T TFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF T T T T",
    "T T TFFFFFFFFFFFFFF T T TF TFFF T TF TFF T TFF T T T T T T TFFF T T T T T",
    "T T TFF TFF TFFFFF T",
    "T TF TFF TFFFFFFFFF",
    "TFFFFF T TFFFFFFF",
    "T TFFF T TF TFFFFFFFFF",
    "TFFFFFFF T T T T T T T T TFF T TF T T T TF T T T T T T T TF T TFFFFFFFF T T TF",
    "T TFFF TF T T TFF TFF",
    "TF TF T T TFF T T T T T T T T TF TFF TF T TFF T T T T T T T TFF T TF T T T T T T",
    "TFFFF TF TFFFFFF T",
    "T TFFF T T T T T T TF T T T T T T T T TF T TF T T TF T T T T T T T T T TF T T T T T T",
    "TFFFFFFFFFF TF T T",
)
"""A word for each scene, a letter for each shot: T is a cut, F continues the shot before it."""


def episode(number: int) -> dict[str, Any]:
    """Return episode ``number`` as its file holds it."""
    scenes, schedule = [], {}
    for scene_num, word in enumerate(EPISODES[number].split(), start=1):
        actions = [f"Mara mends sail {scene_num} while the tide turns, part {index}." for index in range(len(word))]
        looks = "Mara: Sailmaker with a grey braid.\nOle: Boy in a yellow coat.\n\n"
        scenes.append(
            {
                "scene_num": scene_num,
                "video_prompts": [
                    looks + action + " Gulls call." * (7 * index % 40) for index, action in enumerate(actions)
                ],
                "cut": [letter == "T" for letter in word],
                "action_descriptions": actions,
            }
        )
        schedule |= {f"{scene_num}:{index + 1}": {"characters": ["Mara"], "objects": []} for index in range(len(word))}
    return {
        "story_name": f"episode{number:03d}",
        "story_overview": "A harbour in autumn.",
        "scenes": scenes,
        "entity_schedule": schedule,
        "entity_descriptions": {"Character 1": {"name": "Mara", "description": "Sailmaker."}},
        "_window_shot_ids": [f"episode{number:03d}__shot{index:04d}" for index in range(3)],
        "_num_scenes": len(scenes),
        "_name_map": {"Character 1": "Mara"},
    }
