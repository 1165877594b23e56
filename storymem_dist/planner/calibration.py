"""The constants behind predicted times: shares of peak rates that a device reaches, where they come from, how old.

Shipped constants (``constants.json``) take the shares of public kernel figures, times one factor for a device that is
fitted on one published time. ``calibrate`` measures this machine, and every render adds what it measured. What was
measured here comes before what was shipped.
"""

import json
import logging
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from storymem_dist.errors import ConfigError
from storymem_dist.files import canonical_json, read_json, write_bytes
from storymem_dist.planner.hardware import Hardware, known_device
from storymem_dist.weights.bundle import cache_folder

logger = logging.getLogger(__name__)

FITTED, MEASURED, GUESSED = "fitted", "measured", "guessed"

_SHIPPED = Path(__file__).parent / "constants.json"
_FORMAT = 1
_MAX_BYTES = 256 * 1024
_MOST_RENDERS = 64
_MOST_FACTOR = 20.0
_LOCK_SECONDS = 5.0
_RATES = ("linear", "linear_8bit", "attention", "vae", "text", "memory")
_LINKS = ("link", "network", "host_link", "read")


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Shares of the peak rates of a ``Hardware`` that each part of the work reaches.

    ``linear``, ``attention``, ``vae``, ``text``: of ``peak_tflops``. ``linear_8bit``: of the 8-bit peaks. ``memory``:
    of the device's bandwidth, for all else in a block. ``link``, ``network``, ``host_link``, ``read``: of those
    bandwidths. ``operator_us``: the host's time to start one operator. ``step_factor``: seconds of a step that renders
    here measured, over those that the rates predict (1: none has).

    ``how`` is ``FITTED`` (on a published time), ``MEASURED`` (here) or ``GUESSED`` (public kernel figures alone);
    ``source`` says which time, or what measured it; ``date`` is ISO 8601; ``num_renders`` counts those behind
    ``step_factor``.
    """

    device: str
    linear: float
    linear_8bit: float
    attention: float
    vae: float
    text: float
    memory: float
    link: float
    network: float
    host_link: float
    read: float
    operator_us: float
    how: str
    source: str
    date: str
    step_factor: float = 1.0
    num_renders: int = 0

    @property
    def age_days(self) -> int:
        """Days since ``date``."""
        return max(0, (date.today() - date.fromisoformat(self.date)).days)

    @property
    def without_renders(self) -> "Constants":
        """The same as if no render had measured anything: for the prediction that ``record_measured`` compares with."""
        return replace(self, step_factor=1.0, num_renders=0)

    def scaled(self, factor: float) -> "Constants":
        """The same with all shares of a device's own rates times ``factor``; links and the VAE stay."""
        names = ("linear", "linear_8bit", "attention", "memory")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    def __str__(self) -> str:
        how = {FITTED: "fitted on", MEASURED: "measured here:", GUESSED: "from"}[self.how]
        age = "today" if self.age_days == 0 else f"{self.age_days} day{'s' if self.age_days > 1 else ''} old"
        text = f"constants of {self.device}: {how} {self.source} ({self.date}, {age})"
        if self.num_renders:
            renders = "1 render" if self.num_renders == 1 else f"{self.num_renders} renders"
            text += f"; {renders} here took {self.step_factor:.2f} times as long"
        return text


def load_constants(hardware: Hardware, *, cache: Path | None = None) -> Constants:
    """Return the constants for the devices of ``hardware``: measured here, else shipped, else of a similar device.

    ``cache``: the folder of what was measured here (None: the user's). A damaged file there is ignored with a warning.
    """
    key = _key(hardware.device)
    found = load_shipped(hardware)
    kept = _kept(_file(key, cache))
    if kept.get("calibrated"):
        found = replace(found, **kept["calibrated"], device=hardware.device, how=MEASURED)
    renders = kept.get("renders", [])
    if renders:
        ratios = [math.log(one["measured_seconds"] / one["predicted_seconds"]) for one in renders]
        found = replace(found, step_factor=math.exp(statistics.median(ratios)), num_renders=len(renders))
    return found


