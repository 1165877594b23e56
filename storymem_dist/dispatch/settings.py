"""How a batch is shared out, resumed and given up: plain values, checked when they are made.

None of them changes pixels, so none of them is part of a fingerprint.
"""

from dataclasses import dataclass, field

from storymem_dist.errors import ConfigError, require_at_least, require_one_of

RESUME_RULES = ("continue", "strict")
BUSY_RULES = ("join", "wait", "refuse")


@dataclass(kw_only=True, slots=True)
class DispatchSettings:
    """The ``dispatch`` group.

    ``resume``: what to do with shots whose records were made from other inputs (an edited prompt, another setting).
    ``continue`` renders them again, with all that follow; ``strict`` refuses to start and lists the differences.
    ``rerender``: shots to render again although nothing changed, as ``STORY:SHOT`` (``ocean:shot_03`` or ``ocean:3``);
    the shots after them follow. Counted once per job, however many replicas and restarts it has.
    ``retry_failed``: try shots again that failed in an earlier job.
    ``on_busy``: what to do when another job works in the same run folder: ``join`` it and share the shots, ``wait``
    until it is gone, or ``refuse`` to start.
    ``checkpoint_every_steps``: save a running shot's latents after every so many denoising steps (0: only at a stop).
    ``lease_seconds``: a replica that has shown no sign of life for so long is taken for dead, and its shot is given to
    another. It may be paused (by a debugger or a virtual machine) for less than that without losing its shot.
    ``poll_seconds``: shortest time between two scans of the run folder by one replica.
    ``overlap_saving``: render the next shot of another story while one is being saved. A replica then has two shots in
    flight, and its leader holds one more clip in host memory (97 MB for 81 frames of 832x480). ``false``: one after the
    other.
    ``max_attempts``: a shot whose renderers died (without a word: killed, crashed) so often is marked failed.
    ``swap_seconds``: expected time of loading the other experts, until it has been measured.
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

    def __post_init__(self) -> None:
        require_one_of("dispatch.resume", self.resume, RESUME_RULES)
        require_one_of("dispatch.on_busy", self.on_busy, BUSY_RULES)
        require_at_least("dispatch.checkpoint_every_steps", self.checkpoint_every_steps, 0)
        require_at_least("dispatch.lease_seconds", self.lease_seconds, 1.0)
        require_at_least("dispatch.poll_seconds", self.poll_seconds, 0.0)
        require_at_least("dispatch.max_attempts", self.max_attempts, 1)
        require_at_least("dispatch.swap_seconds", self.swap_seconds, 0.0)
        for shot in self.rerender:
            story, colon, name = shot.rpartition(":")
            if not (story and colon and name):
                raise ConfigError(
                    f"dispatch.rerender={shot!r} is not allowed; write STORY:SHOT, for example ocean:shot_03 or ocean:3"
                )
