"""The command line before Hydra reads it: bounded, with paths as people type them, and every mistake in our words.

``prepare`` checks arguments of ``storymem-render`` and rewrites those that Hydra would not understand; ``as_error``
turns what Hydra raises afterwards into a ``ConfigError``. Every program that takes overrides uses both.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from storymem_dist.config.former_names import with_present_keys
from storymem_dist.config.names import check_entry, check_key, is_group, is_text, settings
from storymem_dist.config.schema import LISTS_OF_PATHS, PATHS
from storymem_dist.errors import ConfigError, StoryMemError, shortened
from storymem_dist.resources import config_folder

COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OverflowError, RecursionError)
"""What Hydra and OmegaConf raise for settings that somebody got wrong."""

_MAX_ARGUMENT = 32_768
"""Longest argument in characters. Hydra's parser needs about 0.1 ms for each."""
_MAX_SIGNS = 4_000
"""Most characters that are no letters or digits in a value that Hydra parses: about 1 ms for each."""
_MAX_DEPTH = 32
_LORAS = "model.loras"
_LORA_EXAMPLE = "'model.loras=[{path: FILE, strength: 0.5}]'"
_OWN_CONFIGURATION = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "hydra.searchpath")
_OPTIONS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
_BEFORE_A_VALUE = (*_OWN_CONFIGURATION, "--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun")
_COMPLETION = ("--shell-completion", "-sc")  # Hydra reads install=bash and query=bash after it
_KEY = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=@]*)(?P<package>@[^=]*)?")
_PARSING = (HydraException, ValueError, RecursionError)  # ValueError: a number of more than 4,300 digits


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether a command line asks Hydra for a sweep."""
    return any(
        one in ("-m", "hydra.mode=MULTIRUN") or (len(one) > 3 and "--multirun".startswith(one)) for one in arguments
    )


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra shall read them; what is no ``KEY=VALUE`` stays.

    ``stories=PATH`` becomes ``stories.path=PATH``. The value of a setting that is a path is taken as it is typed
    (Hydra would give commas, brackets, blanks and more a meaning), unless it is quoted, ``null`` or holds ``${``; in a
    multirun a value that Hydra can read stays, since it may list several. The same for any other text if Hydra
    cannot read it.

    Raises:
        ConfigError: an argument is too long, not UTF-8, names no setting or entry, or cannot be read.
    """
    if set(arguments) & set(_COMPLETION):
        return list(arguments)
    arguments = with_present_keys(arguments)
    is_sweep = is_multirun(arguments)
    knows_all = not any(argument.partition("=")[0].lstrip("+") in _OWN_CONFIGURATION for argument in arguments)
    prepared = []
    for number, argument in enumerate(arguments):
        _check_text(argument)
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            if not name.strip("-") or not any(option.startswith(name) for option in _OPTIONS):
                raise ConfigError(f"{shortened(argument)}: there is no such option; --help lists all of them")
            prepared.append(argument)
        elif number and arguments[number - 1] in _BEFORE_A_VALUE:
            prepared.append(argument)
        else:
            prepared.append(_prepared(argument, is_sweep=is_sweep, knows_all=knows_all))
    return prepared


def as_error(error: Exception, arguments: Sequence[str] = ()) -> StoryMemError:
    """Return an error of Hydra or OmegaConf as one of ours: one sentence, without advice about Hydra's syntax."""
    if isinstance(error, StoryMemError):
        return error
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, StoryMemError):
        return cause
    if isinstance(error, RecursionError) or isinstance(cause, RecursionError):
        return ConfigError("the settings refer to each other in a circle, or are nested too deeply")
    source = cause if isinstance(cause, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(source).splitlines() if line.strip()] or [type(source).__name__]
    key = getattr(source, "full_key", None) or getattr(error, "full_key", None)
    what = lines[0].removeprefix("In 'render': ")
    if key and not what.startswith(str(key)):
        what = f"{key}: {what}"
    if isinstance(source, OmegaConfBaseException) or "\n" not in str(source):
        given = next((one for one in arguments if key and (found := _KEY.match(one)) and found["key"] == key), None)
        return ConfigError(shortened(what, 1000) + (f" (given: {shortened(given)})" if given else ""))
    return ConfigError(shortened(what, 1000))


