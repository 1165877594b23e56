"""A storyboard in YAML that uses every key of a shot, and the files that it names."""

from pathlib import Path

from PIL import Image

from storymem_dist.story.loading import load_storyboard
from storymem_dist.story.schema import Story
from tests.helpers.videos import write_video

STORY = """\
story_name: The Lamp
style: Ink.
reference_images: [keeper.png]
defaults:
  num_inference_steps: 20
  guidance: 4
  negative_prompt: "blurry # and dull"
entities:
  Mira: {description: A woman in red., references: [mira.png]}
  harbour: A harbour at night.
scenes:
  - scene_num: 1
    shots:
      - prompt: She climbs.
        name: climb
        duration: 2.5
        start_image: still.png
        entities: [Mira]
      - prompt: She lights it.
        cut: false
        seed: 7
        guidance: {high_noise: 3, low: 2}
        negative_prompt: null
        recall: [climb, references]
  - scene_num: 2
    shots:
      - video: filmed.mp4
        remember: no
      - video_prompt: The sea.
        shot_id: sea
        num_frames: 33
        references: [mira.png, {path: keeper.png, sink: true}]
        loras: [push.safetensors, {path: motion, expert: high_noise, strength: 0.5}]
        entities: [harbour, Mira, sky]
        recall: none
"""


def write_files(folder: Path) -> Path:
    """Write the pictures, the clip and the LoRAs of ``STORY``."""
    for name in ("keeper.png", "mira.png", "still.png"):
        Image.new("RGB", (8, 6), "navy").save(folder / name)
    write_video(folder / "filmed.mp4")
    (folder / "push.safetensors").touch()
    (folder / "motion").mkdir()
    return folder


def load(folder: Path, text: str) -> Story:
    """Load ``text`` as a storyboard in ``folder``."""
    path = folder / "lamp.yaml"
    path.write_text(text)
    return load_storyboard(path)
