"""The settings of a whole job as one typed schema: a field per configuration group.

A group's settings are defined next to the code that they set; here are those of no single part. Plain dataclasses:
``composing`` fills them from a command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.config.launch import LaunchSettings
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.errors import ConfigError, require_between, require_one_of, shortened
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.files import expand_home
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.settings import TrackingSettings
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.hardware import HardwareSettings
from storymem_dist.weights.settings import ModelSettings

SWEEPS = ("joined", "separate")
LONG_PROMPTS = ("warn", "refuse")
LOG_LEVELS = ("debug", "info", "warning", "error")

PATHS = (
    "output",
    "model.t2v_checkpoint",
    "model.i2v_checkpoint",
    "model.t2v_high_noise",
    "model.t2v_low_noise",
    "model.i2v_high_noise",
    "model.i2v_low_noise",
    "model.vae",
    "model.text_encoder",
    "model.tokenizer",
    "model.storymem_lora",
    "model.packed",
    "memory.clip_model",
    "memory.hpsv3_checkpoint",
    "parallel.zero3_nvme_path",
    "launch.slurm.template",
    "launch.kubernetes.template",
    "evaluation.viclip",
    "evaluation.clip_l",
    "evaluation.aesthetic",
)
"""The settings that are paths: ``~`` in them is the home folder, and the command line takes them as they are typed."""

LISTS_OF_PATHS = ("stories.path", "stories.references", "model.loras")
"""The same for settings that are a path or a list of paths (or, for LoRAs, of mappings)."""

_MAX_PATH_BYTES = 4095  # what Linux opens
_MAX_TEXT = 100_000
_MAX_COUNT = 1_000_000  # a story file or folder holds fewer


@dataclass(kw_only=True, slots=True)
class StoriesSettings:
    """The ``stories`` group: which storyboards, and how many of them.

    ``path`` is a file (a storyboard, a list of storyboards, prompts), a folder, a glob, or a list of those.
    ``max_stories`` (the first ones, of the lowest ``priority``) and ``max_shots`` (per story) cut a batch short, for a
    quick look. ``long_prompts``: whether a prompt that the text encoder cuts is a warning, or refuses its story.
    ``references``: pictures that are in the memory of every story before its own reference images (MR2V).
    """

    path: Any = None
    max_stories: int | None = None
    max_shots: int | None = None
    long_prompts: str = "warn"
    references: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_one_of("stories.long_prompts", self.long_prompts, LONG_PROMPTS)
        for key in ("max_stories", "max_shots"):
            value = getattr(self, key)
            if value is not None:
                require_between(f"stories.{key}", value, 1, _MAX_COUNT)

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
    ``verify_checksums`` compares all bytes of finished shots and story videos with their hashes (a sample of each is
    always compared). ``log_level``: which log lines the ranks write to standard error; ``debug`` shows every event of
    every rank.
    """

    deterministic: bool = False
    verify_checksums: bool = False
    log_level: str = "warning"

    def __post_init__(self) -> None:
        self.log_level = self.log_level.lower()
        require_one_of("debug.log_level", self.log_level, LOG_LEVELS)


@dataclass(kw_only=True, slots=True)
class RenderConfig:
    """Everything a render job needs. One field per config group, plus the run folder.

    ``sweep`` says how the points of a multirun are rendered: ``joined`` as one job wherever they share weights, so that
    these are loaded once, or ``separate``, one point after the other. ``hardware`` is what a plan is made for where it
    is not made on the started ranks themselves (``storymem-plan``, ``launch.dry_run=true``); a render does not read it.
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
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)

    def __post_init__(self) -> None:
        require_one_of("sweep", self.sweep, SWEEPS)
        if not self.output.strip():
            raise ConfigError("output is empty; give a folder, such as output=runs/render")
        for name, text in _texts(self):
            _check_text(name, text, is_path=name in PATHS or name.startswith(LISTS_OF_PATHS))
        self._expand_home()

    def _expand_home(self) -> None:
        for name in PATHS:
            owner, _, key = name.rpartition(".")
            group = attrgetter(owner)(self) if owner else self
            if isinstance(given := getattr(group, key), str):
                setattr(group, key, expand_home(given, name))
        given = self.stories.path
        if isinstance(given, str):
            self.stories.path = expand_home(given, "stories.path")
        elif isinstance(given, list | tuple):
            self.stories.path = [expand_home(one, "stories.path") if isinstance(one, str) else one for one in given]
        self.stories.references = [expand_home(path, "stories.references") for path in self.stories.references]
        for lora in self.model.loras:
            lora.path = expand_home(lora.path, "model.loras")


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts in ``value`` with the dotted names of their settings."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, name)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _texts(getattr(value, one.name), f"{name}.{one.name}" if name else one.name)


def _check_text(name: str, text: str, *, is_path: bool) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name}={shortened(text)}: this is not UTF-8; records keep names as UTF-8, so use such a name, or rename"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{name}={shortened(text)} is not allowed; it must not hold a null character")
    if (is_path and num_bytes > _MAX_PATH_BYTES) or len(text) > _MAX_TEXT:
        most = f"{_MAX_PATH_BYTES:,} bytes" if is_path else f"{_MAX_TEXT:,} characters"
        raise ConfigError(f"{name}={shortened(text)} is not allowed; it may have at most {most}")
