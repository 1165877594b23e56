"""Formats numbers for people: durations, rates, sizes. None, NaN and infinity become a dash. Knows nothing of runs."""

import math
from typing import TypeGuard

DASH = "–"


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``12.3 s``, ``4:05`` (minutes), ``1:02:03`` (hours), ``2 d 03:04`` (days)."""
    if not _is_number(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    if days:
        return f"{days} d {hours_of_day:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def clock(seconds: float) -> str:
    """Elapsed time in whole seconds: ``0:07``, ``4:05``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    return duration(float(int(seconds))) if minutes else f"0:{rest:02d}"


def step_time(seconds: float | None) -> str:
    """Seconds per step, ``1.53 s/it``; quick steps as ``45 ms/it``."""
    if not _is_number(seconds):
        return DASH
    return f"{seconds:.2f} s/it" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms/it"


def gib(value: float | None) -> str:
    """``28.1 GiB``."""
    return f"{value:.1f} GiB" if _is_number(value) else DASH


def byte_count(value: float | None) -> str:
    """Decimal units, as disks and networks are sold: ``57.2 GB``, ``3.1 MB``."""
    if not _is_number(value):
        return DASH
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def byte_rate(num_bytes: float, seconds: float) -> str:
    """``1.9 GB/s``."""
    return f"{byte_count(num_bytes / seconds)}/s" if seconds > 0 else DASH


def number(value: float | None, digits: int = 1) -> str:
    """A plain number with thousands separators."""
    return f"{value:,.{digits}f}" if _is_number(value) else DASH


def percent(ratio: float | None) -> str:
    """``41.0 %``."""
    return f"{100 * ratio:.1f} %" if _is_number(ratio) else DASH


def count(value: int, one: str, many: str | None = None) -> str:
    """``1 shot``, ``7 shots``."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
