"""What Weights & Biases accepts as names: checked before ranks start, and how names of ours are made to fit.

``check_names`` knows the limits; ``check_with_package`` asks the installed wandb as well, which knows those of its
version and of its environment variables. Does not import wandb before that.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from storymem_dist.errors import ConfigError
from storymem_dist.terminal.text import printable

NAME_LENGTH = 128
"""Most characters of the name of a project, an entity, a group or a run. W&B's server refuses longer ones."""

TAG_LENGTH = 64
KEY_LENGTH = 48
"""Most characters of a name of ours in a key: W&B makes an artifact's name of it, which may have 128."""

_NOT_IN_ADDRESSES = "/\\#?%:"
_SHOWN = 60


def check_names(
    *,
    project: object,
    entity: object,
    group: object,
    name: object,
    notes: object,
    tags: object,
) -> None:
    """Raise ``ConfigError`` with the setting, the limit and what was given unless W&B accepts these names."""
    _check_name("project", project, NAME_LENGTH, forbidden=_NOT_IN_ADDRESSES)
    if entity is not None:
        _check_name("entity", entity, NAME_LENGTH, forbidden=_NOT_IN_ADDRESSES)
    if group is not None:
        _check_name("group", group, NAME_LENGTH)
    if name is not None:
        _check_name("name", name, NAME_LENGTH)
    if notes is not None and (not isinstance(notes, str) or not _is_text(notes)):
        raise ConfigError(f"tracking.wandb.notes={_shown(notes)} is not allowed; it must be text in UTF-8")
    if not isinstance(tags, Sequence) or isinstance(tags, str):
        raise ConfigError(
            f"tracking.wandb.tags={_shown(tags)} is not allowed; it must be a list, such as [night,first]"
        )
    for tag in tags:
        _check_name("tags", tag, TAG_LENGTH)


def check_with_package(names: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``ConfigError`` where the installed wandb refuses a setting or one of its environment variables.

    ``names`` holds the settings of ``check_names``. Imports wandb's settings, which takes a second.
    """
    try:
        from wandb.sdk.wandb_settings import Settings
    except ImportError as error:
        raise ConfigError(
            f"wandb cannot be imported ({error}); install it again, or use tracking.wandb.mode=off"
        ) from error
    known = {"project": "project", "entity": "entity", "group": "run_group", "name": "run_name", "notes": "run_notes"}
    for setting, value in names.items():
        try:
            Settings(**{known.get(setting, f"run_{setting}"): value})
        except Exception as error:  # pydantic's and wandb's own errors
            raise ConfigError(
                f"tracking.wandb.{setting}={_shown(value)} is not accepted by the installed wandb: {_reason(error)}"
            ) from None
    for variable, text in environment.items():
        if variable.startswith("WANDB_"):
            try:
                Settings().update_from_env_vars({variable: text})
            except Exception as error:
                shown = "" if "KEY" in variable or "TOKEN" in variable else f"={_shown(text)}"
                raise ConfigError(
                    f"the environment variable {variable}{shown} is not accepted by the installed wandb: "
                    f"{_reason(error)}; change or unset it, or use tracking.wandb.mode=off"
                ) from None


def fitting(name: str, length: int = NAME_LENGTH) -> str:
    """Return ``name``, made by us and not by a user, in at most ``length`` characters that W&B accepts.

    A changed name ends in a hash, so that different names stay different.
    """
    clean = "".join(character if character.isprintable() else "-" for character in name).strip()
    return clean if clean == name and 0 < len(clean) <= length else f"{clean[: length - 9]}-{_hash(name)}"


def key_part(name: str) -> str:
    """Return ``name`` as a part of a key: of it W&B makes keys of series, and names of files and artifacts."""
    clean = re.sub(r"[^\w.-]", "-", name).lstrip(".")
    return clean if clean == name and 0 < len(clean.encode()) <= KEY_LENGTH else f"{_start(clean)}-{_hash(name)}"


def _start(text: str) -> str:
    return text.encode()[: KEY_LENGTH - 9].decode(errors="ignore")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]


def _check_name(setting: str, value: object, length: int, *, forbidden: str = "") -> None:
    one = "each tag" if setting == "tags" else "it"
    what = f"tracking.wandb.{setting}={_shown(value)}"
    if not isinstance(value, str):
        raise ConfigError(f"{what} is not allowed; {one} must be text (in quotes if it looks like a number)")
    rule = f"{one} must have 1 to {length} characters" + (f" without {' '.join(forbidden)}" if forbidden else "")
    if not 1 <= len(value) <= length:
        raise ConfigError(f"{what} is not allowed; {rule} (it has {len(value)})")
    if any(character in forbidden for character in value):
        raise ConfigError(f"{what} is not allowed; it must be a name without {' '.join(forbidden)}")
    if value != value.strip() or not value.isprintable() or not _is_text(value):
        raise ConfigError(f"{what} is not allowed; {rule}, in UTF-8, without control characters or blanks at its ends")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _reason(error: Exception) -> str:
    """The sentence in one of wandb's errors: pydantic puts it into the second line or after the field's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    text = lines[-1] if lines else type(error).__name__
    return printable(re.sub(r"\s*\[type=.*", "", text).removeprefix("Value error, "))[:300]
