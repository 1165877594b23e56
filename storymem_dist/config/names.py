"""The names of all settings and of the groups' entries, and which of ours somebody meant by another one."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_type_hints

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override

from storymem_dist.config.former_names import FORMER_NAMES
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError, shortened
from storymem_dist.resources import config_folder


@cache
def settings() -> Mapping[str, Any]:
    """The type of every setting and group, by its dotted name."""
    return dict(_names(RenderConfig))


def is_text(key: str) -> bool:
    """Whether the setting holds a text."""
    return settings().get(key) in (str, str | None)


@cache
def entries() -> Mapping[str, tuple[str, ...]]:
    """The entries of every group that has some; ``none`` and ``off`` included."""
    folders = [folder for folder in config_folder().iterdir() if folder.is_dir()]
    return {
        folder.name: tuple(
            sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        )
        for folder in folders
    }


def is_group(key: str) -> bool:
    """Whether ``KEY=NAME`` chooses an entry."""
    return key in entries()


def check_key(key: str, *, given: str) -> None:
    """Raise ``ConfigError`` with the settings that may be meant unless ``key`` is the name of a setting or group."""
    if key in settings() or is_group(key):
        return
    meant = close_to(key)
    raise ConfigError(
        f"{given}: {shortened(key)!r} is not a setting; "
        + (f"did you mean {' or '.join(meant)}?" if meant else "storymem-render --help lists all of them")
    )


def check_entry(group: str, parsed: Override | None, value: str) -> None:
    """Raise ``ConfigError`` unless every name that ``group=value`` gives is an entry of the group."""
    allowed = entries()[group]
    for name in _chosen(group, parsed, value):
        if name in allowed or f"{group}/{name}" in FORMER_NAMES or "${" in name:
            continue
        keys = [f"{group}.{one}" for one in _subkeys(group)]
        near = difflib.get_close_matches(name, allowed, n=1)
        raise ConfigError(
            f"{group}={shortened(value)}: {shortened(name)!r} is not an entry of {group}; use one of: "
            f"{', '.join(allowed)}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + (f", or set its keys: {', '.join(keys[:4])}, ..." if keys else "")
        )


def _chosen(group: str, parsed: Override | None, value: str) -> list[str]:
    """The names in ``group=value``; none for a glob, and for an experiment that is null."""
    if parsed is None:
        return [value]
    read = parsed.value()
    if isinstance(read, Glob) or (read is None and group == "experiment"):
        return []
    if isinstance(read, ChoiceSweep):
        return list(map(str, parsed.sweep_string_iterator()))
    if isinstance(read, list) and group == "experiment":
        return list(map(str, read))
    return [read if isinstance(read, str) else value]


def close_to(key: str, most: int = 3) -> list[str]:
    """The settings that ``key`` may stand for: the same last word or one close to it, best first."""
    group, _, last = key[:80].lower().replace("-", "_").rpartition(".")

    def likeness(name: str) -> float:
        own_group, _, own_last = name.rpartition(".")
        words = [_ratio(last, word) * 0.85 for word in own_last.split("_") if len(last) > 2]
        return max(_ratio(last, own_last), *words, 0.0) + (0.1 if own_group == group else 0.0)

    found = {name: likeness(name) for name in settings()}
    best = max(found.values())
    close = [name for name in found if found[name] >= max(0.75, best - 0.1)]
    return sorted(close, key=lambda name: -found[name])[:most]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _names(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind).items():
        yield f"{prefix}{name}", hint
        if is_dataclass(hint):
            yield from _names(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _subkeys(group: str) -> list[str]:
    return [name.removeprefix(f"{group}.") for name in settings() if name.startswith(f"{group}.")]
