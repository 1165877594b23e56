"""Each mistake in the keys of a shot is one sentence with file, scene, shot, line and cure."""

from pathlib import Path

import pytest

from storymem_dist.errors import StoryboardError
from tests.helpers.shot_story import STORY, load, write_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def message(folder: Path, text: str) -> str:
    with pytest.raises(StoryboardError) as caught:
        load(folder, text)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"{folder}/lamp.yaml")
    return said.removeprefix(f"{folder}/lamp.yaml").replace(f"{folder}/", "")


WRONG: dict[str, tuple[str, str, str]] = {
    "both forms": (
        "  - scene_num: 2\n",
        "  - scene_num: 2\n    video_prompts: [a]\n",
        ", scene 2, line 26: video_prompts and shots are two ways to write a scene; keep one of them",
    ),
    "shots in another spelling": (
        "    shots:\n      - prompt: She climbs.",
        "    Shots:\n      - prompt: She climbs.",
        ", scene 1: 'video_prompts' is missing; did you mean 'shots' by 'Shots'?",
    ),
    "both lengths": (
        "duration: 2.5",
        "duration: 2.5\n        num_frames: 5",
        ", scene 1, shot 1, line 17: duration and num_frames are both given; keep one of them",
    ),
    "a length of none": ("2.5", "0", ", scene 1, shot 1, line 16: duration is 0; allowed: seconds above 0, up to 600"),
    "a length as text": (
        "2.5",
        "2.5s",
        ", scene 1, shot 1, line 16: duration is the text '2.5s'; allowed: a number from 0 to 600",
    ),
    "a length without end": (
        "2.5",
        ".inf",
        ", scene 1, shot 1, line 16: duration is the number inf; allowed: a number from 0 to 600",
    ),
    "a seed that is none": (
        "seed: 7",
        "seed: true",
        ", scene 1, shot 2, line 21: seed is true; allowed: a whole number from 0 to 9223372036854775807",
    ),
    "half a guidance": (
        "{high_noise: 3, low: 2}",
        "{high_noise: 3}",
        ", scene 1, shot 2, line 22: guidance is an object with 'high_noise'; allowed: a number, or two for the"
        " high-noise and the low-noise expert: [4.0, 3.0] or {high, low}",
    ),
    "a default of a wrong type": (
        "num_inference_steps: 20",
        "num_inference_steps: many",
        ", defaults, line 5: num_inference_steps is the text 'many'; allowed: a whole number from 1 to 1000",
    ),
    "a default that belongs to a shot": (
        "guidance: 4",
        "name: x",
        ", defaults, line 6: name belongs to one shot; write it there",
    ),
    "a key that is almost one": (
        "duration: 2.5",
        "Duration: 2.5",
        ", scene 1, shot 1, line 16: unknown key 'Duration' (did you mean 'duration'?); correct or remove it; a shot"
        " has prompt, cut and optionally name, duration, num_frames, seed, num_inference_steps, guidance,"
        " negative_prompt, start_image, references, video, loras, remember, entities, recall",
    ),
    "a key of another program": (
        "duration: 2.5",
        "seconds: 2.5",
        ", scene 1, shot 1, line 16: unknown key 'seconds' (did you mean 'duration'?); correct or remove it; a shot"
        " has prompt, cut and optionally name, duration, num_frames, seed, num_inference_steps, guidance,"
        " negative_prompt, start_image, references, video, loras, remember, entities, recall",
    ),
    "no prompt": (
        "prompt: She climbs.",
        "cut: true",
        ", scene 1, shot 1, line 14: 'prompt' is missing; a shot needs prompt, or video",
    ),
    "a picture that is not there": (
        "still.png",
        "stil.png",
        ", scene 1, shot 1, line 17: start_image: the image stil.png does not exist; allowed: a readable PNG, JPEG,"
        " WEBP, BMP, TIFF, GIF, AVIF, HEIC file of at most 64 megapixels",
    ),
    "a picture that continues": (
        "cut: false",
        "cut: false\n        start_image: still.png",
        ", scene 1, shot 2, line 21: start_image is given for a shot that continues the one before it; write cut: true,"
        " or remove start_image",
    ),
    "a clip that is not there": (
        "filmed.mp4",
        "film.mp4",
        ", scene 2, shot 1, line 27: video: the video film.mp4 does not exist; allowed: a video with a picture in"
        " MP4, MOV, MKV, WebM, AVI, MPEG or GIF; convert it to MP4 (H.264)",
    ),
    "a clip that is rendered": (
        "remember: no",
        "seed: 3",
        ", scene 2, shot 1, line 28: seed says how a shot is rendered, and video gives this one; remove one of them",
    ),
    "a clip that recalls": (
        "remember: no",
        "recall: climb",
        ", scene 2, shot 1, line 28: recall says how a shot is rendered, and video gives this one; remove one of them",
    ),
    "a LoRA that is not there": (
        "[push.safetensors,",
        "[pull.safetensors,",
        ", scene 2, shot 2, line 33: loras, entry 1: the LoRA pull.safetensors does not exist; allowed: a file, or a"
        " folder with the files of both experts",
    ),
    "a LoRA's address": (
        "[push.safetensors,",
        "['https://example.org/push.safetensors',",
        ", scene 2, shot 2, line 33: loras, entry 1: https://example.org/push.safetensors is an address; download the"
        " LoRA and give its file's path",
    ),
    "a LoRA with another key": (
        "strength: 0.5",
        "strenght: 0.5",
        ", scene 2, shot 2, line 33: loras, entry 2: unknown key 'strenght' (did you mean 'strength'?); allowed: path,"
        " scale_rule, strength, alpha, expert, unmatched",
    ),
    "a LoRA's number as text": (
        "strength: 0.5",
        "strength: strong",
        ", scene 2, shot 2, line 33: loras, entry 2: strength is the text 'strong'; allowed: a number",
    ),
    "a reference without a path": (
        "{path: keeper.png, sink: true}",
        "{sink: true}",
        ", scene 2, shot 2, line 32: references, entry 2: 'path' is missing; a reference needs path",
    ),
    "a sink that is neither": (
        "sink: true",
        "sink: deep",
        ", scene 2, shot 2, line 32: sink is the text 'deep'; allowed: true (always shown after that) or false (until"
        " newer keyframes take its place)",
    ),
    "an entity that is almost one": (
        "entities: [Mira]",
        "entities: [mria]",
        ", scene 1, shot 1, line 18: the entity 'mria' is not in the story's entities (did you mean 'Mira'?); correct"
        " it, or add it there",
    ),
    "entities of another kind": (
        "entities: [Mira]",
        "entities: {Mira: 1}",
        ", scene 1, shot 1, line 18: entities is an object with 'Mira'; allowed: a list of names of what is seen in the"
        " shot",
    ),
    "an entity's description of another kind": (
        "harbour: A harbour at night.",
        "harbour: 7",
        ", line 10: the entity 'harbour' is the number 7; allowed: text, or an object with description and references",
    ),
    "an entity's picture": (
        "references: [mira.png]}",
        "references: [mia.png]}",
        ", line 9: the entity 'Mira': references, entry 1: the image mia.png does not exist; allowed: a readable PNG,"
        " JPEG, WEBP, BMP, TIFF, GIF, AVIF, HEIC file of at most 64 megapixels",
    ),
    "a name twice": (
        "shot_id: sea",
        "name: climb",
        ", scene 2, shot 2, line 30: the name 'climb' is also that of shot_01; allowed: one that no shot has",
    ),
    "the id of another shot as a name": (
        "name: climb",
        "name: shot_02",
        ", scene 1, shot 1, line 15: the name 'shot_02' is the id of another shot; allowed: one that no shot has",
    ),
    "a word of recall as a name": (
        "shot_id: sea",
        "name: References",
        ", scene 2, shot 2, line 30: the name 'References' has a meaning of its own in recall; take another",
    ),
    "a recall of no shot": (
        "[climb, references]",
        "[clim]",
        ", scene 1, shot 2, line 24: recall names 'clim', which is no shot; did you mean 'climb'?",
    ),
    "a recall of nothing like it": (
        "[climb, references]",
        "[xyz]",
        ", scene 1, shot 2, line 24: recall names 'xyz', which is no shot; allowed: the shots before it ('shot_01',"
        " 'climb'), references, or none",
    ),
    "a recall of itself": (
        "[climb, references]",
        "[shot_02]",
        ", scene 1, shot 2, line 24: recall names 'shot_02', the shot itself; allowed: the shots before it ('shot_01',"
        " 'climb'), references, or none",
    ),
    "a recall of a later shot": (
        "[climb, references]",
        "[climb, sea]",
        ", scene 1, shot 2, line 24: recall names 'sea', a later shot; allowed: the shots before it ('shot_01',"
        " 'climb'), references, or none",
    ),
    "a recall of a shot that nobody remembers": (
        "recall: none",
        "recall: shot_03",
        ", scene 2, shot 2, line 35: recall names 'shot_03', whose keyframes do not enter the memory (remember: false);"
        " remove one of them",
    ),
    "a recall of none and more": (
        "[climb, references]",
        "[none, climb]",
        ", scene 1, shot 2, line 24: recall holds none and more; write none alone, or remove it",
    ),
    "a recall that is a truth value": (
        "recall: none",
        "recall: no",
        ", scene 2, shot 2, line 35: recall is false; allowed: a list of names of earlier shots, such as shot_01, or"
        " references, or none",
    ),
    "a recall of references that are not there": (
        "reference_images: [keeper.png]",
        "seed: 1",
        ", scene 1, shot 2, line 24: recall names references, and the story has no reference_images; add some, or"
        " remove it",
    ),
    "a comment in a prompt": (
        "She climbs.",
        "She climbs # slowly",
        ": line 14: YAML takes '# slowly' for a comment, not for a part of the prompt; put the prompt in quotes",
    ),
    "a prompt that is an object": (
        "prompt: She climbs.",
        "prompt: {wide}",
        ": line 14: the prompt is an object; put the prompt in quotes",
    ),
    "a prompt that is a list": (
        "prompt: She climbs.",
        "prompt: [wide]",
        ": line 14: the prompt is a list; put the prompt in quotes",
    ),
    "a shot that YAML takes for an object": (
        "- video: filmed.mp4\n        remember: no",
        "- A keeper: he climbs",
        ", scene 2, shot 1, line 27: the shot is an object with 'A keeper'; allowed: an object with prompt; put the"
        " text in quotes",
    ),
    "a default text with a comment": (
        '"blurry # and dull"',
        "blurry # and dull",
        ": line 7: YAML takes '# and dull' for a comment, not for a part of the prompt; put the prompt in quotes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence_with_its_line_and_the_cure(folder: Path, case: str) -> None:
    old, new, expected = WRONG[case]
    assert STORY.count(old) >= 1
    said = message(folder, STORY.replace(old, new, 1))
    assert said == expected


def test_a_picture_is_no_clip_because_it_was_read_as_a_picture(folder: Path) -> None:
    (folder / "still.png").write_bytes((folder / "keeper.png").read_bytes())
    assert "line 27: video:" in message(folder, STORY.replace("filmed.mp4", "still.png"))
