"""The events of a render, each a frozen value whose docstring explains its fields. Knows no senders or receivers.

Those of a job are in ``job_kinds``, those of stories and shots here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from storymem_dist.events.job_kinds import (
    Event,
    JobFinished,
    JobStarted,
    LayoutChosen,
    ReplicaHelped,
    ReplicaWaited,
    RequestApplied,
    StopRequested,
    StoryboardRejected,
    SystemSampled,
    ThroughputSampled,
    WarningIssued,
    WeightsProgress,
)

STAGES = ("text", "load", "recall", "loras", "condition", "denoise", "compile", "decode", "keyframes", "save", "join")
"""Names of the stages, in the order in which a shot passes through them; ``compile`` is a part of ``denoise``."""

MEMORY_VERDICTS = ("recalled", "evicted", "kept", "kept_as_last_resort", "duplicate", "low_quality")
"""Values of ``MemoryDecided.verdict``. ``recalled`` and ``evicted`` apply to keyframes in the bank, the others to
frames of the new clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryStarted(Event):
    """A story is part of the batch. Sent once per story and start, before its first shot.

    ``waits_for``: for each shot the positions of the shots before it that it waits for directly; empty where the story
    cannot be planned. ``priority``: that of the list of storyboards; stories of a lower one start first.
    """

    story_id: str
    name: str = ""
    num_shots: int = 0
    waits_for: tuple[tuple[int, ...], ...] = ()
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryFinished(Event):
    """All that can be rendered of a story is.

    ``outcome``: ``finished`` or ``failed``; ``video``: path of ``story.mp4``.
    """

    story_id: str
    outcome: str = "finished"
    video: str | None = None
    num_shots: int = 0
    elapsed_seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotStarted(Event):
    """A replica starts an attempt at a shot.

    ``shot_index`` is the position in the story, from 0. ``why`` is the reason for rendering a shot again that has a
    record (an edited prompt, a forced re-render), else it is empty. ``num_tokens`` and ``tflop_per_step`` (all passes
    of one denoising step, all devices of the replica together) let readers compute rates; None: not known.
    ``num_devices`` render it together (None: those of the replica). ``replicas`` are those that do, where several do;
    this one leads them.
    """

    story_id: str
    shot_id: str
    shot_index: int = 0
    mode: str = ""
    seed: int = 0
    attempt_id: str = ""
    prompt: str = ""
    num_memory: int = 0
    num_steps: int = 0
    num_frames: int = 0
    height: int = 0
    width: int = 0
    num_tokens: int | None = None
    tflop_per_step: float | None = None
    why: str = ""
    num_devices: int | None = None
    replicas: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted(Event):
    """A stage (one of ``STAGES``) begins. Story and shot are None for stages of the job (text, load)."""

    stage: str
    story_id: str | None = None
    shot_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished(Event):
    """The stage is over; it took ``elapsed_seconds`` up to this event's wall time."""

    stage: str
    elapsed_seconds: float
    story_id: str | None = None
    shot_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LorasUsed(Event):
    """A shot has been denoised with ``num_loras`` LoRAs of its own, added to experts that were not loaded again.

    ``elapsed_seconds`` took reading them into host memory (almost none if they were there: ``already_read``),
    ``device_seconds`` copying them to the device (on a GPU: until the copies were queued), ``device_gib`` is the most
    memory that they had there.
    """

    story_id: str
    shot_id: str
    num_loras: int
    elapsed_seconds: float
    device_seconds: float
    device_gib: float
    already_read: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFinished(Event):
    """One denoising step is done. ``step`` counts finished steps: 1 after the first, ``num_steps`` at the end.

    ``gpu_memory_gib`` is what torch reserves on the leader's device. ``reused``: the result comes from the step cache,
    not from the whole model.
    """

    story_id: str
    shot_id: str
    step: int
    num_steps: int
    expert: str
    elapsed_seconds: float
    timestep: int | None = None
    gpu_memory_gib: float | None = None
    reused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotFinished(Event):
    """A shot is committed: its record and files are in the run folder.

    ``clip`` and ``keyframes`` are paths; ``stage_seconds`` maps stages to seconds; ``elapsed_seconds`` is the whole
    attempt. ``already_committed``: another attempt was committed first, so this one does not count.
    """

    story_id: str
    shot_id: str
    attempt_id: str = ""
    fingerprint: str = ""
    clip: str = ""
    keyframes: tuple[str, ...] = ()
    num_frames: int = 0
    fps: float = 16.0
    elapsed_seconds: float = 0.0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    already_committed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotFailed(Event):
    """An attempt at a shot ended in an error. ``will_retry``: the shot is retried automatically."""

    story_id: str
    shot_id: str
    reason: str
    error_type: str = ""
    stage: str | None = None
    attempt_id: str = ""
    will_retry: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotResumed(Event):
    """A shot resumes inside its denoising loop: the first ``step`` of ``num_steps`` steps come from a checkpoint."""

    story_id: str
    shot_id: str
    step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotSkipped(Event):
    """A shot needs no rendering (``committed``) or cannot be rendered (``predecessor failed``, ``failed before``)."""

    story_id: str
    shot_id: str
    reason: str = "committed"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryDecided(Event):
    """One decision about one frame or keyframe, and why. ``memory_events`` creates them from a shot's memory record.

    ``story_id``/``shot_id`` is the shot for which it was decided. ``verdict`` is one of ``MEMORY_VERDICTS``.
    ``source_shot_index`` is the position of the shot the frame comes from (-1: a reference image of the story),
    ``source_frame_index`` its frame in that shot's clip, ``slot`` its number among that shot's keyframes (None: not
    kept; for references the position of the image). ``position`` is its place among the recalled keyframes.
    ``similarity`` is that to the frame chosen before it, ``bank_similarity`` the highest to a keyframe of the bank
    (named ``against``), ``quality`` the quality score. None: not computed, or it does not apply.
    """

    story_id: str
    shot_id: str
    verdict: str
    source_shot_index: int
    source_frame_index: int
    slot: int | None = None
    position: int | None = None
    similarity: float | None = None
    bank_similarity: float | None = None
    against: str | None = None
    quality: float | None = None
    why: str = ""


EVENT_TYPES: Mapping[str, type[Event]] = {
    cls.__name__: cls
    for cls in (
        JobStarted,
        LayoutChosen,
        JobFinished,
        StoryboardRejected,
        RequestApplied,
        StopRequested,
        WarningIssued,
        ReplicaHelped,
        ReplicaWaited,
        WeightsProgress,
        ThroughputSampled,
        SystemSampled,
        StoryStarted,
        StoryFinished,
        ShotStarted,
        StageStarted,
        StageFinished,
        LorasUsed,
        StepFinished,
        ShotFinished,
        ShotFailed,
        ShotResumed,
        ShotSkipped,
        MemoryDecided,
    )
}
"""Every event class by its name in JSON."""