def record_measured(
    hardware: Hardware,
    *,
    predicted_seconds: float,
    measured_seconds: float,
    num_steps: int,
    cache: Path | None = None,
) -> None:
    """Keep what a render measured: a step took ``measured_seconds``, the median of ``num_steps``.

    ``predicted_seconds`` is that of ``Constants.without_renders``. The last 64 renders count, and their median. Several
    processes may call this at once. A file that cannot be written, or seconds that are no positive numbers, are logged
    and otherwise ignored: a render must not fail for them.
    """
    ratio = measured_seconds / predicted_seconds if predicted_seconds > 0 else math.nan
    if not 1 / _MOST_FACTOR <= ratio <= _MOST_FACTOR or num_steps < 1:
        logger.info("a step of %s s where %s s were predicted is not kept", measured_seconds, predicted_seconds)
        return
    one = {
        "date": date.today().isoformat(),
        "measured_seconds": measured_seconds,
        "num_steps": num_steps,
        "predicted_seconds": predicted_seconds,
    }
    _change(hardware, cache, lambda kept: {**kept, "renders": [*kept.get("renders", []), one][-_MOST_RENDERS:]})


def keep_calibrated(hardware: Hardware, constants: Constants, *, cache: Path | None = None) -> bool:
    """Keep what ``planner.measuring.calibrate`` measured; what renders measured with other constants is dropped.

    Returns whether the file could be written.
    """
    values = {name: getattr(constants, name) for name in (*_RATES, *_LINKS, "operator_us", "source", "date")}
    return _change(hardware, cache, lambda kept: {"calibrated": values, "renders": []})


def load_shipped(hardware: Hardware, *, scaled: bool = True) -> Constants:
    """Return the shipped constants. Without ``scaled``: the shares of public kernel figures, before the fit."""
    return _shipped(_key(hardware.device), hardware.device, scaled=scaled)


@cache
def _shipped_file() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return found


def _shipped(key: str, device: str, *, scaled: bool = True) -> Constants:
    entries = _shipped_file()
    entry = entries.get(key) or entries["cpu" if device == "cpu" else "unknown"]
    values = {name: entry[name] for name in (*_RATES, *_LINKS, "operator_us", "how", "source", "date")}
    found = Constants(device=device, **values)
    return found.scaled(entry["scale"]) if scaled else found


def _key(device: str) -> str:
    """The entry of ``conf/hardware`` for a device's name, else a name for a file."""
    known = known_device(device)
    return known.name if known is not None else re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")[:80] or "device"


def _file(key: str, cache: Path | None) -> Path | None:
    try:
        return (cache or cache_folder()) / "planner" / f"{key}.json"
    except ConfigError:  # no home folder
        return None


def _kept(path: Path | None) -> dict[str, Any]:
    """What was measured here; empty if there is nothing that can be used."""
    if path is None or not path.exists():
        return {}
    try:
        found = read_json(path, _MAX_BYTES)
        return {"calibrated": _checked_rates(found), "renders": _checked_renders(found)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning(
            "%s is damaged and not used (%s); delete it, or measure again: storymem-plan calibrate", path, error
        )
        return {}


def _checked_rates(found: Mapping[str, Any]) -> dict[str, Any]:
    if found["format"] != _FORMAT:
        raise ValueError(f"format {found['format']!r}")
    calibrated = found["calibrated"]
    if not calibrated:
        return {}
    names = (*_RATES, *_LINKS, "operator_us")
    values: dict[str, Any] = {name: float(calibrated[name]) for name in names}
    if not all(0 < value < math.inf for value in values.values()):
        raise ValueError("a rate is no positive number")
    date.fromisoformat(calibrated["date"])
    return values | {"source": str(calibrated["source"])[:500], "date": str(calibrated["date"])}


def _checked_renders(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    renders: list[dict[str, Any]] = [
        {
            "date": date.fromisoformat(one["date"]).isoformat(),
            "measured_seconds": float(one["measured_seconds"]),
            "num_steps": int(one["num_steps"]),
            "predicted_seconds": float(one["predicted_seconds"]),
        }
        for one in found["renders"][-_MOST_RENDERS:]
    ]
    for one in renders:
        if not 1 / _MOST_FACTOR <= one["measured_seconds"] / one["predicted_seconds"] <= _MOST_FACTOR:
            raise ValueError("a render's seconds cannot be")
    return renders


def _change(hardware: Hardware, cache: Path | None, change: Any) -> bool:
    """Replace the file of what was measured here by ``change`` of it, one process at a time."""
    path = _file(_key(hardware.device), cache)
    if path is None:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            kept = _kept(path)
            changed = change({"calibrated": kept.get("calibrated") or {}, "renders": kept.get("renders", [])})
            write_bytes(path, canonical_json({"format": _FORMAT, **changed}), durable=False)
    except (OSError, Timeout, ValueError) as error:
        logger.info("times cannot be kept in %s: %s", path, error)
        return False
    return True