def point_stories_at_paths(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``stories=VALUE`` to ``stories.path=VALUE`` unless ``VALUE`` names a file of the ``stories`` group.

    Hydra would look for a configuration named VALUE, but people mean their storyboard file, folder or glob.
    """
    options = {path.stem for path in (config_folder() / "stories").glob("*.yaml")}
    rewritten = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "stories" and equals and not set(value.split(",")) <= options:
            rewritten.append(f"stories.path={_literal(value, key='stories.path', is_sweep=True)}")
        else:
            rewritten.append(argument)
    return rewritten


def quoted(text: str, *, refers: bool = False) -> str:
    """Return ``text`` in the quotes of Hydra's grammar, to be read as it is, but for ``${KEY}`` in it if ``refers``."""
    text = text if refers else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def _check_text(argument: str) -> None:
    if len(argument) > _MAX_ARGUMENT:
        raise ConfigError(
            f"{shortened(argument, 60)}: an argument may have {_MAX_ARGUMENT:,} characters; "
            "name a folder or a glob instead of many files"
        )
    if "\0" in argument:
        raise ConfigError(f"{shortened(argument)}: an argument must not hold a null character")
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{shortened(argument)}: this is not UTF-8; records keep names as UTF-8, so use such a name, or rename"
        ) from None


def _prepared(argument: str, *, is_sweep: bool, knows_all: bool) -> str:
    [argument] = point_stories_at_paths([argument])
    left, equals, value = argument.partition("=")
    found = _KEY.fullmatch(left)
    assert found is not None  # every part may be empty
    sign, key = found["sign"] or "", found["key"]
    if not equals and sign != "~":
        raise ConfigError(f"{shortened(argument)}: settings are written KEY=VALUE, such as stories=my_stories/")
    if key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
        return argument
    if sign == "~":
        raise ConfigError(f"{shortened(argument)}: a setting cannot be removed; set it to another value")
    if key.startswith((f"{_LORAS}.", f"{_LORAS}[")):
        raise ConfigError(f"{shortened(argument)}: a LoRA's settings stand next to its path: {_LORA_EXAMPLE}")
    if knows_all:
        check_key(key, given=shortened(argument))
        argument = argument.lstrip("+")  # there is nothing to add: every setting exists
    if is_group(key):
        parsed = _parsed(argument)
        if knows_all:
            check_entry(key, parsed, value)
        _check_sweep(parsed, argument, key, value, is_sweep=is_sweep)
        return argument
    head = argument[: len(argument) - len(value)]
    if key in PATHS or key in LISTS_OF_PATHS:
        return head + _literal(value, key=key, is_sweep=is_sweep)
    parsed = _parsed(argument)
    if parsed is None and is_text(key):
        return head + quoted(value, refers="${" in value)
    if parsed is None and (flow := _from_yaml(value)):
        return head + flow
    if parsed is None:
        raise ConfigError(f"{shortened(argument)}: this value cannot be read{_advice(key, value)}")
    _check_sweep(parsed, argument, key, value, is_sweep=is_sweep)
    if parsed.is_sweep_override() or "${" in value:
        return argument
    read = parsed.value()
    if is_text(key) and isinstance(read, bool | int | float):
        return head + quoted(value)  # a text that looks like a number keeps its digits
    if get_origin(settings().get(key)) is list and not isinstance(read, list):
        raise ConfigError(f"{shortened(argument)}: this is no list{_advice(key, value)}")
    return argument


def _check_sweep(parsed: Override | None, argument: str, key: str, value: str, *, is_sweep: bool) -> None:
    if parsed is not None and parsed.is_sweep_override() and not is_sweep:
        raise ConfigError(
            f"{shortened(argument)}: several values for one setting; -m renders a sweep over them{_advice(key, value)}"
        )


