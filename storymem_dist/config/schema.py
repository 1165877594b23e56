"""The settings of a whole job as one typed schema: a field per configuration group.

A group's settings are defined next to the code that they set; here are those of no single part. Plain dataclasses:
``composing`` fills them from a command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.config.launch import LaunchSettings
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.errors import ConfigError, require_at_least, require_one_of
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.settings import ModelSettings

SWEEPS = ("joined", "separate")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(kw_only=True, slots=True)
class StoriesSettings:
    """The ``stories`` group: which storyboards, and how many of them.

    ``path`` is a file, a folder, a glob, or a list of those. ``max_stories`` and ``max_shots`` (per story) cut a batch
    short, for a quick look.
    """

    path: Any = None
    max_stories: int | None = None
    max_shots: int | None = None

    def __post_init__(self) -> None:
        for key in ("max_stories", "max_shots"):
            value = getattr(self, key)
            if value is not None:
                require_at_least(f"stories.{key}", value, 1)

    def paths(self) -> list[str]:
        """The given paths as a list. Raises ``ConfigError`` with an example when there is none."""
        given = self.path if isinstance(self.path, list | tuple) else [self.path]
        if not all(isinstance(path, str | Path) and str(path) for path in given) or not given:
            raise ConfigError(
                f"stories={self.path!r}: give a storyboard file, a folder or a glob, "
                "for example stories=examples or stories=my_stories/*.json"
            )
        return [str(path) for path in given]


@dataclass(kw_only=True, slots=True)
class DebugSettings:
    """The ``debug`` group: aids for finding faults. None of them changes pixels, except ``deterministic`` on GPUs.

    ``deterministic`` makes torch choose kernels that give the same bits at every run and warn where it has none.
    ``verify_records`` compares the files of finished shots with the hashes in their records. ``log_level``: which log
    lines the ranks write to standard error; ``debug`` shows every event of every rank.
    """

    deterministic: bool = False
    verify_records: bool = False
    log_level: str = "warning"

    def __post_init__(self) -> None:
        self.log_level = self.log_level.lower()
        require_one_of("debug.log_level", self.log_level, LOG_LEVELS)


@dataclass(kw_only=True, slots=True)
class RenderConfig:
    """Everything a render job needs. One field per config group, plus the run folder.

    ``sweep`` says how the points of a multirun are rendered: ``joined`` as one job wherever they share weights, so that
    these are loaded once, or ``separate``, one point after the other.
    """

    output: str = "runs/render"
    sweep: str = "joined"
    model: ModelSettings = field(default_factory=ModelSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    stories: StoriesSettings = field(default_factory=StoriesSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)
    video: VideoSettings = field(default_factory=VideoSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    debug: DebugSettings = field(default_factory=DebugSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)

    def __post_init__(self) -> None:
        require_one_of("sweep", self.sweep, SWEEPS)
