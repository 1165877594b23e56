"""The command line's configuration: every group's settings composed into one typed schema.

The settings themselves live beside the code they set. Hydra and omegaconf appear only here, in ``cli`` and in
``build``: everything below receives plain dataclasses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.errors import ConfigError, StoryMemError, require_at_least, require_one_of
from storymem_dist.launch.settings import LaunchSettings
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.settings import ModelSettings
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.parallel.settings import ParallelSettings

SWEEPS = ("joined", "separate")


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
        """The given paths as a list; an absent one is the user's mistake, told with an example."""
        given = self.path if isinstance(self.path, list | tuple) else [self.path]
        if not all(isinstance(path, str | Path) and str(path) for path in given) or not given:
            raise ConfigError(
                f"stories={self.path!r}: give a storyboard file, a folder or a glob, "
                "for example stories=examples or stories=my_stories/*.json"
            )
        return [str(path) for path in given]


@dataclass(kw_only=True, slots=True)
class DebugSettings:
    """The ``debug`` group: aids for finding faults. None of them changes pixels, except ``deterministic`` on GPUs."""

    deterministic: bool = False
    verify_records: bool = False
    log_level: str = "warning"


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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One configuration to render into one run folder: a job has one, a joined sweep several.

    ``plain`` is the same as ``settings``, as nested plain values. ``name`` is the point's name in its sweep.
    """

    settings: RenderConfig
    plain: Mapping[str, Any]
    name: str = ""


def assets_folder(name: str) -> Path:
    """``conf``, ``launch`` or ``slurm``: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "assets" / name
    return installed if installed.is_dir() else package.parent / name


def config_folder() -> Path:
    """The folder ``conf/``."""
    return assets_folder("conf")


def register_schema() -> None:
    """Make known to Hydra what ``conf/render.yaml`` names: the schema, and the launcher of multiruns."""
    ConfigStore.instance().store(name="render_schema", node=RenderConfig)
    launcher = {"_target_": "hydra_plugins.storymem_launcher.SweepLauncher"}
    ConfigStore.instance().store(group="hydra/launcher", name="storymem", node=launcher, provider="storymem_dist")
    OmegaConf.register_new_resolver(
        "storymem_examples", lambda: str(config_folder() / "stories" / "examples"), replace=True
    )


def to_settings(config: DictConfig | ListConfig) -> RenderConfig:
    """Convert a composed configuration to plain dataclasses; every group validates itself on the way.

    Raises:
        ConfigError: a value is missing, ill-typed or not allowed; the message names its key.
    """
    try:
        settings = OmegaConf.to_object(config)
    except StoryMemError:
        raise
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, StoryMemError):
            raise cause from None
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None
    if not isinstance(settings, RenderConfig):
        raise ConfigError(f"the composed configuration is a {type(settings).__name__}, not a RenderConfig")
    return settings


def to_plain(config: DictConfig | ListConfig | RenderConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for records and tracking."""
    container = config if isinstance(config, DictConfig | ListConfig) else OmegaConf.structured(config)
    plain = OmegaConf.to_container(container, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def points_to_plain(points: Sequence[Point], sweep: str | None) -> dict[str, Any]:
    """Points, and the name of their sweep, as plain values that another process can take."""
    return {"sweep": sweep, "points": [{"name": point.name, "config": point.plain} for point in points]}


def points_from_plain(plain: Mapping[str, Any]) -> tuple[list[Point], str | None]:
    """The inverse of ``points_to_plain``; every group validates itself again."""
    schema = OmegaConf.structured(RenderConfig)
    points = [
        Point(settings=to_settings(OmegaConf.merge(schema, one["config"])), plain=one["config"], name=one["name"])
        for one in plain["points"]
    ]
    return points, plain["sweep"]
