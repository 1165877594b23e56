"""Settings of everything that observes a render: the ``tracking`` group.

None of them changes a pixel. Knows only the plain values; ``observe/start.py`` turns them into observers.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from storymem_dist.errors import ConfigError, require_between, require_one_of, shown
from storymem_dist.files import expand_home
from storymem_dist.observe.wandb.limits import check_names

CONSOLE_MODES = ("auto", "live", "plain", "off")
CONSOLE_LEVELS = ("quiet", "normal", "verbose")
WANDB_MODES = ("auto", "online", "offline", "off")
TEXTFILE_SUFFIX = ".prom"
_WEEK = 7 * 24 * 3600.0


@dataclass(kw_only=True, slots=True)
class ConsoleSettings:
    """What the terminal or the log shows.

    ``mode``: ``live`` is a view that redraws itself, ``plain`` writes lines, ``off`` shows nothing; ``auto`` is live on
    a terminal and plain elsewhere. ``level``: ``quiet`` shows shots, failures and warnings, ``normal`` also steps and
    loading, ``verbose`` also every stage and memory decision. In plain mode a replica writes a progress line
    when it has written nothing for ``line_interval_seconds``.
    """

    mode: str = "auto"
    level: str = "normal"
    line_interval_seconds: float = 30.0

    def __post_init__(self) -> None:
        require_one_of("tracking.console.mode", self.mode, CONSOLE_MODES)
        require_one_of("tracking.console.level", self.level, CONSOLE_LEVELS)
        require_between("tracking.console.line_interval_seconds", self.line_interval_seconds, 0.0, _WEEK)


@dataclass(kw_only=True, slots=True)
class WandbSettings:
    """What goes to Weights & Biases. One run folder has one W&B run, across restarts and joined jobs.

    ``mode``: ``auto`` is online if an API key is found (``WANDB_API_KEY`` or ``wandb login``), else offline; the
    environment variable ``WANDB_MODE`` takes precedence. ``name`` defaults to the run folder's name, ``group`` to
    the sweep's (if any). ``num_shot_videos`` and ``num_story_videos`` limit how many videos are uploaded (-1: all) and
    ``max_video_mib`` how large one may be. ``num_memory_images`` limits the thumbnails of the ``memory_frames`` table
    (its rows are complete, up to W&B's 200,000), ``thumbnail_height`` is their height in pixels.
    ``init_timeout_seconds`` is how long to try to reach the service before the run is kept offline, and
    ``finish_timeout_seconds`` how long the end of a job may wait for uploads; what is not uploaded by then stays on
    disk for ``wandb sync``.
    """

    mode: str = "auto"
    project: str = "storymem"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    num_shot_videos: int = 100
    num_story_videos: int = 100
    max_video_mib: float = 64.0
    num_memory_images: int = 2000
    thumbnail_height: int = 96
    poll_interval_seconds: float = 1.0
    init_timeout_seconds: float = 30.0
    finish_timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_one_of("tracking.wandb.mode", self.mode, WANDB_MODES)
        check_names(**self.names())
        for key in ("num_shot_videos", "num_story_videos", "num_memory_images"):
            require_between(f"tracking.wandb.{key}", getattr(self, key), -1, 1_000_000)
        require_between("tracking.wandb.max_video_mib", self.max_video_mib, 0.0, 1_000_000.0)
        require_between("tracking.wandb.thumbnail_height", self.thumbnail_height, 16, 4096)
        require_between("tracking.wandb.poll_interval_seconds", self.poll_interval_seconds, 0.05, 3600.0)
        require_between("tracking.wandb.init_timeout_seconds", self.init_timeout_seconds, 0.1, _WEEK)
        require_between("tracking.wandb.finish_timeout_seconds", self.finish_timeout_seconds, 0.0, _WEEK)

    def names(self) -> dict[str, Any]:
        """The settings that W&B has limits for, by key."""
        return {key: getattr(self, key) for key in ("project", "entity", "group", "name", "notes", "tags")}


@dataclass(kw_only=True, slots=True)
class PrometheusSettings:
    """What node_exporter's textfile collector reads. ``textfile``: a file ``NAME.prom`` in its folder; null: none.

    The first replica writes it, others ``NAME.replica1.prom`` and so on; of a joined sweep, each point
    ``NAME.point0.prom`` and so on. Jobs that run on one machine need a name each.
    """

    textfile: str | None = None

    def __post_init__(self) -> None:
        if self.textfile is None:
            return
        name = self.textfile.rpartition("/")[2]
        if not name.endswith(TEXTFILE_SUFFIX) or name == TEXTFILE_SUFFIX or "\0" in self.textfile:
            raise ConfigError(
                f"tracking.prometheus.textfile={shown(self.textfile)} is not allowed; give a file whose name ends in"
                f" {TEXTFILE_SUFFIX}: node_exporter reads no other"
            )
        self.textfile = expand_home(self.textfile, "tracking.prometheus.textfile")

    def of_part(self, number: int) -> "PrometheusSettings":
        """The settings of one point of a joined sweep: ``NAME.point2.prom``."""
        if self.textfile is None:
            return self
        return replace(self, textfile=f"{self.textfile.removesuffix(TEXTFILE_SUFFIX)}.point{number}{TEXTFILE_SUFFIX}")


@dataclass(kw_only=True, slots=True)
class TrackingSettings:
    """The ``tracking`` group.

    ``report`` writes ``report.html`` into the run folder when the job ends. Every rank samples its memory and
    device every ``system_interval_seconds`` (0: never). Event files are always written.
    """

    console: ConsoleSettings = field(default_factory=ConsoleSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    prometheus: PrometheusSettings = field(default_factory=PrometheusSettings)
    report: bool = True
    system_interval_seconds: float = 15.0

    def __post_init__(self) -> None:
        require_between("tracking.system_interval_seconds", self.system_interval_seconds, 0.0, _WEEK)
