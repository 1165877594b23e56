"""Renders clips that nobody has trained on, and lets the judge say whether they show what they should.

Prompts and seeds are drawn anew from a seed. What a clip should show comes from its prompt, or, where the prompt says
only "the character", from its memory. Everything is rendered through ``StoryMemPipeline``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from storymem_dist import StoryMemPipeline
from storymem_dist.weights.checkpoints import ModelFolders
from tools.nano import world
from tools.nano.judge import Verdict, judge

KINDS = tuple(world.KINDS)
NUM_GIVEN = 5
"""Frames that an MM2V clip continues from."""

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "motion": {
        "left": ("moves to the left", "wanders to the left", "goes left"),
        "right": ("moves to the right", "strolls to the right", "goes right"),
        "up": ("flies up", "rises", "climbs upwards"),
        "down": ("sinks down", "falls", "descends slowly"),
        "jump": ("jumps", "hops for joy", "leaps"),
        "still": ("stands still", "waits", "rests"),
    },
    "background": {
        "meadow": ("on a meadow", "over the green grass", "across a field"),
        "desert": ("in the desert", "among the dunes", "on hot sand"),
        "sea": ("by the sea", "at a quiet lake", "near the ocean"),
        "night": ("at night", "in the moonlight", "at midnight"),
        "snow": ("in the snow", "in winter", "on the ice"),
    },
}
"""How prompts say a motion and a background: words of ``words.CONCEPTS`` among others."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How clips are sampled; the defaults are those of ``conf/sampler/nano.yaml``."""

    steps: int = 16
    guidance: float = 2.0
    num_frames: int = world.FRAMES

    def arguments(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of the ``generate_*`` methods."""
        return {
            "num_frames": self.num_frames,
            "height": world.HEIGHT,
            "width": world.WIDTH,
            "steps": self.steps,
            "cfg_scale": self.guidance,
            "seed": seed,
        }


@dataclass(kw_only=True)
class Score:
    """Rightly seen clips by kind, of ``clips``.

    ``seams``: dB between the frames that a clip continues from and what it shows in their place.
    """

    clips: int = 0
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    visible: float = 0.0
    seams: list[float] = field(default_factory=list)

    def add(self, wanted: dict[str, str], found: Verdict) -> None:
        """Count one clip."""
        self.clips += 1
        self.visible += found.visible
        for kind in KINDS:
            self.right[kind] += wanted[kind] == getattr(found, kind)

    def row(self) -> dict[str, float]:
        """Shares of the clips, by kind; ``clear``: share of frames that show a character; ``seam`` in dB, the mean."""
        shares = {kind: self.right[kind] / max(1, self.clips) for kind in KINDS}
        row: dict[str, float] = {"clips": self.clips, **shares, "clear": self.visible / max(1, self.clips)}
        if self.seams:
            row["seam"] = sum(self.seams) / len(self.seams)
        return row


def make_pipeline(folders: ModelFolders) -> StoryMemPipeline:
    """A pipeline in fp32 on the CPU."""
    paths = (str(folders.t2v_dir), str(folders.i2v_dir), str(folders.lora_dir))
    return StoryMemPipeline(*paths, device="cpu", dtype="float32", enable_offload=False)


def sentence(g: torch.Generator, wanted: dict[str, str], *, named: bool = True, place: bool = True) -> str:
    """A prompt for what is ``wanted``; not ``named``: it says only "the character"."""

    def pick(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    subject = f"A {wanted['colour']} {wanted['shape']}" if named else "The character"
    words = [subject, pick(PHRASES["motion"][wanted["motion"]])]
    return " ".join([*words, pick(PHRASES["background"][wanted["background"]])] if place else words) + "."


class Exam:
    """Renders and judges. ``first_clips`` are those of ``first_shots``, which later parts take as their memory."""

    def __init__(self, pipeline: StoryMemPipeline, seed: int = 77, sampling: Sampling | None = None) -> None:
        self._pipeline = pipeline
        self._seed = seed
        self._g = torch.Generator().manual_seed(seed)
        self._sampling = sampling or Sampling()
        self.first_clips: list[Tensor] = []

    def first_shots(self, num: int) -> Score:
        """T2V: prompts that say everything."""
        score = Score()
        for index in range(num):
            wanted = {kind: self._draw(kind) for kind in KINDS} | {"motion": world.MOTIONS[index % len(world.MOTIONS)]}
            prompt = sentence(self._g, wanted)
            clip = self._pipeline.generate_t2v(prompt, **self._sampling.arguments(1000 * self._seed + index))[0]
            self.first_clips.append(clip)
            score.add(wanted, judge(clip))
        return score

    def remembered(self, num: int, num_keyframes: int = 3) -> Score:
        """M2V: three frames of a first shot are the memory; what the judge saw in that shot is right."""
        return self._recalled(num, lambda index: self.first_clips[index % len(self.first_clips)], num_keyframes)

    def remembered_drawings(self, num: int, num_keyframes: int = 3, shown_instead: int = 0) -> Score:
        """M2V with frames of drawn clips as memory; ``shown_instead``: those of the character N places further on."""
        colours = torch.arange(num) % len(world.COLOURS)
        shapes = torch.arange(num) // len(world.COLOURS) % len(world.SHAPES)
        clips, _ = world.render(world.sample_clips(num, self._g, colour=colours, shape=shapes))
        shown = clips.roll(-shown_instead, 0)
        return self._recalled(num, lambda index: clips[index], num_keyframes, shown=lambda index: shown[index])

    def unremembered(self, num: int) -> Score:
        """The control: the same prompts as ``remembered``, without memory."""
        return self._recalled(num, lambda index: self.first_clips[index % len(self.first_clips)], 0)

    def continued(self, num: int, mode: str) -> Score:
        """MI2V or MM2V after a first shot: the same character and place, another motion, and no jump at the seam."""
        score = Score()
        for index in range(num):
            source = self.first_clips[index % len(self.first_clips)]
            seen = judge(source)
            wanted = {kind: getattr(seen, kind) for kind in KINDS} | {"motion": self._draw("motion")}
            prompt, memory = sentence(self._g, wanted, named=False, place=False), [source[:, 0], source[:, -1]]
            arguments = self._sampling.arguments(3000 * self._seed + index)
            if mode == "mi2v":
                given, num_new = source[:, -1:], world.FRAMES
                clip = self._pipeline.generate_mi2v(prompt, memory, source[:, -1], **arguments)[0]
            else:
                given, num_new = source[:, -NUM_GIVEN:], world.FRAMES - NUM_GIVEN + 1
                clip = self._pipeline.generate_mm2v(prompt, memory, list(given.unbind(1)), **arguments)[0]
            score.seams.append(psnr(clip[:, : given.shape[1]], given))
            score.add(wanted, judge(clip[:, -num_new:]))
        return score

    def _recalled(
        self,
        num: int,
        source_of: Callable[[int], Tensor],
        num_keyframes: int,
        shown: Callable[[int], Tensor] | None = None,
    ) -> Score:
        score = Score()
        picked = torch.linspace(0, world.FRAMES - 1, num_keyframes).long().tolist()
        for index in range(num):
            seen = judge(source_of(index))
            wanted = {
                "colour": seen.colour,
                "shape": seen.shape,
                "motion": world.MOTIONS[(index * 5 + 1) % len(world.MOTIONS)],
                "background": self._draw("background"),
            }
            prompt = sentence(self._g, wanted, named=False)
            memory = [(shown or source_of)(index)[:, frame] for frame in picked]
            clip = self._pipeline.generate_m2v(prompt, memory, **self._sampling.arguments(2000 * self._seed + index))[0]
            score.add(wanted, judge(clip))
        return score

    def _draw(self, kind: str) -> str:
        names = world.KINDS[kind]
        return names[int(torch.randint(len(names), (1,), generator=self._g))]


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    error = (found.float() - wanted.float()).square().mean().clamp_min(1e-10)
    return float(10 * torch.log10(4 / error))
