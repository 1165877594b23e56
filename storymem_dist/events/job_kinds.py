"""The events of a job and of its processes, each a frozen value whose docstring explains its fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStarted(Event):
    """A replica of a job starts or restarts. Every replica leader sends its own.

    ``job`` names the job among those that share the run folder; its replicas use the same name, also after a restart.
    ``num_stories`` and ``num_shots`` count the whole batch, ``num_devices`` the ranks of *this* replica.
    ``peak_tflops`` is the dense bf16 peak of one device, None where unknown (then there is no FLOP utilisation).
    ``attention`` is the attention kernel; where it was chosen, with its time against the others'. ``compile`` says
    whether blocks are compiled, and why. ``versions`` maps package names to versions.
    """

    run_id: str = ""
    job: str = ""
    config_hash: str = ""
    num_stories: int = 0
    num_shots: int = 0
    num_replicas: int = 1
    num_devices: int = 1
    device: str = "cpu"
    layout: str = ""
    attention: str = ""
    compile: str = ""
    host: str = ""
    process_id: int = 0
    peak_tflops: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutChosen(Event):
    """A plan decided how the ranks of a job render; sent by its first rank. ``reasons`` and ``considered`` are lines.

    ``memory_gib``: predicted, of a rank's device, by part. Predicted times are of the shots with the most in memory,
    and of the whole job from this event on.
    """

    layout: str
    weights: str = ""
    experts: str = ""
    compiled: bool = False
    reasons: tuple[str, ...] = ()
    considered: tuple[str, ...] = ()
    memory_gib: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    seconds_per_shot: float | None = None
    total_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFinished(Event):
    """A replica has nothing left to do. ``outcome``: ``finished``, ``stopped`` (on request, resumable) or ``failed``.

    The counts are of this replica since this start: shots rendered, resumed inside the shot, found committed, failed.
    """

    outcome: str
    num_rendered: int = 0
    num_resumed: int = 0
    num_skipped: int = 0
    num_failed: int = 0
    elapsed_seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryboardRejected(Event):
    """A storyboard cannot be read; the batch continues without it."""

    source: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequested(Event):
    """A stop was requested: ``reason`` is ``SIGTERM``, ``SIGINT``, ``STOP file`` or the like."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestApplied(Event):
    """A replica has applied a request of a person to the queue; every replica sends its own.

    ``at_start``: it was made before the job began, and is a part of its plan. Only the first replica sends those, at
    every start: readers ignore them where they know the request.

    ``number`` is the request's place in the run folder's log, which has one order, so readers keep one entry for each.
    ``action`` is what was asked for (``skip``), ``who`` asked it at ``asked_at`` (seconds since the epoch; the wall
    time minus this is the time to its effect). ``shots`` are those that are rendered again for it. ``message`` says the
    effect in words, or why there was none.
    """

    number: int
    action: str
    story_id: str = ""
    shots: tuple[str, ...] = ()
    who: str = ""
    asked_at: float = 0.0
    message: str = ""
    at_start: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WarningIssued(Event):
    """Something that people should know but that stops nothing. ``source`` names the part that noticed it."""

    message: str
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaWaited(Event):
    """A replica had no shot to render for ``elapsed_seconds`` (sent when the wait ends). ``reason`` is the cause."""

    elapsed_seconds: float
    reason: str = "no shot is ready"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaHelped(Event):
    """This replica took part in a shot of replica ``leader`` for ``elapsed_seconds`` (sent when its part ends)."""

    story_id: str
    shot_id: str
    leader: int
    elapsed_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsProgress(Event):
    """Bytes of weights read so far. ``what`` names them (``t2v high_noise``), ``action`` is ``load`` or ``download``.

    The last one has ``bytes_done == bytes_total``; ``elapsed_seconds`` counts from the first byte.
    """

    what: str
    bytes_done: int
    bytes_total: int
    elapsed_seconds: float = 0.0
    action: str = "load"


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputSampled(Event):
    """Numbers that only the running process knows, sampled from time to time. None: not known on this machine.

    The sample is of the replica leader's process. ``collective_seconds`` and ``bytes_read`` count since the previous
    sample. ``collective_seconds`` is the time that the leader spent in the collectives of forwards and of the VAE,
    including the wait for slower ranks. It is known on CPUs only, and not under torch.compile: the host cannot measure
    how long a GPU waits. FSDP2's all-gathers of weights are not counted. ``bytes_read`` is what all ranks of the
    replica read from the experts' files (without LoRAs, text encoder and VAE). ``gpu_memory_gib`` is what torch
    reserves on the leader's device, ``peak_gpu_memory_gib`` the most that tensors used of it. ``queue_depth`` and
    ``num_running`` count the ready and the running shots of the batch when the replica took one.

    Rates that follow from other events (seconds per step, clips per GPU-hour, tokens per second, FLOP utilisation,
    idle seconds) are not sent: readers compute them.
    """

    collective_seconds: float | None = None
    bytes_read: int | None = None
    gpu_memory_gib: float | None = None
    peak_gpu_memory_gib: float | None = None
    queue_depth: int | None = None
    num_running: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemSampled(Event):
    """Memory and load of one rank's process and device. Every rank sends these, not only leaders. None: not known.

    ``cpu_ratio`` is CPU seconds per second (1.0: one busy core); ``gpu_busy_ratio`` lies between 0 and 1.
    """

    rank: int
    host: str
    host_memory_gib: float | None = None
    cpu_ratio: float | None = None
    gpu_memory_gib: float | None = None
    gpu_busy_ratio: float | None = None
