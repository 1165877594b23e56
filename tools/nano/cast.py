"""Stories of two characters: which of them does a shot show whose prompt says only "the character"?

``two`` introduces both; later shots recall one or the other, by name or by entity. ``away`` has a character who was
seen once and is away for eleven shots. What comes before the shot in question is drawn there, as given clips, so that
it alone is rendered. Everything goes through ``storymem-render``; ``judge`` says what is seen.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from storymem_dist.artifacts.video import VideoSettings, read_clip, write_clip
from tools.nano import world
from tools.nano.exam import sentence
from tools.nano.judge import Verdict, judge

FPS = 12
NUM_AWAY = 11

Wanted = dict[int, dict[str, str]]
"""What the shots in question should show, by number (from 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Character:
    """Who is seen: ``name`` is that of the entity."""

    name: str
    colour: str
    shape: str


@dataclass(kw_only=True)
class Cast:
    """Writes stories into ``folder`` and keeps what their shots should show, by story id."""

    folder: Path
    g: torch.Generator
    wanted: dict[str, Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def two(self, name: str, one: Character, other: Character) -> None:
        """Both are introduced by prompts; then each is recalled by the name of a shot, and by the schedule."""
        characters = {"one": one, "other": other}
        shots: list[dict[str, Any]] = []
        for key, character in characters.items():
            first = {"prompt": f"A {character.colour} {character.shape} with big eyes stands still in the snow."}
            shots.append({**first, "name": key, "recall": "none", "entities": [character.name]})
        for key in ("one", "other"):
            shots.append({"prompt": self._ask(name, len(shots) + 1, characters[key]), "recall": key})
        for key in ("other", "one"):
            asked = self._ask(name, len(shots) + 1, characters[key])
            shots.append({"prompt": asked, "entities": [characters[key].name]})
        self._write(name, shots)

    def away(self, name: str, shown: Character, other: Character) -> None:
        """``other`` begins, ``shown`` follows, eleven shots of ``other`` go by, and ``shown`` is back."""
        shots = []
        for number, character in enumerate([other, shown, *[other] * NUM_AWAY], start=1):
            clip = f"{name}_{number:02d}.mp4"
            write_clip(self.folder / clip, self._drawn(character), FPS, VideoSettings())
            shots.append({"video": clip, "entities": [character.name]})
        shots.append({"prompt": self._ask(name, len(shots) + 1, shown), "entities": [shown.name]})
        self._write(name, shots)

    def _ask(self, name: str, number: int, character: Character) -> str:
        wanted = {"colour": character.colour, "shape": character.shape}
        for kind in ("motion", "background"):
            names = world.KINDS[kind]
            wanted[kind] = names[int(torch.randint(len(names), (1,), generator=self.g))]
        self.wanted.setdefault(name, {})[number] = wanted
        return sentence(self.g, wanted, named=False)

    def _drawn(self, character: Character) -> Tensor:
        colour = torch.tensor([tuple(world.COLOURS).index(character.colour)])
        shape = torch.tensor([world.SHAPES.index(character.shape)])
        return as_frames(world.render(world.sample_clips(1, self.g, colour=colour, shape=shape))[0][0])

    def _write(self, name: str, shots: Sequence[dict[str, Any]]) -> None:
        story = {"story_name": name, "scenes": [{"scene_num": 1, "shots": list(shots)}]}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(json_like(story), sort_keys=False))


def json_like(value: Any) -> Any:
    """``value`` whose lists and dictionaries are all different objects, so that YAML needs no aliases."""
    if isinstance(value, dict):
        return {key: json_like(item) for key, item in value.items()}
    return [json_like(item) for item in value] if isinstance(value, list) else value


def as_frames(pixels_CFHW: Tensor) -> Tensor:
    """A clip in [-1, 1] as uint8 frames ``[F, 3, H, W]``."""
    return ((pixels_CFHW.transpose(0, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def render(stories: Path, run: Path, *settings: str) -> None:
    """Render all stories of a folder with the nano model."""
    command = [sys.executable, "-m", "storymem_dist", f"stories={stories}", f"output={run}", "model=nano"]
    command += ["tracking=none", "parallel.device=cpu", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def seen(run: Path, story_id: str, number: int) -> Verdict:
    """What a rendered shot shows."""
    frames = read_clip(run / "stories" / story_id / f"shot_{number:02d}.mp4")
    return judge(frames.transpose(0, 1).float() / 127.5 - 1)
