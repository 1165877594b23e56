"""The contract between the batch loop and the code that renders one shot.

The loop (``render.batch``) passes a ``ShotJob`` with its ``ShotHistory`` to a ``ShotRenderer`` and gets a
``RenderedShot``. Types only; knows no files, leases, models or ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from storymem_dist.diffusion.denoise import DenoiseState, StepInfo
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.gathering import Merge
from storymem_dist.dispatch.needs import Needs
from storymem_dist.memory.bank import Keyframe
from storymem_dist.story.schema import Shot, Story

T = TypeVar("T")


class OfOneShot:
    """Short names for a value that is about one shot of one story."""

    __slots__ = ()
    story: Story
    shot: Shot

    @property
    def story_id(self) -> str:
        """The story's id."""
        return self.story.story_id

    @property
    def shot_id(self) -> str:
        """The shot's id."""
        return self.shot.shot_id

    @property
    def index(self) -> int:
        """The shot's index in its story, from 0."""
        return self.shot.index


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotJob(OfOneShot):
    """A shot to render.

    ``part`` is the index of its batch part (``dispatch.plan.BatchPart``). ``kind`` names the experts it needs (``t2v``
    or ``m2v``), ``mode`` how it is conditioned (``t2v``, ``m2v``, ``mi2v``, ``mm2v``); both are ``given`` for a given
    clip, which is read, not rendered. ``sampler`` has the shot's own settings over the job's. ``needs`` says
    what its memory has. ``lora_key`` names the LoRAs that it adds; empty where it has none. ``fingerprint`` covers
    everything that changes its pixels. ``attempt_id`` is unique to each attempt. ``why``: what changed since the shot
    was rendered from other inputs; empty where it was not.
    """

    part: int
    story: Story
    shot: Shot
    kind: str
    mode: str
    seed: int
    sampler: SamplerSettings
    needs: Needs
    fingerprint: str
    attempt_id: str
    why: str = ""
    lora_key: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotHistory:
    """What a shot uses of the committed shots before it.

    ``keyframes``: those of exactly the shots that its memory may use (``Needs.memory``), in the order of the story,
    without given images. ``tail``: the last frames of the shot that it continues, uint8 ``[n, 3, H, W]`` in order; None
    where it continues none.
    """

    keyframes: tuple[Keyframe, ...]
    tail: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedShot:
    """A rendered shot, not yet saved.

    ``clip``: uint8 ``[F, 3, H, W]``, given frames already dropped. ``keyframes``: those it adds to the memory bank.
    ``tail``: its last frames, uint8 ``[n, 3, H, W]``, for a continuation. ``memory``: what the memory decided, as JSON
    values (keys ``recalled`` and ``decisions``). ``stage_seconds``: seconds per stage. ``given``: what a given clip is
    (``story.videos.VideoFacts``), as JSON values. ``loras``: what the shot's own LoRAs cost, as JSON values; it may
    differ between equal shots. All tensors on the CPU.
    """

    clip: Tensor
    keyframes: tuple[Keyframe, ...]
    tail: Tensor
    memory: Mapping[str, Any] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A shot for this replica, with everything that rendering it needs. ``merge``: idle replicas take part."""

    job: ShotJob
    history: ShotHistory
    resume: DenoiseState | None
    low_memory: bool
    merge: Merge | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Called:
    """This replica takes part in a shot of another one, which has the assignment."""

    merge: Merge


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """No more shots for this replica. ``state``: ``done``, ``stopped`` or ``failed``."""

    state: str
    reason: str = ""


class ShotStopped(Exception):
    """Not an error: ``should_stop`` ended a shot that has no state to continue from (a given clip)."""


class ShotRenderer(Protocol):
    """Renders shots on the ranks of one replica. All ranks call all methods in the same order.

    ``retries_in_place``: whether a shot that ran out of memory may be retried at once in this process. True for a
    replica of one rank. In a wider one the peers still wait in a collective, so the process must end and be restarted.
    """

    retries_in_place: bool

    def prepare(self, kind: str) -> None:
        """Load the experts of ``kind`` (``t2v`` or ``m2v``); release those of the other kind."""

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
        """Render one shot; the arguments after ``history`` are those of ``diffusion.denoise.denoise``.

        ``low_memory`` keeps the experts in host memory and one at a time on the device: for a shot that ran out of
        memory before.

        Raises ``DenoiseStopped`` or ``ShotStopped`` when ``should_stop`` returned True, ``ShotError`` (or any
        ``StoryMemError``) when this shot cannot be rendered, and ``torch.OutOfMemoryError``. Any other exception ends
        the job.
        """


class LeaderDecides(Protocol):
    """Runs a function on the leader of the replica and gives its value, or its exception, to all ranks."""

    def __call__(self, fn: Callable[[], T], /) -> T:
        """Return what ``fn`` returned on the leader, or raise what it raised there."""


def alone(fn: Callable[[], T], /) -> T:
    """``LeaderDecides`` for a replica of one rank."""
    return fn()
