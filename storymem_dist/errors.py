"""Errors a user can act on, and small validators for settings.

A ``StoryMemError`` carries one complete message: what was given, what is allowed, where. The command line prints that
message alone (no stack trace) and exits with ``exit_code``. Anything else that escapes is a bug and keeps its trace.
Every subclass can be pickled with its message, so it can be broadcast between ranks. Imports nothing of this package.
"""

from collections.abc import Collection


class StoryMemError(Exception):
    """Base of every error that a user's input or machine can cause."""

    exit_code = 1


class ConfigError(StoryMemError):
    """A setting is unknown, has the wrong type, or contradicts another one."""

    exit_code = 2


class StoryboardError(StoryMemError):
    """A storyboard cannot be read; the message names file, scene, shot and what is allowed."""

    exit_code = 3


class WeightsNotFound(StoryMemError):
    """Weights are missing where the settings point; the message names the download and its command."""

    exit_code = 4


class CheckpointError(StoryMemError):
    """Weights exist but cannot be used: truncated, of another model, or with missing or unexpected keys."""

    exit_code = 4


class LayoutError(StoryMemError):
    """A parallel layout cannot be built on these ranks; the message names the wrong number and one that works."""

    exit_code = 2


class RunFolderError(StoryMemError):
    """The output folder is not a run folder, is held by another job, or its contents contradict the settings."""

    exit_code = 5


class MachineError(StoryMemError):
    """The machine failed, not the job: a full or broken disk, a lost permission. The same command continues.

    No shot is marked as failed for it. ``hardware.machine_fault`` recognises these errors.
    """

    exit_code = 5


class ShotError(StoryMemError):
    """One shot cannot be rendered; the job continues without it and without the shots that depend on it."""

    exit_code = 6


class CollectiveFailed(StoryMemError):
    """A collective failed because a rank of the replica hung or died. Not a user's mistake; a restart may help."""


class ExtraNotInstalled(StoryMemError):
    """A setting needs an optional package; the message names the extra and the command."""

    exit_code = 2


def require_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``allowed``. ``name`` is the setting's dotted path."""
    if value not in allowed:
        raise ConfigError(f"{name}={shown(value)} is not allowed; use one of: {', '.join(map(str, allowed))}")


def require_between(name: str, value: float, minimum: float, maximum: float) -> None:
    """Raise ``ConfigError`` unless ``value`` is a number and ``minimum <= value <= maximum`` (NaN is refused)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={shown(value)} is not allowed; it must be a number")
    if not minimum <= value <= maximum:
        raise ConfigError(f"{name}={shown(value)} is not allowed; it must be between {minimum} and {maximum}")


def require_whole(name: str, value: object, minimum: int, maximum: int) -> None:
    """The same for a whole number: ``5.0`` is none."""
    require_between(name, value, minimum, maximum)  # type: ignore[arg-type]
    if not isinstance(value, int):
        raise ConfigError(f"{name}={shown(value)} is not allowed; it must be a whole number")


def shown(value: object, most: int = 200) -> str:
    """Return ``repr(value)`` as it fits into a message; Python writes no integer of more than 4,300 digits."""
    try:
        return shortened(repr(value), most)
    except ValueError:
        return f"(a {type(value).__name__} of thousands of digits)"


def shortened(text: object, most: int = 200) -> str:
    """Return ``str(text)`` as it fits into a message: its beginning and its length if it is longer than ``most``."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}... ({len(whole):,} characters)"
