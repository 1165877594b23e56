"""Whether the scorer of keyframes that a configuration asks for can be used. Loads no weights."""

import contextlib
from collections.abc import Iterator

from storymem_dist.config.schema import RenderConfig
from storymem_dist.doctor.finding import Finding, ok, problem
from storymem_dist.errors import ExtraNotInstalled, StoryMemError, WeightsNotFound
from storymem_dist.hardware import GIB
from storymem_dist.parallel.weight_memory import BETWEEN_SHOTS, ON_CPU, ON_DEVICE

_PLACES = {
    ON_DEVICE: "on the device",
    BETWEEN_SHOTS: "on the host, and on the device between shots",
    ON_CPU: "on the host, scoring on the CPU",
}


def check_scorer(settings: RenderConfig) -> Iterator[Finding]:
    """Whether HPSv3 and its instruction are there, if ``memory.quality`` asks for it."""
    try:
        num_bytes = _scorer_bytes(settings)
    except StoryMemError as error:
        value = "missing" if isinstance(error, WeightsNotFound | ExtraNotInstalled) else "cannot be used"
        yield problem("weights", "hpsv3", value, str(error))
    else:
        if num_bytes:
            yield ok("weights", "hpsv3", f"{num_bytes / GIB:.1f} GiB for the leader of each replica")


def scorer_bytes_if_known(settings: RenderConfig) -> int:
    """Return the bytes of HPSv3's weights; 0 where it is not asked for, or ``check_scorer`` has a problem with it."""
    with contextlib.suppress(StoryMemError):
        return _scorer_bytes(settings)
    return 0


def scorer_words(num_bytes: int, place: str) -> str:
    """Return where a leader keeps a scorer of ``num_bytes``; empty where there is none."""
    return f", and {num_bytes / GIB:.1f} GiB for HPSv3 of each leader ({_PLACES[place]})" if num_bytes else ""


def _scorer_bytes(settings: RenderConfig) -> int:
    if settings.memory.quality != "hpsv3":
        return 0
    from storymem_dist.weights.hpsv3 import open_hpsv3

    return open_hpsv3(settings.memory.hpsv3_checkpoint).num_bytes()
