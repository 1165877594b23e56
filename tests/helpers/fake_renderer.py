"""A renderer of small pictures that depend on the shot's fingerprint and history alone, for tests of its callers.

It denoises nothing but behaves like the real one: steps, checkpoints, stops, resumes, keyframes, failures on demand.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, StepInfo
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import RenderedShot, ShotHistory, ShotJob
from storymem_dist.events import Event
from storymem_dist.memory.bank import Keyframe
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.schema import Scene, Shot, Story

SAMPLER = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 4, "continuation": "mi2v"}


def make_story(story_id: str, num_shots: int, *, changed: Mapping[int, str] | None = None, **fields: object) -> Story:
    """A story of ``num_shots`` shots; every third continues the one before. ``changed`` replaces prompts by index."""
    shots = tuple(
        Shot(
            index=index,
            index_in_scene=index,
            scene_num=1,
            prompt=(changed or {}).get(index, f"{story_id}, shot {index}"),
            cut=index % 3 != 2,
        )
        for index in range(num_shots)
    )
    values = {"name": story_id, "overview": "", "scenes": (Scene(scene_num=1, shots=shots),), **fields}
    return Story(story_id=story_id, **values)  # type: ignore[arg-type]


def make_part(root: Path, stories: Sequence[Story], **changes: object) -> BatchPart:
    """A batch part of small clips. ``changes`` go to the sampler, ``observers`` and ``recall`` (a rule) to the part."""
    observers = changes.pop("observers", None)
    memory = MemorySettings(recall=str(changes.pop("recall", "window")))
    num_refused = int(str(changes.pop("num_refused", 0)))
    sampler = SamplerSettings(**{**SAMPLER, **changes})  # type: ignore[arg-type]
    shared = {"height": sampler.height, "width": sampler.width, "steps": sampler.num_inference_steps}
    return BatchPart(
        run=RunFolder(root),
        stories=stories,
        sampler=sampler,
        inputs={
            "t2v": {**shared, "flow_shift": sampler.flow_shift_t2v},
            "m2v": {**shared, "flow_shift": sampler.flow_shift_m2v, "continuation": sampler.continuation},
        },
        video=VideoSettings(preset="ultrafast"),
        cost=CostModel(
            num_frames=sampler.num_frames,
            height=sampler.height,
            width=sampler.width,
            num_inference_steps=sampler.num_inference_steps,
            is_a14b=False,
        ),
        memory=memory,
        config_hash="c0ffee",
        config_text="fake: true\n",
        num_refused=num_refused,
        **({} if observers is None else {"observers": observers}),  # type: ignore[arg-type]
    )


@dataclass
class Events:
    """An observer that keeps everything."""

    seen: list[Event] = field(default_factory=list)

    def notify(self, event: Event) -> None:
        self.seen.append(event)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.seen if isinstance(event, kind)]


@dataclass
class FakeRenderer:
    """See the module. ``before_step(job, step)`` is called before every step and may sleep, raise or kill.

    ``log`` is a file that gets one line (``story:shot``) for every shot that begins, to count what is rendered twice.
    """

    step_seconds: float = 0.0
    before_step: Callable[[ShotJob, int], None] = lambda job, step: None
    log: Path | None = None
    num_steps: int = 4
    retries_in_place: bool = True
    prepared: list[str] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)
    resumed: list[tuple[str, int]] = field(default_factory=list)
    low_memory: list[str] = field(default_factory=list)

    def prepare(self, kind: str) -> None:
        self.prepared.append(kind)

    def render(
        self,
        job: ShotJob,
        history: ShotHistory,
        *,
        resume: DenoiseState | None,
        on_step: Callable[[StepInfo], None],
        should_stop: Callable[[], bool],
        on_checkpoint: Callable[[DenoiseState], None],
        checkpoint_every_steps: int,
        low_memory: bool,
    ) -> RenderedShot:
        name = f"{job.story_id}:{job.shot_id}"
        self.rendered.append(name)
        if low_memory:
            self.low_memory.append(name)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{name} {os.getpid()}\n")
        latents, first = _start(job, history), 0
        if resume is not None:
            latents, first = resume.latents, resume.step
            self.resumed.append((name, first))
        for step in range(first, self.num_steps):
            if should_stop():
                raise DenoiseStopped(self._state(latents, step, job))
            self.before_step(job, step)
            time.sleep(self.step_seconds)
            latents = (latents * 1.7 + step + 1).sin()
            done = step + 1
            on_step(StepInfo(step=done, num_steps=self.num_steps, timestep=0, expert="high_noise", elapsed_seconds=0.0))
            if checkpoint_every_steps and done % checkpoint_every_steps == 0 and done < self.num_steps:
                on_checkpoint(self._state(latents, done, job))
        return self._shot(job, history, latents)

    def _state(self, latents: Tensor, step: int, job: ShotJob) -> DenoiseState:
        return DenoiseState(
            latents=latents,
            solver_state={"step_index": torch.tensor(step)},
            solver_name="fake",
            num_steps=self.num_steps,
            fingerprint=job.fingerprint,
        )

    def _shot(self, job: ShotJob, history: ShotHistory, latents: Tensor) -> RenderedShot:
        generator = torch.Generator().manual_seed(int(latents.double().sum().item() * 1e6) % 2**31)
        given = {"mi2v": 1, "mm2v": 5}.get(job.mode, 0)
        clip = torch.randint(0, 255, (9 - given, 3, 4, 6), generator=generator, dtype=torch.uint8)
        clip = clip.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        kept = tuple(
            Keyframe(image=clip[frame], shot_index=job.index, slot=slot, frame_index=frame)
            for slot, frame in enumerate((0, 2))
        )
        return RenderedShot(
            clip=clip,
            keyframes=kept,
            tail=clip[-2:],
            memory={
                "recalled": [{"shot_index": k.shot_index, "slot": k.slot} for k in history.keyframes],
                "decisions": [{"frame_index": k.frame_index, "verdict": "kept", "quality": float("nan")} for k in kept],
            },
            stage_seconds={"denoise": 0.1},
        )


def _start(job: ShotJob, history: ShotHistory) -> Tensor:
    """Numbers that depend on the fingerprint and on every pixel of the history, as real latents do."""
    digest = hashlib.sha256(job.fingerprint.encode())
    for keyframe in history.keyframes:
        digest.update(keyframe.image.numpy().tobytes())
    if history.tail is not None and job.mode in ("mi2v", "mm2v"):
        digest.update(history.tail.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.float32)


def finished_files(root: Path) -> dict[str, bytes]:
    """Everything a run must reproduce: clips, keyframes, stories, and records without ``timing`` and ``host``."""
    files: dict[str, bytes] = {}
    for path in sorted((root / "stories").glob("*/*")):
        if path.suffix == ".mp4":
            files[str(path.relative_to(root))] = path.read_bytes()
        elif path.name.startswith("shot_") and path.suffix == ".json":
            record = json.loads(path.read_text())
            record.pop("timing")
            record.pop("host")
            files[str(path.relative_to(root))] = json.dumps(record, sort_keys=True).encode()
    for path in sorted((root / "stories").glob("*/keyframes/*.png")):
        files[str(path.relative_to(root))] = path.read_bytes()
    return files
