"""What a step of the GPU check is: its place in the list, its sizes, and helpers that all steps share."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import TINY, WAN22_A14B

Row = dict[str, Any]
"""Measured values by the name of their column: numbers, texts or booleans."""

Grid = tuple[int, int, int]
"""Latent frames (memory included), latent height and width."""


class SkippedError(Exception):
    """This machine cannot run a step; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes of the steps."""

    config: DiTConfig
    dtype: torch.dtype
    attention_tokens: tuple[int, ...]
    ulysses: int
    linear_rows: tuple[int, ...]
    blocks: dict[str, Grid]
    compiled: tuple[Grid, ...]
    compiled_formats: tuple[str, ...]
    model: Grid
    stream: Grid
    kept_blocks: int
    offload_blocks: int
    vae_base_dim: int
    decodes: dict[str, Grid]
    encodes: dict[str, Grid]
    selftest_block_dim: int


FULL = Sizes(
    config=WAN22_A14B.i2v,
    dtype=torch.bfloat16,
    attention_tokens=(32_760, 48_360, 111_600),
    ulysses=8,
    linear_rows=(48_360, 32_761, 512),
    blocks={"832x480, K=10": (31, 60, 104), "1280x720, K=10": (31, 90, 160)},
    compiled=((21, 60, 104), (24, 60, 104), (31, 60, 104)),
    compiled_formats=("exact", "float8"),
    model=(31, 60, 104),
    stream=(21, 60, 104),
    kept_blocks=20,
    offload_blocks=10,
    vae_base_dim=WAN22_A14B.vae.base_dim,
    decodes={"832x480": (21, 60, 104), "1280x720": (21, 90, 160)},
    encodes={"832x480": (21, 60, 104)},
    selftest_block_dim=WAN22_A14B.t2v.dim,
)
"""A14B on one H100."""

DRY = Sizes(
    config=TINY.i2v,
    dtype=torch.bfloat16,
    attention_tokens=(70, 130),
    ulysses=2,
    linear_rows=(65, 17),
    blocks={"small": (3, 8, 8)},
    compiled=((2, 8, 8), (3, 8, 8)),
    compiled_formats=("exact",),
    model=(3, 8, 8),
    stream=(2, 8, 8),
    kept_blocks=1,
    offload_blocks=4,
    vae_base_dim=TINY.vae.base_dim,
    decodes={"small": (2, 4, 6)},
    encodes={"small": (2, 4, 6)},
    selftest_block_dim=WAN22_A14B.t2v.head_dim,
)
"""The same steps on a CPU, in about a minute."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where steps run: a device, their sizes, and the time (of ``time.monotonic``) at which all must have ended."""

    device: torch.device
    sizes: Sizes
    ends_at: float

    def seconds_left(self) -> float:
        """Seconds until all steps must have ended."""
        return max(0.0, self.ends_at - time.monotonic())


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: ``run`` yields a row for each thing that it measured. ``seconds`` is what it takes on one H100."""

    number: int
    name: str
    shows: str
    seconds: int
    run: Callable[[Bench], Iterator[Row]]


def attempt(row: Row, measure: Callable[..., Row], *args: Any) -> Row:
    """``row`` with what ``measure(*args)`` found; where that raises, with its error: one kernel ends no step."""
    try:
        return row | measure(*args)
    except SkippedError as reason:
        return row | {"skipped": str(reason)}
    except Exception as error:
        return row | {"error": in_one_line(error)}


def in_one_line(error: BaseException) -> str:
    """An error as text for a cell of a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def require_package(*names: str) -> None:
    """Raise ``SkippedError`` for packages that are not installed."""
    missing = [name for name in names if not has_package(name)]
    if missing:
        raise SkippedError(f"not installed: {', '.join(missing)}")


def has_package(name: str) -> bool:
    """Whether the package can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def wait(device: torch.device) -> None:
    """Wait until the device has done everything that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_tokens(grid: Grid) -> int:
    """Tokens of a forward over latents of this size."""
    frames, height, width = grid
    return frames * (height // 2) * (width // 2)
