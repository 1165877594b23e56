"""How replicas share, resume and retry the shots of a batch: plain values, checked on creation.

None of them changes pixels, so none is part of a fingerprint.
"""

from dataclasses import dataclass, field

from storymem_dist.errors import ConfigError, require_between, require_one_of, shown

RESUME_RULES = ("continue", "strict")
BUSY_RULES = ("join", "wait", "refuse")
ELASTIC_TAIL = ("off", "auto", "always")
_DAY = 24 * 3600.0
_MAX_SHOT_NAME = 200  # in a request to render again


@dataclass(kw_only=True, slots=True)
class DispatchSettings:
    """The ``dispatch`` group.

    ``resume``: what to do with shots whose records were made from other inputs (an edited prompt, another setting).
    ``continue`` renders them and all shots that need them again; ``strict`` refuses to start and lists the differences.
    ``rerender``: shots to render again although nothing changed, as ``STORY:SHOT`` (``ocean:shot_03``, ``ocean:3`` or
    a shot's own name); the shots that need them are rendered again too. Applied once per job, for any number of
    replicas and restarts.
    ``retry_failed``: render shots again that failed in an earlier job.
    ``on_busy``: what to do when another job works in the same run folder: ``join`` it and share the shots, ``wait``
    until it has left, or ``refuse`` to start.
    ``checkpoint_every_steps``: save a running shot's latents every N denoising steps (0: only at a stop).
    ``lease_seconds``: a replica whose heartbeat stands still for this long counts as dead, and another takes its shot.
    A shorter pause (in a debugger or a virtual machine) does not lose the shot.
    ``poll_seconds``: shortest time between two scans of the run folder by one replica; longer among hundreds.
    ``overlap_saving``: render the next shot of another story while one is being saved. A replica then has two shots in
    flight, and its leader holds one more clip in host memory (97 MB for 81 frames of 832x480). ``false``: one after the
    other.
    ``max_attempts``: a shot is marked failed after this many processes were killed or crashed while rendering it.
    ``swap_seconds``: expected time to load the other experts, until it has been measured.
    ``elastic_tail``: whether idle replicas of a node render the last shots together, when there are fewer ready shots
    than replicas (``render.merged``). ``auto`` merges where the planner expects that the job ends sooner, ``always``
    assumes that it does, ``off`` never merges. The process groups for it are opened when the job begins, and take some
    device memory.

    Raises ``ConfigError`` for a value that is not allowed.
    """

    resume: str = "continue"
    rerender: list[str] = field(default_factory=list)
    retry_failed: bool = False
    on_busy: str = "join"
    checkpoint_every_steps: int = 10
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    overlap_saving: bool = True
    max_attempts: int = 5
    swap_seconds: float = 60.0
    elastic_tail: str = "off"

    def __post_init__(self) -> None:
        require_one_of("dispatch.resume", self.resume, RESUME_RULES)
        require_one_of("dispatch.on_busy", self.on_busy, BUSY_RULES)
        require_one_of("dispatch.elastic_tail", self.elastic_tail, ELASTIC_TAIL)
        require_between("dispatch.checkpoint_every_steps", self.checkpoint_every_steps, 0, 1000)
        require_between("dispatch.lease_seconds", self.lease_seconds, 1.0, _DAY)
        require_between("dispatch.poll_seconds", self.poll_seconds, 0.0, 3600.0)
        require_between("dispatch.max_attempts", self.max_attempts, 1, 1_000_000)
        require_between("dispatch.swap_seconds", self.swap_seconds, 0.0, _DAY)
        for shot in self.rerender:
            story, colon, name = shot.rpartition(":")
            is_too_long = len(shot) > _MAX_SHOT_NAME or (name.isdecimal() and len(name) > 12)
            if not (story and colon and name) or is_too_long:
                raise ConfigError(
                    f"dispatch.rerender={shown(shot)} is not allowed; write STORY:SHOT, for example ocean:shot_03 or "
                    "ocean:3"
                )
