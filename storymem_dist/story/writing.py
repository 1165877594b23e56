"""A story as a storyboard document, for another process: reading it gives an equal story.

Style and defaults are in the shots already, and paths are absolute. Knows nothing of rendering.
"""

from collections import Counter
from typing import Any

from storymem_dist.story.recall import NONE_WORD, REFERENCES_WORD
from storymem_dist.story.schema import REFERENCES, Shot, Story


def story_document(story: Story) -> dict[str, Any]:
    """Return the storyboard of ``story`` as JSON values, without its source, its warnings and its priority."""
    names = Counter(shot.name for shot in story.shots)
    taken = {*names, *(shot.shot_id for shot in story.shots)}
    return _without_empty(
        {
            "story_name": story.name,
            "story_overview": story.overview,
            "reference_images": [str(path) for path in story.reference_images],
            "seed": story.seed,
            "entities": [
                _without_empty(
                    {
                        "name": one.name,
                        "description": one.description,
                        "references": [str(path) for path in one.references],
                    }
                )
                for one in story.entities
            ],
            "scenes": [
                {
                    "scene_num": scene.scene_num,
                    "shots": [_shot(shot, is_named=_is_own_name(shot, names, taken)) for shot in scene.shots],
                }
                for scene in story.scenes
            ],
        }
    )


def _is_own_name(shot: Shot, names: Counter[str], taken: set[str]) -> bool:
    """Whether the shot's name may be written as ``name``, and not only as another program's ``shot_id``."""
    is_id = shot.name != shot.shot_id and shot.name.startswith("shot_") and shot.name in taken
    return names[shot.name] == 1 and not is_id and shot.name.lower() not in (REFERENCES_WORD, NONE_WORD)


def _shot(shot: Shot, *, is_named: bool) -> dict[str, Any]:
    options, ids = shot.options, [f"shot_{index + 1:02d}" for index in range(shot.index)]
    recall = None
    if shot.recall is not None:
        recall = [REFERENCES_WORD if index == REFERENCES else ids[index] for index in shot.recall] or [NONE_WORD]
    written = {
        "prompt": shot.prompt,
        "name" if is_named else "shot_id": shot.name,
        "duration": options.duration,
        "num_frames": options.num_frames,
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "guidance": None if options.guidance_scale is None else list(options.guidance_scale),
        "loras": None if options.loras is None else [dict(lora) for lora in options.loras],
        "start_image": None if shot.start_image is None else str(shot.start_image),
        "video": None if shot.video is None else str(shot.video),
        "references": [{"path": str(one.path), "sink": one.is_sink} for one in shot.references],
        "entities": list(shot.entities),
        "recall": recall,
    }
    written = _without_empty(written)
    if options.negative_prompt is not None:  # an empty one has a meaning
        written["negative_prompt"] = options.negative_prompt
    return written | {"cut": shot.cut} | ({} if shot.remember else {"remember": False})


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, "", [])}
