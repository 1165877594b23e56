"""Made-up stories for ``fake_run``: prompts, drawn clips, and what their memory keeps and refuses."""

import torch
from torch import Tensor

from storymem_dist.memory.bank import Keyframe
from storymem_dist.memory.keyframes import FrameDecision
from storymem_dist.story.schema import Scene, Shot, Story

HEIGHT, WIDTH, NUM_FRAMES, FPS = 96, 160, 17, 16
PROMPTS = (
    "A lighthouse keeper climbs a spiral staircase, lantern in hand, as the storm beats against the “glass”.",
    "Close-up of weathered hands trimming the wick; warm light spills over brass.",
    "Wide shot: the beam sweeps across a black sea and finds a small fishing boat.",
    "The boat turns towards the light. Spray, ropes, a child asleep under a tarpaulin.",
)


def make_story(number: int, num_shots: int) -> Story:
    """A story of scenes with two shots each."""
    names = ("The lighthouse", "Paper cranes", "Night market", "Glacier")
    shots = [
        Shot(
            index=index,
            index_in_scene=index % 2,
            scene_num=index // 2 + 1,
            prompt=PROMPTS[(index + number) % len(PROMPTS)],
            cut=index % 2 == 0,
        )
        for index in range(num_shots)
    ]
    scenes = tuple(
        Scene(scene_num=first // 2 + 1, shots=tuple(shots[first : first + 2])) for first in range(0, num_shots, 2)
    )
    return Story(story_id=f"story_{number}", name=names[number % 4], overview="A short film.", scenes=scenes)


def draw_clip(story_number: int, shot_index: int) -> Tensor:
    """uint8 ``[F, 3, H, W]``: a disc that moves over a sky of the story's colour."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    colour = torch.tensor([(40, 70, 110), (120, 60, 50), (50, 100, 70), (90, 90, 130)][story_number % 4])
    frames = []
    for frame in range(NUM_FRAMES):
        sky = colour[:, None, None] + (rows * 60 // HEIGHT)[None]
        x, y = WIDTH * (frame + 4) // (NUM_FRAMES + 8), HEIGHT * (2 + shot_index % 4) // 8
        disc = (rows - y) ** 2 + (columns - x) ** 2 < 200
        frames.append(torch.where(disc[None], torch.tensor([250, 220, 160])[:, None, None], sky).clamp(0, 255))
    return torch.stack(frames).to(torch.uint8)


def choose(shot_index: int, bank_size: int, story_number: int) -> tuple[list[Keyframe], list[FrameDecision]]:
    """Keep the first frame (every third shot also a second one), refuse one as duplicate and one for its quality."""
    clip = draw_clip(story_number, shot_index)
    verdicts = [(0, 0, "kept"), (3, None, "low_quality"), (8, 1, "kept" if shot_index % 3 == 0 else "duplicate")]
    keyframes, decisions = [], []
    for frame_index, slot, verdict in verdicts:
        if verdict == "kept":
            image = clip[frame_index].clone()
            keyframes.append(Keyframe(image=image, shot_index=shot_index, slot=slot or 0, frame_index=frame_index))
        decisions.append(
            FrameDecision(
                frame_index=frame_index,
                slot=slot,
                verdict=verdict,
                similarity=None if slot in (None, 0) else 0.84,
                bank_similarity=round(0.7 + 0.01 * shot_index, 3) if bank_size and slot is not None else None,
                against="shot_01 keyframe 0" if bank_size and slot is not None else None,
                quality=1.2 if verdict == "low_quality" else 4.5,
                why={
                    "kept": "differs from everything in the bank",
                    "duplicate": "more similar than 0.9 to a keyframe of the bank",
                    "low_quality": "quality 1.2 is below 3.0",
                }[verdict],
            )
        )
    return keyframes, decisions