def _literal(value: str, *, key: str, is_sweep: bool) -> str:
    """Return the value of a path, quoted unless Hydra's reading of it is what is meant."""
    if value in ("", "null"):
        return value
    refers = "${" in value
    if key in LISTS_OF_PATHS and value[0] == "[" and "]" not in value:
        raise ConfigError(f"{key}={shortened(value)}: a list ends with ]; write ./{shortened(value)} for a name")
    if key == _LORAS and value[0] == "{":
        value = f"[{value}]"
    parsed = None
    if value[0] in "'\"[{" or refers or is_sweep:
        parsed = _parsed(f"{key}={value}")
    if parsed is not None:
        read = parsed.value()
        is_quoted = isinstance(read, str) and (value[0] in "'\"" or refers)
        is_list = key in LISTS_OF_PATHS and isinstance(read, list | dict)
        if is_quoted or is_list or (is_sweep and parsed.is_sweep_override()):
            return value
    if key in LISTS_OF_PATHS and not is_sweep and _is_list_of_files(value):
        return "[" + ",".join(quoted(one) for one in value.split(",")) + "]"
    if key in LISTS_OF_PATHS and value[0] in "[{" and (flow := _from_yaml(value)):
        return flow
    if key == _LORAS and value.startswith("[{"):
        raise ConfigError(f"{key}={shortened(value)}: this list cannot be read; an example: {_LORA_EXAMPLE}")
    return quoted(value, refers=refers)


def _from_yaml(value: str) -> str | None:
    """Return a list or mapping that YAML can read, and Hydra's grammar cannot, in that grammar; None for all else."""
    if value[:1] not in ("[", "{") or "&" in value:  # anchors could make little text large
        return None
    try:
        return _in_grammar(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None


def _in_grammar(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_in_grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_plain_key(key)}:{_in_grammar(one)}" for key, one in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    raise TypeError(type(value).__name__)


def _plain_key(key: object) -> str:
    if isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]*", key):
        return key
    raise TypeError("a key that is not a name")


def _is_list_of_files(value: str) -> bool:
    """Whether ``a,b`` can only mean two files or globs, not one whose name has a comma."""
    parts = value.split(",")
    try:
        exist = all(set(part) & set("*?") or Path(part).expanduser().exists() for part in parts)
        return len(parts) > 1 and exist and not Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a name; no such user
        return False


def _parsed(argument: str) -> Override | None:
    """Return what Hydra's parser makes of an argument; None when it cannot read it. Raises ``ConfigError`` for size."""
    if len(re.findall(r"\W", argument)) > _MAX_SIGNS or _depth(argument) > _MAX_DEPTH:
        raise ConfigError(
            f"{shortened(argument, 60)}: too long a list, or nested too deeply; at most {_MAX_SIGNS:,} signs and "
            f"{_MAX_DEPTH} brackets in each other"
        )
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except _PARSING:
        return None
    return None if parsed.type is OverrideType.DEL else parsed


def _depth(text: str) -> int:
    depth = deepest = 0
    for sign in text:
        if sign in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif sign in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _advice(key: str, value: str) -> str:
    """The exact words to type for what ``value`` may mean."""
    if is_text(key):
        text = f'"{value}"' if not set(value) & set('"\\$') else quoted(value)
        return f"; for one text, type: {shortened(shlex.quote(f'{key}={text}'), 1000)}"
    kind = settings().get(key)
    if get_origin(kind) is list:
        text = f"[{value}]" if not value.startswith("[") else "['a, b', c]"
        quotes = "" if not value.startswith("[") else " (quotes around an entry with commas, brackets or blanks)"
        return f"; for a list, type: {shortened(shlex.quote(f'{key}={text}'), 1000)}{quotes}"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    allowed = [names[one] for one in (get_args(kind) or (kind,)) if one in names]
    return f"; it must be {allowed[0]}" if allowed else ""
