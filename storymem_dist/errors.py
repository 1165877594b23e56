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
        raise ConfigError(f"{name}={value!r} is not allowed; use one of: {', '.join(map(str, allowed))}")


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Raise ``ConfigError`` unless ``value >= minimum`` (NaN is refused)."""
    if not value >= minimum:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be at least {minimum}")
